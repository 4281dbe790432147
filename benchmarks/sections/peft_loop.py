"""META-LORA's meta-step against a loop over tasks with transformers and peft."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.arms import (
    GRADIENT_TOLERANCE,
    SOFTMAX_TOLERANCE,
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
    sample_counts,
    tokenized_batches,
)


def measure(settings: Settings) -> dict[str, Any]:
    """A whole META-LORA meta-step on the project's tasks, against a loop over tasks with transformers and peft."""
    import torch

    from benchmarks.peft_loop import PeftLoop
    from metasft.data.episodes import EpisodeSampler

    tasks, steps = (2, 2) if settings.quick else (4, 5)
    batch = 4
    overrides = [
        f"meta.num_inner_steps={steps}",
        f"meta.inner_batch_size={batch}",
        f"meta.query_batch_size={batch}",
        f"meta.meta_batch_size={tasks}",
        *sample_counts(settings),
        f"model.lora_rank={RANK}",
    ]
    with tempfile.TemporaryDirectory() as folder, process_group():
        runs: dict[str, Callable[[], dict[str, float]]] = {}
        arms = {}
        for arm, extra in {"batched": TOGETHER, "one_at_a_time": SEQUENTIAL["one_at_a_time"]}.items():
            trainer = build_trainer("meta_lora", settings, Path(folder), [*overrides, inner_lr(settings, arm), *extra])
            arms[arm] = TrainerArm(trainer)
            set_adapters(arms[arm].parameters, settings.seed)
            initial = {name: p.detach().clone() for name, p in arms[arm].parameters.items()}
            runs[arm] = arms[arm].run
        gradients = {arm: arms[arm].check_step() for arm in arms}
        files = {t.task: {"support": t.support, "query": t.query} for t in trainer.task_files}
        sizes = {t.task: (t.support_samples, t.query_samples) for t in trainer.task_files}
        config = trainer.config
        checks = [
            compare_gradients(
                ("batched", "one_at_a_time"), gradients["batched"], gradients["one_at_a_time"], settings.dtype
            )
        ]
        # In bf16 a user may or may not use autocast; the faster of the two is the one to beat.
        variants = (
            {"peft_loop": False} if settings.dtype == "fp32" else {"peft_loop": False, "peft_loop_autocast": True}
        )
        for arm, autocast in variants.items():
            loop = PeftLoop(
                settings.model,
                files,
                rank=RANK,
                alpha=config.model.lora_alpha,
                inner_lr=INNER_LR * (1.1 if settings.deviate == arm else 1.0),
                outer_lr=config.optim.lr,
                clip_grad=config.optim.clip_grad,
                dtype=torch.float32 if settings.dtype == "fp32" else torch.bfloat16,
                autocast=autocast,
                device=torch.device(settings.device),
            )
            assert set(initial) == set(loop.parameters), "peft names its adapters differently"
            sampler = EpisodeSampler(
                {task: size[0] for task, size in sizes.items()},
                {task: size[1] for task, size in sizes.items()},
                num_inner_steps=steps,
                inner_batch_size=batch,
                query_batch_size=batch,
                meta_batch_size=tasks,
                seed=settings.seed,
            )
            runs[arm] = _loop_run(loop, sampler)
            episodes = sampler.next_meta_batch()  # those of the trainers' check
            loop.keep_gradient = True
            for exact, label, tolerances in (
                (True, f"{arm}, its loss in fp64", GRADIENT_TOLERANCE),
                (False, f"{arm} as it is timed", SOFTMAX_TOLERANCE),
            ):
                with torch.no_grad():  # the same initial adapter (A is random) as the trainers'
                    for name, parameter in loop.parameters.items():
                        parameter.copy_(initial[name])
                loop.exact_loss = exact
                loop.meta_step(episodes)
                names = ("batched", label)
                checks.append(compare_gradients(names, gradients["batched"], loop.gradient, settings.dtype, tolerances))
            loop.keep_gradient, loop.gradient = False, {}
        measured = interleave(runs, settings.repeats, 4 * settings.cell_seconds)
        batches, shape = tokenized_batches(arms["batched"]), model_shape(settings)
    seconds = {arm: column(measured[arm], "seconds") for arm in runs}
    loops = [arm for arm in runs if arm.startswith("peft_loop")]
    fastest = min(loops, key=lambda arm: statistics.median(seconds[arm]))
    tokens = statistics.median(column(measured["batched"], "tokens"))
    return {
        "tasks": tasks,
        "inner_steps": steps,
        "examples": batch,
        "tokens": tokens,
        "seconds": {arm: spread(values) for arm, values in seconds.items()},
        "tokens_per_second": {arm: tokens / statistics.median(values) for arm, values in seconds.items()},
        "ratio": {arm: ratio(seconds[arm], seconds["batched"]) for arm in runs if arm != "batched"},
        "fastest_loop": fastest,
        "flops_per_token": {
            "batched": flops_per_token(shape, batches, lora_rank=RANK),
            "peft_loop": flops_per_token(shape, batches, lora_rank=RANK, padded=True, all_logits=True),
        },
        "gradient_checks": checks,
    }


def _loop_run(loop: Any, sampler: Any) -> Callable[[], dict[str, float]]:
    import time

    from benchmarks.arms import synchronize

    def run() -> dict[str, float]:
        episodes = sampler.next_meta_batch()
        synchronize()
        started = time.perf_counter()
        loop.meta_step(episodes)
        synchronize()
        return {"seconds": time.perf_counter() - started}

    return run
