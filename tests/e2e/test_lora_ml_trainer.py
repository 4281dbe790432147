"""lora_ml_trainer.py as users run it: its export, resuming, and the settings it does not take."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from script_runner import must_run, run_script

SCRIPT = ("lora_ml_trainer.py", "--config-path", "data/math_science_meta", "--config-name", "config_lora_ml")
RANK = 2


def settings(model, tasks, folder, **changes):
    values = {
        "model.path": model,
        "meta.task_dir": tasks,
        "meta.support_samples": 24,
        "meta.num_inner_steps": 2,
        "meta.meta_batch_size": 2,  # of four tasks: some are not in every meta-step
        "model.lora_rank": 4,
        "model.lora_alpha": 8,
        "meta.task_lora_rank": RANK,
        "optim.lr": 0.01,
        "optim.lr_scheduler_type": "cosine",
        "trainer.total_training_steps": 4,
        "trainer.save_freq": 1,
        "trainer.max_ckpt_to_keep": "null",
        "trainer.default_local_dir": folder,
        **changes,
    }
    return [f"{key}={value}" for key, value in values.items()]


@pytest.fixture(scope="module")
def run(tiny_model, task_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, must_run(*SCRIPT, *settings(tiny_model, task_dir, folder))


def adapter(folder, step=4):
    return load_file(folder / f"adapter_step_{step}" / "adapter_model.safetensors")


def records(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]


def test_the_export_is_the_shared_lora_and_room_for_a_task(run):
    folder, finished = run
    assert "the LoRAs of 4 tasks: " in finished.stdout
    first, last = adapter(folder, 1), adapter(folder)
    for name, tensor in last.items():
        is_a = "lora_A" in name
        shared, room = (tensor if is_a else tensor.t()).split([4 - RANK, RANK])
        before = (first[name] if is_a else first[name].t())[-RANK:]
        assert torch.equal(room, before) and (room.any() if is_a else not room.any())
        assert shared.any()
    content = torch.load(folder / "lora_ml_checkpoint_step_4.pt", weights_only=True)
    assert content["adaptation"]["method"] == "lora_ml" and content["lora"].keys() == last.keys()
    gains = [record["meta/adaptation_gain"] for record in records(folder)]
    assert gains[0] == 0, "a task's LoRA starts without effect"
    assert max(gains) > 0


def test_a_resumed_run_equals_an_uninterrupted_one(run, tiny_model, task_dir, tmp_path):
    """Bit for bit: theta, the tasks' LoRAs and their moments, and the losses."""
    folder, _ = run
    must_run(*SCRIPT, *settings(tiny_model, task_dir, tmp_path))
    for step in (3, 4):
        (tmp_path / f"global_step_{step}").rename(tmp_path / f"other_{step}")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    must_run(*SCRIPT, *settings(tiny_model, task_dir, tmp_path))
    one, other = adapter(folder), adapter(tmp_path)
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())
    assert records(folder) == records(tmp_path)
    states = [torch.load(f / "global_step_4" / "task_loras.pt", weights_only=True) for f in (folder, tmp_path)]
    assert len(states[0]["values"]) == 4
    for task, values in states[0]["values"].items():
        assert torch.equal(values, states[1]["values"][task])
    assert states[0]["optimizer"].keys() == states[1]["optimizer"].keys()
    for number, moments in states[0]["optimizer"].items():
        assert all(torch.equal(tensor, states[1]["optimizer"][number][name]) for name, tensor in moments.items())
    finished = run_script(*SCRIPT, *settings(tiny_model, task_dir, tmp_path, **{"meta.task_lora_rank": 1}))
    assert finished.returncode == 2, finished.stderr
    assert "was saved with meta.task_lora_rank = 2, this run has 1" in finished.stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"meta.task_lora_rank": 4}, "meta.task_lora_rank=4 leaves none of model.lora_rank=4 to the shared LoRA"),
        ({"+meta.order": 2}, "meta.order=2 has no effect in LoRA-ML; remove it (it belongs to META-LORA)"),
        ({"optim.weight_decay": 0.1}, "optim.weight_decay=0.1: LoRA-ML leaves room for a new task in the last ranks"),
        ({"model.lora_rank": 0}, "model.lora_rank=0: LoRA-ML trains LoRA parameters only"),
    ],
)
def test_settings_that_it_does_not_take(changes, words, tiny_model, task_dir, tmp_path):
    finished = run_script(*SCRIPT, *settings(tiny_model, task_dir, tmp_path, **changes))
    assert finished.returncode == 2 and words in finished.stderr.splitlines()[-1]
