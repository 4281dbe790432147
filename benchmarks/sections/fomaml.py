"""META-LORA's meta-step against FOMAML's."""

from __future__ import annotations

import gc
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.arms import (
    Settings,
    TrainerArm,
    build_trainer,
    compare_gradients,
    interleave,
    process_group,
    ratio,
    set_adapters,
    spread,
)
from benchmarks.sections.common import (
    INNER_LR,
    RANK,
    SEQUENTIAL,
    TOGETHER,
    column,
    flops_per_token,
    inner_lr,
    model_shape,
    progress,
    sample_counts,
    tokenized_batches,
)

FULL_PASS = {"meta_lora": 100, "fomaml": 300}
"""Support examples per task of one pass, as in the shipped configurations."""

INNER_RATES = {"sgd": {"meta_lora": INNER_LR, "fomaml": 1e-3}, "adamw": {"meta_lora": 1e-3, "fomaml": 1e-4}}


def measure(settings: Settings) -> dict[str, Any]:
    """META-LORA's meta-step against FOMAML's, and the factors between them, each measured by itself."""
    tasks, steps, batch = (2, 2, 4) if settings.quick else (4, 5, 4)
    shape = model_shape(settings)
    phases: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, process_group():
        for optimizer in progress(list(INNER_RATES), "FOMAML"):

            def build(method: str, arm: str, num_steps: int, *extra: str, inner: str = optimizer) -> TrainerArm:
                trainer = build_trainer(
                    method,
                    settings,
                    Path(folder),
                    [
                        f"meta.num_inner_steps={num_steps}",
                        f"meta.inner_batch_size={batch}",
                        f"meta.query_batch_size={batch}",
                        f"meta.meta_batch_size={tasks}",
                        *sample_counts(settings),
                        f"meta.inner_optimizer={inner}",
                        inner_lr(settings, arm, INNER_RATES[inner][method]),
                        *([f"model.lora_rank={RANK}"] if method == "meta_lora" else []),
                        *extra,
                    ],
                )
                return TrainerArm(trainer, detail=True)

            arms = {
                "batched": build("meta_lora", "batched", steps, *TOGETHER),
                "one_at_a_time": build("meta_lora", "one_at_a_time", steps, *SEQUENTIAL["one_at_a_time"]),
                "fomaml": build("fomaml", "fomaml", steps),
            }
            for arm in ("batched", "one_at_a_time"):
                set_adapters(arms[arm].parameters, settings.seed)
            gradients = {arm: arms[arm].check_step() for arm in ("batched", "one_at_a_time")}
            arms["fomaml"].run()  # warm-up
            # Adam's first steps are the sign of the gradient: a difference at rounding level may change them wholly.
            checks = (
                [compare_gradients(tuple(gradients), *gradients.values(), settings.dtype)] if optimizer == "sgd" else []
            )
            gradients.clear()
            trained = {arm: sum(p.numel() for p in arms[arm].parameters.values()) for arm in arms}
            samples = interleave({a: arms[a].run for a in arms}, settings.repeats, 4 * settings.cell_seconds)
            assert len({tuple(column(samples[arm], "tokens")) for arm in arms}) == 1, "the arms saw different examples"
            phases[optimizer] = {
                "samples": samples,
                "trained_parameters": trained,
                "gradient_checks": checks,
                "flops_per_token": {
                    "meta_lora": flops_per_token(shape, tokenized_batches(arms["fomaml"]), lora_rank=RANK),
                    "fomaml": flops_per_token(shape, tokenized_batches(arms["fomaml"]), lora_rank=None),
                },
            }
            del arms
            gc.collect()
            if settings.full_pass and optimizer == "adamw":
                phases[optimizer]["full_pass"] = {}
                for method, examples in FULL_PASS.items():
                    arm = build(method, method, examples // batch if not settings.quick else 3)
                    phases[optimizer]["full_pass"][method] = arm.run()["seconds"]
                    del arm
                    gc.collect()
    other = {"sgd": "adamw", "adamw": "sgd"}
    return {
        "tasks": tasks,
        "inner_steps": steps,
        "examples": batch,
        "full_pass_samples": FULL_PASS,
        "inner_optimizers": {
            optimizer: _against_fomaml(phase, phases[other[optimizer]], steps, batch)
            for optimizer, phase in phases.items()
        },
    }


def _against_fomaml(phase: dict[str, Any], other: dict[str, Any], steps: int, batch: int) -> dict[str, Any]:
    """Totals and factors for one inner optimizer; ``other`` is the same comparison run with the other one."""
    samples = phase["samples"]
    seconds = {arm: column(samples[arm], "seconds") for arm in samples}

    def at(arm: str, examples: int) -> list[float]:
        """Seconds with one pass over ``examples``: the measured meta-step plus further inner steps at their measured
        time."""
        more = examples // batch - steps
        return [s["seconds"] + more * s["inner_seconds"] / steps for s in samples[arm]]

    def share_of_passes(arm: str, examples: int) -> float:
        """Forward and backward in the seconds of a meta-step with ``examples`` support examples."""
        passes = [s["forward_backward_seconds"] for s in samples[arm]]
        scale = (examples / batch + 1) / (steps + 1)
        return statistics.median(p * scale / s for p, s in zip(passes, at(arm, examples), strict=True))

    def passes_per_token(source: dict[str, Any], arm: str) -> list[float]:
        return [s["forward_backward_seconds"] / s["tokens"] for s in source["samples"][arm]]

    few, many = FULL_PASS["meta_lora"], FULL_PASS["fomaml"]
    total = ratio(at("fomaml", many), at("batched", few))
    flops = phase["flops_per_token"]
    factors = {
        "samples": ratio(at("fomaml", many), at("fomaml", few))["median"],
        "optimizer_traffic": share_of_passes("one_at_a_time", few) / share_of_passes("fomaml", few),
        # From the runs with the other inner optimizer: the same passes, measured at another time.
        "flops": ratio(passes_per_token(other, "fomaml"), passes_per_token(other, "one_at_a_time"))["median"],
        "batching": ratio(at("one_at_a_time", few), at("batched", few))["median"],
        "communication": 1.0,  # one process; measured by the section two_processes
    }
    product = 1.0
    for factor in factors.values():
        product *= factor
    parts = ("forward_backward_seconds", "inner_update_seconds", "outer_step_seconds")
    result = {
        "seconds": {arm: spread(values) for arm, values in seconds.items()},
        "parts": {arm: {part: statistics.median(column(samples[arm], part)) for part in parts} for arm in samples},
        "tokens": statistics.median(column(samples["fomaml"], "tokens")),
        "equal_samples": ratio(seconds["fomaml"], seconds["batched"]),
        "equal_samples_one_at_a_time": ratio(seconds["fomaml"], seconds["one_at_a_time"]),
        "equal_full_pass": ratio(at("fomaml", few), at("batched", few)),
        "full_pass": total,
        "factors": factors,
        "flops_factor_counted": flops["fomaml"] / flops["meta_lora"],
        "product": product,
        "residual": total["median"] / product,
        "flops_per_token": flops,
        "trained_parameters": phase["trained_parameters"],
        "gradient_checks": phase["gradient_checks"],
    }
    if "full_pass" in phase:
        timed = phase["full_pass"]
        result["full_pass_timed"] = {**timed, "ratio": timed["fomaml"] / timed["meta_lora"]}
    return result
