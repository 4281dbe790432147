"""The few-shot grid: cells together against one at a time."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.arms import ArmsDiffer, Settings, interleave, ratio, spread
from benchmarks.sections.common import INNER_LR, NotMeasured, column


def measure(settings: Settings) -> dict[str, Any]:
    """The few-shot grid (2 tasks x 5 shot counts x 3 runs), cells in shared passes against one cell at a time.

    One at a time in two ways: padded batches and transformers' ``generate``, as one would write it and as models run
    whose attention does not pack; and the packed code, restricted to one cell.
    """
    import contextlib
    import io
    import time
    from unittest.mock import patch

    from metasft.evaluation.evaluate import evaluate
    from metasft.evaluation.protocol import EvaluationConfig

    data_dir = Path(settings.task_dir).parent
    if not (data_dir / "meta_test").is_dir():
        raise NotMeasured(f"{data_dir} has no meta_test folder with unseen tasks")
    shots, runs = ((0, 2), 2) if settings.quick else ((0, 5, 10, 25, 50), 3)
    limit, new_tokens = (2, 2) if settings.quick else (settings.test_items, 16)

    def grid(
        cells_per_batch: int | None, n_shots: tuple[int, ...], limit: int, *, packed: bool = True
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
                n_shots=n_shots,
                n_runs=runs,
                limit=limit,
                max_new_tokens=new_tokens,
                adaptation_optimizer="sgd",
                adaptation_lr=INNER_LR,
                device=settings.device,
                dtype={"fp32": "float32", "bf16": "bfloat16"}[settings.dtype],
                cells_per_batch=cells_per_batch,
            )
            started = time.perf_counter()
            results, _ = evaluate(config)
            return {"seconds": time.perf_counter() - started, "results": results}

    grid(None, (0, 2), 1)  # warm-up: imports, and the file cache of the weights
    arms = {
        "padded": lambda: grid(1, shots, limit, packed=False),
        "one_cell": lambda: grid(1, shots, limit),
        "batched": lambda: grid(None, shots, limit),
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
        "shots": list(shots),
        "runs": runs,
        "test_items": limit,
        "max_new_tokens": new_tokens,
        "seconds": {arm: spread(values) for arm, values in seconds.items()},
        "ratio": {arm: ratio(seconds[arm], seconds["batched"]) for arm in ("padded", "one_cell")},
        "largest_loss_difference": difference,
    }
