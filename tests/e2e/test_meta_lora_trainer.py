"""meta_lora_trainer.py as users run it: the guide's command, its files, resume, and its refusals."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from script_runner import must_run, run_script
from tiny_model import CHAT_TEMPLATE
from transformers import AutoModelForCausalLM

SCRIPT = (
    "meta_lora_trainer.py",
    "--config-path",
    "data/math_science_meta",
    "--config-name",
    "config_meta_lora_guide",
)
STEPS = 4


def settings(model, tasks, folder, **changes):
    values = {
        "model.path": model,
        "meta.task_dir": tasks,
        "meta.support_samples": 24,
        "meta.num_inner_steps": 3,
        "meta.inner_lr": 0.3,
        "model.lora_rank": 4,
        "model.lora_alpha": 8,
        "trainer.total_training_steps": STEPS,
        "trainer.save_freq": 2,
        "trainer.default_local_dir": folder,
        **changes,
    }
    return [f"{key}={value}" for key, value in values.items()]


@pytest.fixture(scope="module")
def run(tiny_model, task_dir, tmp_path_factory):
    """One process, the guide's launch line."""
    folder = tmp_path_factory.mktemp("run")
    finished = must_run(*SCRIPT, *settings(tiny_model, task_dir, folder), processes=1, fresh=True)  # torchrun itself
    return folder, finished


def adapter(folder, step=STEPS):
    return torch.load(folder / f"meta_lora_checkpoint_step_{step}.pt", weights_only=True)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max(((a[n] - b[n]).norm() / a[n].norm().clamp_min(1e-9)).item() for n in a)


def test_checkpoint_holds_lora_and_nothing_else(run, tiny_model):
    folder, _ = run
    checkpoint = adapter(folder)
    keys = {"format", "version", "step", "base_model", "adapter_config", "adaptation", "lora", "chat_template"}
    assert set(checkpoint) == keys
    assert checkpoint["step"] == STEPS and checkpoint["base_model"] == str(tiny_model)
    assert all("lora_A" in n or "lora_B" in n for n in checkpoint["lora"])
    assert all(t.dtype == torch.float32 for t in checkpoint["lora"].values())
    assert any(t.abs().max() > 0 for n, t in checkpoint["lora"].items() if "lora_B" in n), "B has left its zero start"
    assert checkpoint["adaptation"]["inner_lr"] == 0.3 and checkpoint["adaptation"]["inner_optimizer"] == "sgd"
    assert checkpoint["adapter_config"]["r"] == 4
    assert checkpoint["chat_template"] == CHAT_TEMPLATE and checkpoint["adaptation"]["chat_template_kwargs"] == {}


def test_adapter_folder_is_the_same_adapter_for_peft(run, tiny_model):
    folder, _ = run
    tensors = load_file(folder / f"adapter_step_{STEPS}" / "adapter_model.safetensors")
    lora = adapter(folder)["lora"]
    assert tensors.keys() == lora.keys() and all(torch.equal(tensors[n], lora[n]) for n in lora)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        before = base(ids).logits
        with_adapter = PeftModel.from_pretrained(base, folder / f"adapter_step_{STEPS}")(ids).logits
    assert not torch.allclose(before, with_adapter)


def test_resume_state_in_verls_layout_without_the_base(run):
    folder, _ = run
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == str(STEPS)
    for step in (2, 4):
        state = folder / f"global_step_{step}"
        names = {file.name for file in state.iterdir()}
        assert {f"{k}_world_size_1_rank_0.pt" for k in ("model", "optim", "extra_state")} | {"data_0.pt"} <= names
        model = torch.load(state / "model_world_size_1_rank_0.pt", weights_only=False)
        assert model and all("lora_" in name for name in model)


def test_metrics_have_the_documented_names_and_finite_values(run):
    folder, _ = run
    records = metrics(folder)
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    names = {
        "inner/support_loss",
        "meta/query_loss_before",
        "meta/query_loss_after",
        "meta/adaptation_gain",
        "meta/grad_norm",
        "perf/step_seconds",
        "perf/peak_memory_gb",
        "perf/tokens_per_second",
        "perf/padding_fraction",
        "train/lr",
    }
    for record in records:
        assert names <= set(record)
        assert all(isinstance(v, int | float) and v == v and abs(v) < 1e6 for v in record.values())
        for task in ("add", "sub", "mul", "cat"):
            gain = record[f"meta/query_loss_before/{task}"] - record[f"meta/query_loss_after/{task}"]
            assert record[f"meta/adaptation_gain/{task}"] == pytest.approx(gain, abs=1e-9)


def test_run_summary_is_measured(run, tiny_model):
    folder, _ = run
    summary = json.loads((folder / "run_summary.json").read_text())
    records = metrics(folder)
    assert summary["method"] == "meta_lora" and summary["base_model"] == str(tiny_model)
    assert summary["world_size"] == 1 and summary["meta_steps"] == STEPS and summary["seed"] == 1
    assert summary["tokens"] == sum(r["perf/tokens"] for r in records) > 0
    assert summary["seconds_total"] >= sum(r["perf/step_seconds"] for r in records)
    assert summary["checkpoint_bytes"] == (folder / summary["checkpoint"]).stat().st_size
    assert summary["model_memory_bytes"] == summary["peak_memory_bytes"] > 50e6 and summary["peak_memory_kind"] in (
        "rss",
        "device",
    )
    assert summary["versions"]["verl"] == "0.9.0"
    names = ("support_samples", "query_samples", "labelled_examples_per_task", "labelled_examples")
    assert [summary[name] for name in names] == [24, 12, 36, 4 * 36]


def test_two_processes_give_the_adapter_of_one(run, tiny_model, task_dir, tmp_path):
    folder, _ = run
    must_run(*SCRIPT, *settings(tiny_model, task_dir, tmp_path), processes=2)
    assert largest_difference(adapter(folder)["lora"], adapter(tmp_path)["lora"]) < 1e-5


def test_same_seed_same_weights_and_resumed_equals_uninterrupted(run, tiny_model, task_dir, tmp_path):
    """Bit for bit; the second run stops after two meta-steps and is started again with the same command."""
    folder, _ = run
    half = settings(tiny_model, task_dir, tmp_path, **{"trainer.total_training_steps": 2})
    must_run(*SCRIPT, *half)  # plain `python`, no torchrun
    assert largest_difference(adapter(folder, 2)["lora"], adapter(tmp_path, 2)["lora"]) == 0
    must_run(*SCRIPT, *settings(tiny_model, task_dir, tmp_path))
    a, b = adapter(folder)["lora"], adapter(tmp_path)["lora"]
    assert all(torch.equal(a[n], b[n]) for n in a)
    timing = ("perf/",)
    for one, other in zip(metrics(folder), metrics(tmp_path), strict=True):
        assert {k: v for k, v in one.items() if not k.startswith(timing)} == {
            k: v for k, v in other.items() if not k.startswith(timing)
        }
    # A finished run started again has nothing to do and says so.
    again = must_run(*SCRIPT, *settings(tiny_model, task_dir, tmp_path))
    assert "already holds meta-step 4" in again.stdout


def test_stage_1_only_never_moves_theta(tiny_model, task_dir, tmp_path):
    changes = {"meta.update_shared": "false", "trainer.total_training_steps": 2, "trainer.save_freq": 1}
    must_run(*SCRIPT, *settings(tiny_model, task_dir, tmp_path, **changes))
    first, second = adapter(tmp_path, 1)["lora"], adapter(tmp_path, 2)["lora"]
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert all(record["meta/adaptation_gain"] > 0 for record in metrics(tmp_path)), "the tasks did adapt"


@pytest.mark.slow
def test_starting_from_an_existing_adapter(run, tiny_model, task_dir, tmp_path):
    folder, _ = run
    changes = {
        "model.lora_adapter_path": folder / f"adapter_step_{STEPS}",
        "meta.update_shared": "false",
        "trainer.total_training_steps": 1,
    }
    must_run(*SCRIPT, *settings(tiny_model, task_dir, tmp_path, **changes))
    start, continued = adapter(folder)["lora"], adapter(tmp_path, 1)["lora"]
    assert all(torch.equal(start[n], continued[n]) for n in start)


@pytest.mark.slow
def test_bf16_base_keeps_adapters_in_fp32_and_still_learns(tiny_model, task_dir, tmp_path):
    changes = {"engine.model_dtype": "bf16", "engine.mixed_precision.param_dtype": "bf16"}
    must_run(*SCRIPT, *settings(tiny_model, task_dir, tmp_path, **changes), processes=2)
    assert all(t.dtype == torch.float32 for t in adapter(tmp_path)["lora"].values())
    records = metrics(tmp_path)
    assert records[-1]["meta/query_loss_after"] < records[0]["meta/query_loss_before"]


# A start of the script each, for a setting and for data; tests/unit/test_config.py and test_task_data.py hold the long
# tables, the other three here among them.
slow = pytest.mark.slow
REFUSED = [
    pytest.param({"meta.num_inner_steps": -1}, "meta.num_inner_steps=-1", id="setting"),
    pytest.param({"meta.support_samples": 25}, "has 24 examples, fewer than meta.support_samples=25", id="data"),
    pytest.param({"+meta.inner_steps": 3}, "meta.inner_steps=3", id="unknown setting", marks=slow),
    pytest.param({"meta.tasks": "[add,typo]"}, "typo", id="unknown task", marks=slow),
    pytest.param({"model.path": "models/missing"}, "models/missing", id="missing model", marks=slow),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED)
def test_wrong_settings_end_in_one_sentence_before_a_model_is_loaded(changes, words, tiny_model, task_dir, tmp_path):
    finished = run_script(*SCRIPT, *settings(tiny_model, task_dir, tmp_path, **changes))
    assert finished.returncode == 2, finished.stderr[-2000:]
    lines = [line for line in finished.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and words in lines[0]
    assert "Traceback" not in finished.stderr and "Loading weights" not in finished.stderr
    assert not any(tmp_path.iterdir())


def test_meta_batch_that_does_not_divide_names_the_nearest_sizes(tiny_model, task_dir, tmp_path):
    finished = run_script(
        *SCRIPT, *settings(tiny_model, task_dir, tmp_path, **{"meta.meta_batch_size": 3}), processes=2
    )
    assert finished.returncode != 0
    assert finished.stderr.count("nearest valid values are 2 and 4") == 1, "said once, by rank 0"
