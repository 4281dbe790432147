"""An adapted folder is a start elsewhere: veRL's trainers, TRL, transformers, and a model for lm-evaluation-harness."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from few_shot_data import save_random_adapter
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from script_runner import ROOT, must_run
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

import verl
from metasft.adapt import adapt

ROWS = [{"prompt": f"Double {number}", "response": str(2 * number)} for number in range(6)]
MESSAGES = [
    [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}] for row in ROWS
]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, tiny_model):
    """The PEFT folder of a task, r=4 and alpha 8 on all linear layers."""
    folder = tmp_path_factory.mktemp("adapted")
    start = save_random_adapter(folder, tiny_model).parent / "adapter_step_7"
    adapt(start, ROWS, folder / "mine", device="cpu", evaluate=False)
    return folder / "mine"


@pytest.fixture
def model(adapted, tiny_model):
    """On which training goes on."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    return PeftModel.from_pretrained(base, adapted, is_trainable=True)


def tensors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def farthest(one, other):
    """Largest difference of two adapters' numbers."""
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def check_training(trainer, adapted, output):
    """Two steps that begin at the adapted weights, and end in a PEFT folder with others."""
    start = tensors_of(adapted)
    assert farthest(get_peft_model_state_dict(trainer.model), start) == 0
    trainer.train()
    trainer.save_model(output)
    assert 0 < farthest(tensors_of(output), start) < 0.01
    assert len([entry for entry in trainer.state.log_history if "loss" in entry]) == 2


# ---- veRL -----------------------------------------------------------------------------------------------------------


def test_verl_sft_trains_on_from_it(adapted, tiny_model, tmp_path):
    data = tmp_path / "mine.parquet"
    pd.DataFrame({"messages": MESSAGES}).to_parquet(data)
    must_run(
        Path(verl.__file__).parent / "trainer" / "sft_trainer.py",
        "--config-path", ROOT / "data" / "meta_train", "--config-name", "algebra_train",
        f"model.path={tiny_model}", f"model.lora_adapter_path={adapted}", "model.lora_rank=4", "model.lora_alpha=8",
        f"data.train_files={data}", "data.train_max_samples=-1", "data.train_batch_size=2",
        "data.micro_batch_size_per_gpu=2", "optim.lr=1e-7", "trainer.total_training_steps=2",
        "trainer.resume_mode=disable", f"trainer.default_local_dir={tmp_path / 'run'}",
        processes=1,
    )  # fmt: skip
    state = torch.load(tmp_path / "run" / "global_step_2" / "model_world_size_1_rank_0.pt", weights_only=False)
    trained = {name.replace(".default.", "."): tensor.to_local() for name, tensor in state.items()}
    assert 0 < farthest(trained, tensors_of(adapted)) < 1e-6


def test_verl_grpo_takes_it(adapted, tiny_model):
    from hydra import compose, initialize_config_module
    from verl.utils.config import omega_conf_to_dataclass

    described = json.loads((adapted / "adapter_config.json").read_text())
    keys = {
        "path": tiny_model,
        "lora_adapter_path": adapted,
        "lora_rank": described["r"],
        "lora_alpha": described["lora_alpha"],
        "target_modules": f"[{','.join(described['target_modules'])}]",
    }
    # Without a plus sign, so that a key that veRL does not have is an error.
    given = [f"actor_rollout_ref.model.{key}={value}" for key, value in keys.items()]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", ["algorithm.adv_estimator=grpo", *given])
    taken = omega_conf_to_dataclass(config.actor_rollout_ref.model)
    assert taken.lora_adapter_path == str(adapted)
    assert (taken.lora_rank, taken.lora_alpha) == (4, 8)
    assert list(taken.target_modules) == described["target_modules"]


# ---- transformers and TRL -------------------------------------------------------------------------------------------


def settings(output):
    return {
        "output_dir": str(output),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
    }


def test_the_trainer_of_transformers_trains_on_from_it(adapted, model, tiny_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = [{"input_ids": ids, "labels": ids} for ids in tokenizer.apply_chat_template(MESSAGES)["input_ids"]]
    trainer = Trainer(model, TrainingArguments(**settings(tmp_path)), DataCollatorForSeq2Seq(tokenizer), rows)
    check_training(trainer, adapted, tmp_path / "trained")


@pytest.mark.slow
def test_trl_trains_on_from_it(adapted, model, tiny_model, tmp_path):
    # Not a dependency of the tests: beside trl 1.16 veRL 0.9.0 loads no model, since it patches a class that is gone.
    trl = pytest.importorskip("trl", reason="trl is not installed; put it on PYTHONPATH for this test alone")
    from datasets import Dataset

    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**settings(tmp_path), max_length=128),
        train_dataset=Dataset.from_dict({"messages": MESSAGES}),
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
    )
    check_training(trainer, adapted, tmp_path / "trained")


# ---- lm-evaluation-harness ------------------------------------------------------------------------------------------


def test_lm_eval_measures_it(adapted, model, tiny_model):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=str(tiny_model), peft=str(adapted), device="cpu", dtype="float32")
    asked = [Instance("loglikelihood", {}, ("Double 3", " is 6"), 0)]
    ((found, _),) = harness.loglikelihood(asked, disable_tqdm=True)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    before, ids = (tokenizer(text, return_tensors="pt")["input_ids"] for text in ("Double 3", "Double 3 is 6"))
    with torch.no_grad():
        scores = model.eval()(input_ids=ids).logits.log_softmax(-1)[0, before.shape[1] - 1 : -1]
    expected = scores.gather(1, ids[0, before.shape[1] :, None]).sum().item()
    assert found == pytest.approx(expected, abs=1e-4)
