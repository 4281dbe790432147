"""One process against two."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.arms import Settings, ratio, spread
from benchmarks.sections.common import NotMeasured, progress, support_samples
from benchmarks.sections.worker_process import run_worker


def measure(settings: Settings) -> dict[str, Any]:
    """META-LORA with a task group per process: one process against two, and the one all-reduce of a meta-step."""
    import torch

    if settings.device == "cuda" and torch.cuda.device_count() < 2:
        raise NotMeasured(f"two processes need two GPUs, {torch.cuda.device_count()} is here")
    rounds = 1 if settings.quick else 3
    tasks, steps, batch = (2, 1, 4) if settings.quick else (4, 5, 4)
    job = {
        "tasks": tasks,
        "inner_steps": steps,
        "batch": batch,
        "support_samples": support_samples(settings),
        "repeats": max(2, settings.repeats // 2),
    }
    results: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for number in progress(range(rounds), "two processes"):
        for processes in (1, 2) if number % 2 == 0 else (2, 1):
            results[processes].append(run_worker("data_parallel", settings, job, processes=processes))
    seconds = {n: [statistics.median(result["seconds"]) for result in results[n]] for n in results}
    pair = results[2][-1]
    median = statistics.median(seconds[2])
    return {
        **job,
        "rounds": rounds,
        "seconds": {str(n): spread(values) for n, values in seconds.items()},
        "tasks_per_second": {str(n): tasks / statistics.median(values) for n, values in seconds.items()},
        "ratio": ratio(seconds[1], seconds[2]),
        "all_reduce": {
            arm: {**values, "share_of_meta_step": values["seconds"] / median}
            for arm, values in pair["all_reduce"].items()
        },
    }
