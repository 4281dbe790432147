"""META-LORA's inner step: all tasks in one pass against one task at a time."""

from __future__ import annotations

import gc
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.arms import (
    PLAIN_TEMPLATE,
    WORKLOADS,
    Settings,
    TrainerArm,
    build_trainer,
    compare_gradients,
    interleave,
    process_group,
    ratio,
    set_adapters,
    spread,
    write_tasks,
)
from benchmarks.sections.common import RANK, SEQUENTIAL, TOGETHER, inner_lr, model_shape, progress

TASKS = {"cpu": (1, 2, 4, 8, 16), "cuda": (1, 2, 4, 8, 16, 32, 64)}


def cells(settings: Settings) -> list[tuple[int, int]]:
    """(tasks, tokens per task and inner step) of the inner-step section, the cheap ones first."""
    if settings.quick:
        return [(2, tokens) for tokens in settings.token_counts or (16, 64)]
    grid = [(tasks, tokens) for tokens in (16, 64, 256, 1024) for tasks in TASKS[settings.device]]
    chosen = [
        (tasks, tokens)
        for tasks, tokens in (*grid, (4, 32))
        if tasks * tokens <= settings.largest_cell and tokens in (settings.token_counts or WORKLOADS)
    ]
    return sorted(chosen, key=lambda cell: cell[0] * cell[1])


def measure(settings: Settings) -> dict[str, Any]:
    """META-LORA's inner step, all tasks in one pass and one task at a time, at fixed numbers of tokens."""
    from transformers import AutoTokenizer

    from metasft.plan.flops import step_flops

    tokenizer = AutoTokenizer.from_pretrained(settings.model, trust_remote_code=False)
    shape = model_shape(settings)
    measured = []
    with tempfile.TemporaryDirectory() as name, process_group():
        folder = Path(name)
        chosen = cells(settings)
        most = max((tasks for tasks, _ in chosen), default=0)
        for tasks, tokens in progress(chosen, "inner step"):
            load = WORKLOADS[tokens]
            data = folder / str(tokens)
            if not data.exists():
                write_tasks(data, tokenizer, load, most, support=12, query=2, seed=settings.seed)
            # Small cells take several steps, so that a timed run is long against what surrounds it.
            steps = max(1, min(8, 1024 // (tasks * tokens)))
            arms = {}
            for arm, overrides in {"batched": TOGETHER, **SEQUENTIAL}.items():
                trainer = build_trainer(
                    "meta_lora",
                    settings,
                    folder / "run",
                    [
                        f"meta.task_dir={data}",
                        f"meta.tasks=[{','.join(f'task{index:02d}' for index in range(tasks))}]",
                        "meta.support_samples=12",
                        f"meta.num_inner_steps={steps}",
                        f"meta.inner_batch_size={load.examples}",
                        "meta.query_batch_size=1",
                        f"meta.meta_batch_size={tasks}",
                        f"model.lora_rank={RANK}",
                        inner_lr(settings, arm),
                        *overrides,
                    ],
                    chat_template=PLAIN_TEMPLATE,
                )
                arms[arm] = TrainerArm(trainer)
                set_adapters(arms[arm].parameters, settings.seed)
            gradients = {arm: arms[arm].check_step() for arm in arms}
            checks = [
                compare_gradients(("batched", arm), gradients["batched"], gradients[arm], settings.dtype)
                for arm in SEQUENTIAL
            ]
            _check_tokens(arms["batched"], load, steps)
            samples = interleave({a: arms[a].run for a in arms}, settings.repeats, settings.cell_seconds)
            seconds = {arm: [s["inner_seconds"] / steps for s in samples[arm]] for arm in arms}
            faster = min(SEQUENTIAL, key=lambda arm: statistics.median(seconds[arm]))
            flops = step_flops(shape, [load.length] * load.examples, load.examples * load.response, lora_rank=RANK)
            measured.append(
                {
                    "tasks": tasks,
                    "tokens": tokens,
                    "examples": load.examples,
                    "length": load.length,
                    "response": load.response,
                    "inner_steps_per_run": steps,
                    "seconds": {arm: spread(values) for arm, values in seconds.items()},
                    "tokens_per_second": {
                        arm: tasks * tokens / statistics.median(values) for arm, values in seconds.items()
                    },
                    "ratio": {arm: ratio(seconds[arm], seconds["batched"]) for arm in SEQUENTIAL},
                    "faster_sequential": faster,
                    "gradient_checks": checks,
                    "flops_per_token": flops.total / load.tokens,
                }
            )
            del arms, trainer, gradients
            gc.collect()
    return {"rank": RANK, "cells": measured}


def _check_tokens(arm: TrainerArm, load: Any, steps: int) -> None:
    for episode in arm.episodes:
        examples = arm.trainer.support_sets[episode.task]
        counts = [examples.tokens(batch) for batch in episode.support_batches]
        assert counts == [load.tokens] * steps, counts
