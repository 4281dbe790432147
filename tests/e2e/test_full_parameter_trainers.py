"""maml_sft_trainer.py and reptile_sft_trainer.py as users run them: the guide's command, exports, resume, layouts."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from script_runner import must_run, run_script
from transformers import AutoModelForCausalLM, AutoTokenizer

FOMAML = (
    "maml_sft_trainer.py",
    "--config-path",
    "data/math_science_meta",
    "--config-name",
    "config_fomaml_math_science",
)
REPTILE = (
    "reptile_sft_trainer.py",
    "--config-path",
    "data/math_science_meta",
    "--config-name",
    "config_reptile_math_science",
)
STEPS = 4


def settings(model, tasks, folder, **changes):
    values = {
        "model.path": model,
        "meta.task_dir": tasks,
        "meta.support_samples": 24,
        "meta.num_inner_steps": 3,
        "meta.inner_lr": 0.05,
        "optim.lr": 1e-3,
        "trainer.total_training_steps": STEPS,
        "trainer.save_freq": 2,
        "trainer.default_local_dir": folder,
        **changes,
    }
    return [f"{key}={value}" for key, value in values.items()]


def weights(folder, step=STEPS):
    return load_file(folder / f"step_{step}" / "model.safetensors")


def metrics(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if not k.startswith("perf/")} for record in records]


@pytest.fixture(scope="module")
def fomaml(tiny_model, task_dir, tmp_path_factory):
    """The guide's command: four processes, one episode on all of them, the model sharded by FSDP2."""
    folder = tmp_path_factory.mktemp("fomaml")
    must_run(*FOMAML, *settings(tiny_model, task_dir, folder), processes=4)
    return folder


def test_the_export_is_a_plain_hugging_face_folder(fomaml, tiny_model):
    model, report = AutoModelForCausalLM.from_pretrained(fomaml / f"step_{STEPS}", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert type(model).__name__ == "LlamaForCausalLM" and model.config.architectures == ["LlamaForCausalLM"]
    before = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    after = model.state_dict()
    assert before.keys() == after.keys() and all(not torch.equal(before[n], after[n]) for n in before)
    assert AutoTokenizer.from_pretrained(fomaml / f"step_{STEPS}").chat_template


def test_summary_names_the_export_and_its_bytes(fomaml):
    summary = json.loads((fomaml / "run_summary.json").read_text())
    assert (summary["method"], summary["world_size"], summary["task_group_size"]) == ("fomaml", 4, 4)
    assert 3 < summary["model_memory_bytes"] / summary["peak_memory_bytes"] < 4.5  # all four, of similar size
    files = [file for file in (fomaml / summary["checkpoint"]).rglob("*") if file.is_file()]
    assert summary["checkpoint_bytes"] == sum(file.stat().st_size for file in files)


@pytest.mark.slow
def test_one_process_and_resumed_two_process_runs_agree(fomaml, tiny_model, task_dir, tmp_path):
    """Four ranks = one rank to rounding; two ranks, stopped and resumed = two ranks uninterrupted, bit for bit."""
    one = tmp_path / "one"
    must_run(*FOMAML, *settings(tiny_model, task_dir, one))
    a, b = weights(fomaml), weights(one)
    assert max(((a[n] - b[n]).norm() / a[n].norm()).item() for n in a) < 1e-5

    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    must_run(*FOMAML, *settings(tiny_model, task_dir, straight), processes=2)
    half = {"trainer.total_training_steps": 2}
    must_run(*FOMAML, *settings(tiny_model, task_dir, resumed, **half), processes=2)
    must_run(*FOMAML, *settings(tiny_model, task_dir, resumed), processes=2)
    a, b = weights(straight), weights(resumed)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert metrics(straight) == metrics(resumed)

    # Another number of processes, or other groups, cannot read those shards: said before anything is loaded wrongly.
    refused = run_script(*FOMAML, *settings(tiny_model, task_dir, resumed, **{"trainer.total_training_steps": 6}))
    assert refused.returncode == 2 and "the number of processes = 2, this run has 1" in refused.stderr


@pytest.mark.slow
def test_only_the_newest_checkpoints_are_kept(tiny_model, task_dir, tmp_path):
    changes = {"trainer.save_freq": 1, "trainer.max_ckpt_to_keep": 2}
    must_run(*FOMAML, *settings(tiny_model, task_dir, tmp_path, **changes))
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_3", "step_4"]
    assert sorted(p.name for p in tmp_path.glob("global_step_*")) == ["global_step_3", "global_step_4"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_bf16_compute_keeps_fp32_weights(processes, tiny_model, task_dir, tmp_path):
    """On one process through autocast, on two through FSDP2's mixed precision."""
    changes = {"engine.mixed_precision.param_dtype": "bf16", "model.enable_gradient_checkpointing": "true"}
    must_run(*FOMAML, *settings(tiny_model, task_dir, tmp_path, **changes), processes=processes)
    assert all(t.dtype == torch.float32 for t in weights(tmp_path).values())
    states = list(tmp_path.glob(f"global_step_{STEPS}/optim_*.pt"))
    moments = [value for file in states for value in tensors_of(torch.load(file, weights_only=False)["state"])]
    assert len(states) == processes and moments and all(t.dtype == torch.float32 for t in moments)
    records = metrics(tmp_path)
    assert records[-1]["meta/query_loss_after"] < records[0]["meta/query_loss_before"]


def tensors_of(state):
    """Of an optimizer's state dict, whatever it calls them."""
    return [value for entry in state.values() for value in entry.values() if torch.is_tensor(value)]


def test_small_steps_are_not_rounded_away_when_bf16_computes(tiny_model, task_dir, tmp_path):
    small = {"meta.inner_lr": 1e-5, "optim.lr": 1e-5, "trainer.total_training_steps": 1}
    must_run(
        *FOMAML,
        *settings(tiny_model, task_dir, tmp_path, **small, **{"engine.mixed_precision.param_dtype": "bf16"}),
    )
    before, after = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict(), weights(tmp_path, step=1)
    moved = sum((after[name] != before[name]).sum().item() for name in after)
    assert moved > 0.99 * sum(tensor.numel() for tensor in after.values())


def test_a_run_whose_losses_diverge_says_so_once_and_records_it(tiny_model, task_dir, tmp_path):
    """The learning rate rises until losses grow, every number finite; the run is resumed on the way."""
    changes = {
        "optim.lr": 3, "optim.lr_warmup_steps": 30, "meta.inner_lr": 0.1, "meta.num_inner_steps": 1,
        "meta.meta_batch_size": 1, "meta.inner_batch_size": 2, "meta.query_batch_size": 2,
        "meta.adaptation_gain_freq": 0, "trainer.save_freq": -1, "trainer.logger": "[]",
    }  # fmt: skip
    outputs = []
    for steps in (12, 30):
        finished = must_run(
            *FOMAML, *settings(tiny_model, task_dir, tmp_path, **changes, **{"trainer.total_training_steps": steps})
        )
        outputs.append(finished.stdout + finished.stderr)
    assert "diverges" not in outputs[0]
    warnings = [line for line in outputs[1].splitlines() if "diverges" in line and "or meta.inner_lr=0.1" in line]
    for loss in ("support loss before adaptation", "query loss after adaptation"):
        (warning,) = [line for line in warnings if loss in line]
        assert "lower optim.lr=3 or meta.inner_lr=0.1, or set meta.inner_clip_grad" in warning
        assert outputs[1].count(f"the {loss} diverges") == 2  # and beside the sentence that the run has finished
    diverged = json.loads((tmp_path / "run_summary.json").read_text())["diverged"]
    assert set(diverged) == {"inner/support_loss_first", "meta/query_loss_after"} and min(diverged.values()) >= 2


@pytest.fixture(scope="module")
def reptile(tiny_model, task_dir, tmp_path_factory):
    """Without a query set: the query files are taken away to prove that none is read."""
    tasks, folder = tmp_path_factory.mktemp("support_only"), tmp_path_factory.mktemp("reptile")
    for file in task_dir.glob("*_support.parquet"):
        (tasks / file.name).write_bytes(file.read_bytes())
    must_run(*REPTILE, *settings(tiny_model, tasks, folder, **{"meta.query_batch_size": 0}), processes=2)
    return folder


@pytest.mark.slow
def test_reptile_learns_without_a_query_set(reptile):
    records = metrics(reptile)
    assert records[-1]["inner/support_loss_first"] < records[0]["inner/support_loss_first"]
    assert not any("query" in name for name in records[0])
    assert json.loads((reptile / "run_summary.json").read_text())["method"] == "reptile"


def test_reptile_on_lora_writes_an_adapter(tiny_model, task_dir, tmp_path):
    changes = {"model.lora_rank": 4, "model.lora_alpha": 8, "meta.inner_lr": 0.3}
    must_run(*REPTILE, *settings(tiny_model, task_dir, tmp_path, **changes))
    checkpoint = torch.load(tmp_path / f"reptile_checkpoint_step_{STEPS}.pt", weights_only=True)
    assert all("lora_" in name for name in checkpoint["lora"]) and checkpoint["adaptation"]["method"] == "reptile"
    assert (tmp_path / f"adapter_step_{STEPS}" / "adapter_model.safetensors").is_file()
    assert not list(tmp_path.glob("step_*"))
