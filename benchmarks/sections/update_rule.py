"""What the settings of META-LORA's update rule cost, over the plain rule; and order 2 against the number of steps."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.arms import Settings, TrainerArm, build_trainer, interleave, process_group, ratio, spread
from benchmarks.sections.common import RANK, TOGETHER, column, progress, sample_counts, support_samples
from benchmarks.sections.worker_process import run_worker

PLAIN = "plain"
RULES: dict[str, list[str]] = {
    PLAIN: [],
    "meta.trajectory_weight=null": ["meta.trajectory_weight=null"],
    "meta.learned_inner_lr=per_tensor": ["meta.learned_inner_lr=per_tensor", "meta.inner_lr_meta_lr=0.01"],
    "meta.learned_inner_lr=per_tensor_per_step": [
        "meta.learned_inner_lr=per_tensor_per_step",
        "meta.inner_lr_meta_lr=0.01",
    ],
    "meta.inner_scope=lora_b": ["meta.inner_scope=lora_b"],
    "meta.order=2, meta.second_order_steps=2": ["meta.order=2", "meta.second_order_steps=2"],
    "meta.order=2": ["meta.order=2"],
}
INSIDE = ["meta.inner_optimizer=adamw", "meta.inner_lr=1e-4", *TOGETHER]
STEPS = (1, 2, 5, 10)


def measure(settings: Settings) -> dict[str, Any]:
    """Seconds of a meta-step and peak memory of each rule over the plain one; seconds of both orders for more steps."""
    tasks, steps, batch = (2, 2, 4) if settings.quick else (4, 5, 4)
    counts = [] if settings.quick else list(STEPS)
    rules = {name: RULES[name] for name in (PLAIN, "meta.order=2")} if settings.quick else RULES
    shared = {"tasks": tasks, "inner_steps": steps, "batch": batch, "support_samples": support_samples(settings)}
    # First, while this process is small: it keeps what it has once used.
    peaks = {}
    for name, overrides in progress(list(rules.items()), "memory"):
        arm = {"method": "meta_lora", "dtype": settings.dtype, "overrides": [*INSIDE, *overrides]}
        peaks[name] = run_worker("memory", settings, {**shared, "arm": arm})["peak_bytes"]
    with tempfile.TemporaryDirectory() as folder, process_group():

        def build(num_tasks: int, num_steps: int, overrides: Sequence[str]) -> TrainerArm:
            trainer = build_trainer(
                "meta_lora",
                settings,
                Path(folder),
                [
                    f"meta.num_inner_steps={num_steps}",
                    f"meta.inner_batch_size={batch}",
                    f"meta.query_batch_size={batch}",
                    f"meta.meta_batch_size={num_tasks}",
                    *sample_counts(settings),
                    f"model.lora_rank={RANK}",
                    *INSIDE,
                    *overrides,
                ],
            )
            arm = TrainerArm(trainer)
            arm.run()  # warm-up
            return arm

        # A pair at a time: all arms at once, with the graph of order 2, need 20 GB.
        seconds: dict[str, dict[str, list[float]]] = {}
        for name in progress([name for name in rules if name != PLAIN], "rules"):
            pair = {arm: build(tasks, steps, rules[arm]) for arm in (PLAIN, name)}
            found = interleave({n: arm.run for n, arm in pair.items()}, settings.repeats, settings.cell_seconds)
            # Not tokens: order 2 passes through the support batches again.
            assert pair[name].episodes == pair[PLAIN].episodes, "the arms saw different examples"
            seconds[name] = {arm: column(values, "seconds") for arm, values in found.items()}
            del pair
            gc.collect()
        of_steps: dict[str, dict[str, Any]] = {}
        for count in progress(counts, "inner steps"):
            pair = {order: build(1, count, [f"meta.order={order}"]) for order in ("1", "2")}
            found = interleave({n: arm.run for n, arm in pair.items()}, settings.repeats, settings.cell_seconds)
            of_steps[str(count)] = {order: spread(column(values, "seconds")) for order, values in found.items()}
            del pair
            gc.collect()
    return {
        **shared,
        "seconds": {
            PLAIN: spread([value for found in seconds.values() for value in found[PLAIN]]),
            **{name: spread(found[name]) for name, found in seconds.items()},
        },
        "ratio": {name: ratio(found[name], found[PLAIN]) for name, found in seconds.items()},
        "peak_bytes": peaks,
        "of_steps": of_steps,
    }
