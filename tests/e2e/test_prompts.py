"""A base model without a chat template, trained with one that has a switch and a date: evaluation asks as it did."""

from __future__ import annotations

import json

import pytest
from chat_templates import DATED
from few_shot_data import base_config, load, without_lora_flags, write_unseen_tasks
from script_runner import must_run, run_script
from tiny_model import build_tiny_model
from transformers import AutoTokenizer

import evaluate_few_shot
from metasft.experiments.composition import overrides_of

SCRIPTS = {
    "meta_lora": ("meta_lora_trainer.py", "config_meta_lora_guide"),
    "fomaml": ("maml_sft_trainer.py", "config_fomaml_math_science"),
    "reptile": ("reptile_sft_trainer.py", "config_reptile_math_science"),
}
EXPORTS = {
    "meta_lora": ("meta_lora_checkpoint_step_1.pt", "adapter_step_1"),
    "fomaml": ("step_1",),
    "reptile": ("step_1",),
}
ARGUMENTS = {"enable_thinking": False, "date_string": "26 Jul 2024"}


@pytest.fixture(scope="module")
def bare_model(tmp_path_factory):
    folder = build_tiny_model(tmp_path_factory.mktemp("bare"))
    (folder / "chat_template.jinja").unlink()
    return folder


def train(method, model, tasks, folder, **changes):
    values = {
        "model.path": str(model),
        "model.custom_chat_template": DATED,
        "+data.apply_chat_template_kwargs.enable_thinking": False,
        "meta.task_dir": str(tasks),
        "meta.support_samples": 8,
        "meta.num_inner_steps": 1,
        "trainer.total_training_steps": 1,
        "trainer.default_local_dir": str(folder),
        **({"model.lora_rank": 4, "model.lora_alpha": 8} if method == "meta_lora" else {}),
        **changes,
    }
    script, name = SCRIPTS[method]
    return script, "--config-path", "data/math_science_meta", "--config-name", name, *overrides_of(values, {}, method)


@pytest.mark.parametrize("method", ["meta_lora", "fomaml", pytest.param("reptile", marks=pytest.mark.slow)])
def test_evaluation_asks_as_training_did(method, bare_model, task_dir, tmp_path):
    must_run(*train(method, bare_model, task_dir, tmp_path / "run"))
    data = write_unseen_tasks(tmp_path / "data", tasks=("calculus",))
    tokenizer = AutoTokenizer.from_pretrained(bare_model)
    for number, name in enumerate(EXPORTS[method]):
        path, results = tmp_path / "run" / name, tmp_path / f"results{number}"
        config = base_config(bare_model, data, results)
        model, tasks = load(without_lora_flags(config, model_type=method, model_path=str(path)))
        for row, item in zip(tasks["calculus"].test, model._tests["calculus"], strict=True):
            text = tokenizer.apply_chat_template(
                row["messages"][:-1], chat_template=DATED, add_generation_prompt=True, tokenize=False, **ARGUMENTS
            )
            assert item.prompt == tokenizer(text)["input_ids"] == item.ids[: len(item.prompt)]
            assert "26 Jul 2024" in text and text.endswith("<think></think>")
        flags = {"model-type": method, "model-path": path, "data-dir": data, "output-dir": results, "n-shots": 2}
        flags |= {"n-runs": 1, "limit": 2, "max-new-tokens": 2, "adaptation-steps": 1}
        assert evaluate_few_shot.main([f"--{flag}={value}" for flag, value in flags.items()]) == 0
        assert json.loads((results / f"{method}_settings.json").read_text())["chat_template_kwargs"] == ARGUMENTS

    if method == "meta_lora":  # half a run on other prompts would be recorded as a whole one
        further = {"trainer.total_training_steps": 2, "+data.apply_chat_template_kwargs.enable_thinking": True}
        refused = run_script(*train(method, bare_model, task_dir, tmp_path / "run", **further))
        assert (
            refused.returncode == 2 and "data.apply_chat_template_kwargs = {'enable_thinking': False}" in refused.stderr
        )
