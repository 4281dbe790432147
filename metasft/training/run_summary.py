"""``run_summary.json``: what a run cost, measured, the parts before a resume included."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from metasft.backend.devices import get_torch_device
from metasft.checkpoint.exports import size_bytes
from metasft.config.result_files import SUMMARY_FILE
from metasft.files.atomic import write_json
from metasft.training.resume import MetricsLog

if TYPE_CHECKING:
    from metasft.training.trainer import EpisodicSFTTrainer

PACKAGES = ("metasft", "verl", "torch", "transformers", "peft", "numpy")


def peaks_of_ranks() -> list[int]:
    """Peak bytes of memory of every rank since it began to train; called by all of them."""
    peaks: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(peaks, get_torch_device().max_memory_allocated())
    return peaks


def write_summary(
    trainer: EpisodicSFTTrainer,
    checkpoint: Path,
    log: MetricsLog,
    seconds: float,
    peaks: Sequence[int] | None = None,
) -> None:
    """Write the summary of a finished run.

    Args:
        trainer: that has done all its meta-steps.
        checkpoint: the last export.
        log: of all meta-steps.
        seconds: of the whole run, loading left out.
        peaks: from :func:`peaks_of_ranks`; None where this start has trained nothing.
    """
    from importlib.metadata import version

    costs = log.costs
    on_cpu = trainer.device_name == "cpu"
    group = trainer.engine.get_data_parallel_size()
    peak = max([get_torch_device().max_memory_allocated(), *(cost.peak_bytes for cost in costs)])
    if peaks is None:
        model_peak = None if group > 1 else peak
    else:
        model_peak = max(peak, *(sum(peaks[first : first + group]) for first in range(0, len(peaks), group)))
    write_json(
        trainer.run_dir / SUMMARY_FILE,
        {
            "method": trainer.method,
            "base_model": trainer.config.model.path,
            "lora_rank": trainer.config.model.lora_rank,
            "tasks": [task.task for task in trainer.task_files],
            "support_samples": trainer.meta.support_samples,
            "query_samples": max(task.query_samples for task in trainer.task_files),
            # Support and query examples: of the task with the most, and of all tasks.
            "labelled_examples_per_task": max(task.labelled for task in trainer.task_files),
            "labelled_examples": sum(task.labelled for task in trainer.task_files),
            "world_size": dist.get_world_size(),
            "task_group_size": group,
            "device_name": _device_name(on_cpu),
            "meta_steps": trainer.total_training_steps,
            "skipped_meta_steps": trainer.skipped_steps,
            "diverged": {found.metric: round(found.factor, 2) for found in log.divergence.found},
            "best_step": log.best and log.best.step,
            "best_valid_loss": log.best and log.best.loss,
            "tokens": sum(cost.tokens for cost in costs),
            "seconds_total": seconds,
            "seconds_per_step_median": statistics.median(cost.seconds for cost in costs) if costs else None,
            # Of this process, and of all processes that hold one copy of the model together.
            "peak_memory_bytes": peak,
            "model_memory_bytes": model_peak,
            "peak_memory_kind": "rss" if on_cpu else "device",
            "checkpoint": checkpoint.name,
            "checkpoint_bytes": size_bytes(checkpoint),
            "versions": {name: version(name) for name in PACKAGES},
            "seed": trainer.config.trainer.seed,
        },
    )


def _device_name(on_cpu: bool) -> str:
    if not on_cpu:
        return get_torch_device().get_device_name()
    import platform

    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            names = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
    except OSError:
        names = []
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads per process"
