"""The few-shot grid: cells together against one at a time."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.arms import ArmsDiffer, Settings, interleave, ratio, spread
from benchmarks.sections.common import INNER_LR, column
from metasft.data.command import main as prepare
from metasft.data.unseen_tasks import describe_tasks, tasks_of
from metasft.evaluation.evaluate import evaluate
from metasft.evaluation.protocol import EvaluationConfig

NEW_TOKENS = 48
"""As the suite does; the longest response of a validation task has 13 tokens."""


def measure(settings: Settings) -> dict[str, Any]:
    """The few-shot grid of the validation tasks of `rules` (16 tasks x 4 shot counts x 3 shot sets), cells in shared
    passes against one cell at a time.

    One at a time in two ways: padded batches and transformers' ``generate``, as one would write it and as models run
    whose attention does not pack; and the packed code, restricted to one cell.
    """
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            assert prepare(["--suite", "rules", "--output-dir", folder]) == 0
        return _measure(settings, Path(folder))


def _measure(settings: Settings, data_dir: Path) -> dict[str, Any]:
    tasks = tasks_of(data_dir, "valid", describe_tasks(data_dir))[: 2 if settings.quick else None]
    shots, runs = ((0, 2), 2) if settings.quick else ((0, 5, 10, 25), 3)
    limit = 2 if settings.quick else settings.test_items

    def grid(
        cells_per_batch: int | None, tasks: Sequence[str] = tasks, limit: int = limit, *, packed: bool = True
    ) -> dict[str, Any]:
        unpacked = patch("metasft.adapt.adaptable_model.why_not_packed", lambda *_: "padded for the comparison")
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.nullcontext() if packed else unpacked,
        ):
            config = EvaluationConfig(
                model_path=settings.model,
                model_type="base",
                output_dir=Path(folder) / "out",
                data_dir=data_dir,
                split="valid",
                eval_tasks=tuple(tasks),
                n_shots=shots,
                n_runs=runs,
                limit=limit,
                max_new_tokens=NEW_TOKENS,
                adaptation_optimizer="sgd",
                adaptation_lr=INNER_LR,
                device=settings.device,
                dtype={"fp32": "float32", "bf16": "bfloat16"}[settings.dtype],
                cells_per_batch=cells_per_batch,
            )
            started = time.perf_counter()
            results, _ = evaluate(config)
            return {"seconds": time.perf_counter() - started, "results": results}

    grid(None, tasks[:1], 1)  # warm-up: imports, and the file cache of the weights
    arms = {
        "padded": lambda: grid(1, packed=False),
        "one_cell": lambda: grid(1),
        "batched": lambda: grid(None),
    }
    samples = interleave(arms, settings.repeats // 3, least=1)  # a grid is long enough to be its own average
    loss = {
        arm: [entry["loss_mean"] for task in s[0]["results"].values() for entry in task.values()]
        for arm, s in samples.items()
    }
    difference = max(
        abs(a - b) for arm in ("padded", "one_cell") for a, b in zip(loss[arm], loss["batched"], strict=True)
    )
    if settings.dtype == "fp32" and not difference < 1e-3:
        raise ArmsDiffer(f"the grid's losses differ by {difference:.1e} nats between one cell and cells together")
    seconds = {arm: column(s, "seconds") for arm, s in samples.items()}
    return {
        "tasks": len(tasks),
        "shots": list(shots),
        "runs": runs,
        "test_items": limit,
        "max_new_tokens": NEW_TOKENS,
        "seconds": {arm: spread(values) for arm, values in seconds.items()},
        "ratio": {arm: ratio(seconds[arm], seconds["batched"]) for arm in ("padded", "one_cell")},
        "largest_loss_difference": difference,
    }
