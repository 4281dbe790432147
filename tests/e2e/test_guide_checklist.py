"""The experiment guide's verification checklist, one test per line of it, on one run of META-LORA on the tiny model.

The tiny model is random: these tests show that the mechanism holds, the figures of a real model are in README.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from script_runner import must_run
from tiny_model import build_tiny_model
from transformers import AutoModelForCausalLM

STEPS = 12


@pytest.fixture(scope="module")
def run(tiny_model, task_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checklist")
    must_run(
        "meta_lora_trainer.py",
        "--config-name",
        "config_meta_lora_guide",
        f"model.path={tiny_model}",
        f"meta.task_dir={task_dir}",
        "meta.support_samples=20",
        "meta.num_inner_steps=5",
        "meta.inner_lr=0.1",
        "optim.lr=0.005",
        f"trainer.total_training_steps={STEPS}",
        f"trainer.default_local_dir={folder}",
        processes=1,
    )
    return folder


@pytest.fixture(scope="module")
def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def checkpoint(run):
    return torch.load(run / f"meta_lora_checkpoint_step_{STEPS}.pt", weights_only=True)


# ---- META-LORA关键特性 (key properties) ------------------------------------------------------------------------------


def test_base_model_is_completely_frozen(run, tiny_model):
    """Base model完全冻结: the resume state holds no base tensor, so that there is none that could have changed."""
    state = torch.load(run / f"global_step_{STEPS}" / "model_world_size_1_rank_0.pt", weights_only=False)
    base = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    assert not {name.removeprefix("base_model.model.") for name in state} & set(base)


def test_only_lora_parameters_are_optimized(run, checkpoint):
    """只优化LoRA参数: the optimizer holds moments for the LoRA tensors and for nothing else."""
    optimizer = torch.load(run / f"global_step_{STEPS}" / "optim_world_size_1_rank_0.pt", weights_only=False)
    sizes = sorted(tuple(state["exp_avg"].shape) for state in optimizer["state"].values())
    assert sizes == sorted(tuple(t.shape) for t in checkpoint["lora"].values())


def test_stage_1_adapts_to_each_task_in_k_steps(records):
    """Stage 1: 任务特定适应: the support loss falls within the K steps, for every task."""
    for record in records:
        for task in ("add", "sub", "mul", "cat"):
            assert record[f"inner/support_loss_last/{task}"] < record[f"inner/support_loss_first/{task}"]


def test_stage_2_aggregates_gradients_into_the_shared_lora(records, checkpoint):
    """Stage 2: 梯度聚合更新shared LoRA: the shared B matrices have left their start at zero."""
    assert all(record["meta/grad_norm"] > 0 for record in records)
    assert all(t.abs().max() > 0 for name, t in checkpoint["lora"].items() if "lora_B" in name)


@pytest.mark.slow
def test_no_more_than_the_support_samples_are_used(run, tiny_model, task_dir, tmp_path):
    """每任务只用100样本: rows beyond meta.support_samples do not change the run by one bit."""
    import pandas as pd

    for file in task_dir.glob("*.parquet"):
        frame = pd.read_parquet(file)
        if "_support" in file.name:
            frame = frame.iloc[:20]
        frame.to_parquet(tmp_path / file.name)
    folder = tmp_path / "run"
    must_run(
        "meta_lora_trainer.py",
        "--config-name",
        "config_meta_lora_guide",
        f"model.path={tiny_model}",
        f"meta.task_dir={tmp_path}",
        "meta.support_samples=20",
        "meta.num_inner_steps=5",
        "meta.inner_lr=0.1",
        "optim.lr=0.005",
        f"trainer.total_training_steps={STEPS}",
        f"trainer.default_local_dir={folder}",
        processes=1,
    )
    one, two = (
        torch.load(f / f"meta_lora_checkpoint_step_{STEPS}.pt", weights_only=True)["lora"] for f in (run, folder)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_checkpoint_is_small_and_only_lora(run, checkpoint, tiny_model):
    """Checkpoint只包含LoRA参数（很小）: its bytes are those of the LoRA tensors plus a little structure."""
    tensors = sum(t.numel() * t.element_size() for t in checkpoint["lora"].values())
    size = (run / f"meta_lora_checkpoint_step_{STEPS}.pt").stat().st_size
    assert tensors <= size < tensors + 20_000
    assert not set(checkpoint["lora"]) & set(AutoModelForCausalLM.from_pretrained(tiny_model).state_dict())


# ---- 训练监控 (monitoring) ------------------------------------------------------------------------------------------


def test_stage_1_loss_falls_quickly(records):
    drops = [r["inner/support_loss_first"] - r["inner/support_loss_last"] for r in records]
    assert min(drops) > 0


def test_stage_2_query_loss_falls_over_training(records):
    third = STEPS // 3
    first, last = records[:third], records[-third:]
    assert sum(r["meta/query_loss_after"] for r in last) < sum(r["meta/query_loss_after"] for r in first)


def test_adaptation_gap_is_reported_per_task(records):
    for record in records:
        gains = [record[f"meta/adaptation_gain/{task}"] for task in ("add", "sub", "mul", "cat")]
        assert record["meta/adaptation_gain"] == pytest.approx(sum(gains) / 4, abs=1e-6)
        assert all(math.isfinite(gain) for gain in gains)


def test_memory_and_seconds_per_step_are_reported(records):
    assert all(record["perf/peak_memory_gb"] > 0 and record["perf/step_seconds"] > 0 for record in records)


# ---- 评估验证 (evaluation) ------------------------------------------------------------------------------------------


def test_checkpoint_loads_onto_a_new_base_model(checkpoint, tmp_path):
    """checkpoint可以直接加载到新的base model: same architecture, other weights; another architecture is refused."""
    from metasft.checkpoint.exports import AdapterCheckpoint, attach_adapter

    fields = {k: checkpoint[k] for k in ("adapter_config", "base_model", "adaptation", "step")}
    loaded = AdapterCheckpoint(tensors=checkpoint["lora"], **fields)
    other = AutoModelForCausalLM.from_pretrained(build_tiny_model(tmp_path / "other", seed=7), dtype=torch.float32)
    model = attach_adapter(other, loaded)
    placed = {n.replace(".default", ""): p for n, p in model.named_parameters() if "lora_" in n}
    assert all(torch.equal(placed[name], tensor) for name, tensor in checkpoint["lora"].items())

    wide = build_tiny_model(tmp_path / "wide", hidden_size=48, intermediate_size=96)
    with pytest.raises(ValueError, match="does not fit"):
        attach_adapter(AutoModelForCausalLM.from_pretrained(wide), loaded)
