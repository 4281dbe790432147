"""The scripts in examples/ and the notebook, run on the tiny model."""

from __future__ import annotations

import ast
import json

import pytest
import torch
from safetensors.torch import load_file
from script_runner import ROOT, must_run, run_script

EXAMPLES = ROOT / "examples"


def test_adapt_to_my_file(tiny_model, tmp_path):
    said = must_run(EXAMPLES / "adapt_to_my_file.py", "--model", tiny_model, "--output", tmp_path / "desk").stdout
    assert "\nbefore: " in said and "\nafter: " in said
    record = json.loads((tmp_path / "desk" / "adapt.json").read_text())
    assert record["figures"]["verdict"] in said and record["examples"]["count"] == 12


def cells():
    """Name -> source of the notebook's code cells."""
    notebook = json.loads((EXAMPLES / "adapt_to_my_file.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    return {cell["id"]: "".join(cell["source"]) for cell in code}


def test_the_notebook_is_the_script():
    """But for the settings, which are flags there."""
    _, *parts = (EXAMPLES / "adapt_to_my_file.py").read_text().split("\n# %%\n")
    script, notebook = dict(zip(cells(), parts, strict=True)), cells()
    script["imports"] = script["imports"].replace("import argparse\n", "")
    del script["settings"], notebook["settings"]
    assert {name: source.strip("\n") for name, source in script.items()} == notebook


@pytest.mark.slow
def test_the_notebook_runs(tiny_model, tmp_path, capsys):
    """Cell after cell, as a kernel does."""
    names: dict = {}
    for name, source in cells().items():
        if name == "settings":
            assert [target.id for target in ast.parse(source).body[0].targets[0].elts] == ["model", "output"]
            source = f"model, output = {str(tiny_model)!r}, {str(tmp_path / 'desk')!r}"
        exec(compile(source, name, "exec"), names)
    assert "before:" in capsys.readouterr().out
    assert (tmp_path / "desk" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_meta_train_on_my_tasks(tiny_model, tmp_path):
    said = must_run(
        EXAMPLES / "meta_train_on_my_tasks.py", "--model", tiny_model, "--output", tmp_path, "--steps", "2"
    ).stdout
    assert "META-LORA finished" in said and "last_letter: 12 examples" in said
    record = json.loads((tmp_path / "adapters" / "last_letter" / "adapt.json").read_text())
    assert "verdict_on_start" in record["figures"]
    start = load_file(tmp_path / "meta_lora" / "adapter_step_2" / "adapter_model.safetensors")
    found = load_file(tmp_path / "adapters" / "last_letter" / "adapter_model.safetensors")
    assert start.keys() == found.keys() and any(not torch.equal(start[name], found[name]) for name in start)


def trained(script, folder, *more, batch=4):
    """(tensors, norm of the meta-gradient) after one meta-step on ``batch`` tasks."""
    must_run(
        *script, *more, f"meta.meta_batch_size={batch}", "meta.support_samples=24", "meta.num_inner_steps=2",
        "model.lora_rank=4", "trainer.total_training_steps=1", f"trainer.default_local_dir={folder}",
    )  # fmt: skip
    line = json.loads((folder / "metrics.jsonl").read_text())
    export = torch.load(folder / "meta_lora_checkpoint_step_1.pt", weights_only=True)
    return export["lora"], line["meta/grad_norm"]


@pytest.mark.parametrize(
    "batching", ["null", pytest.param("false", marks=pytest.mark.slow)]
)  # several tasks in a pass, one at a time
def test_write_an_update_rule(batching, tiny_model, task_dir, tmp_path):
    data = [f"meta.task_dir={task_dir}", f"meta.task_batching={batching}"]
    plain = ["meta_lora_trainer.py", "--config-name", "config_meta_lora_guide", f"model.path={tiny_model}", *data]
    own = [EXAMPLES / "write_an_update_rule.py", "--model", tiny_model]

    expected, norm = trained(plain, tmp_path / "plain")
    found, same = trained(own, tmp_path / "far", "--clip", "1e9", *data)
    assert same == norm and all(torch.equal(found[name], expected[name]) for name in expected)

    # A single task: its gradient is the meta-gradient, whose norm is therefore the limit.
    _, largest = trained(own, tmp_path / "one", "--clip", str(norm / 100), *data, batch=1)
    assert largest == pytest.approx(norm / 100, rel=1e-4)
    # Of several, every one of which is clipped: at most that, and not zero.
    _, mean = trained(own, tmp_path / "all", "--clip", str(norm / 100), *data)
    assert 0 < mean <= norm / 100


def test_an_update_rule_names_the_setting_that_it_does_not_know(tiny_model, task_dir):
    own = [EXAMPLES / "write_an_update_rule.py", "--model", tiny_model, f"meta.task_dir={task_dir}"]
    refused = run_script(*own, "meta.order=2")
    assert refused.returncode == 2
    assert "error: meta.order is 2, which this rule does not know: set 1\n" in refused.stderr
