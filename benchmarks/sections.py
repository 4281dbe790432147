"""The sections of the benchmark. Each runs in a process of its own and returns plain JSON data.

    python -m benchmarks.sections NAME SETTINGS.json OUT.json

``benchmarks/bench.py`` calls this, with the threads fixed in the environment. Exit code 3: arms that should do the same
work computed different things; 2: a setting or file is unusable. One line on stderr says which.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.arms import (
    GRADIENT_TOLERANCE,
    PLAIN_TEMPLATE,
    ROOT,
    SOFTMAX_TOLERANCE,
    WORKLOADS,
    ArmsDiffer,
    Settings,
    TrainerArm,
    build_trainer,
    compare_gradients,
    interleave,
    precision,
    process_group,
    ratio,
    set_adapters,
    spread,
    write_tasks,
)

RANK = 16
INNER_LR = 0.005
"""A tenth of the shipped rate, which costs the same time: what two arms round differently grows with every inner step,
and at the shipped rate 8 steps on random words make 4e-5 of it."""

TOGETHER = ["meta.task_batch_limit=16"]
"""All tasks of a meta-batch in one pass, whatever their size: left to itself, a CPU takes large ones alone."""

SEQUENTIAL = {"one_at_a_time": ["meta.task_batch_limit=1"], "peft_layers": ["meta.task_batching=false"]}
"""The two ways to adapt one task after the other: through the fused adapters, and through PEFT's own layers."""


class NotMeasured(Exception):
    """This section cannot be measured here; the message says why."""


def _inner_lr(settings: Settings, arm: str, lr: float = INNER_LR) -> str:
    return f"meta.inner_lr={lr * 1.1 if settings.deviate == arm else lr}"


def _shape(settings: Settings) -> Any:
    from transformers import AutoConfig

    from benchmarks.flops import ModelShape

    return ModelShape.from_config(AutoConfig.from_pretrained(settings.model, trust_remote_code=False))


def _progress(items: Sequence[Any], name: str) -> Any:
    from tqdm import tqdm

    return tqdm(items, desc=name, unit="comparison")


def _column(samples: Sequence[dict[str, float]], key: str) -> list[float]:
    return [sample[key] for sample in samples]


# -------------------------------------------------------------------------------------------- sequential and batched


def cells(quick: bool, largest: int) -> list[tuple[int, int]]:
    """(tasks, tokens per task and inner step) of the inner-step section, the cheap ones first."""
    if quick:
        return [(2, 16), (2, 64)]
    grid = [(tasks, tokens) for tokens in (16, 64, 256, 1024) for tasks in (1, 2, 4, 8, 16)]
    chosen = [(tasks, tokens) for tasks, tokens in (*grid, (4, 32)) if tasks * tokens <= largest]
    return sorted(chosen, key=lambda cell: cell[0] * cell[1])


def inner_step(settings: Settings) -> dict[str, Any]:
    """META-LORA's inner step, all tasks in one pass and one task at a time, at fixed numbers of tokens."""
    from transformers import AutoTokenizer

    from benchmarks.flops import step_flops

    tokenizer = AutoTokenizer.from_pretrained(settings.model, trust_remote_code=False)
    shape = _shape(settings)
    measured = []
    with tempfile.TemporaryDirectory() as name, process_group():
        folder = Path(name)
        for tasks, tokens in _progress(cells(settings.quick, settings.largest_cell), "inner step"):
            load = WORKLOADS[tokens]
            data = folder / str(tokens)
            if not data.exists():
                write_tasks(data, tokenizer, load, 16, support=12, query=2, seed=settings.seed)
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
                        _inner_lr(settings, arm),
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


def _batches(arm: TrainerArm, *, query: bool = True) -> list[list[Any]]:
    """The tokenised batches of the arm's last meta-step."""
    result = []
    for episode in arm.episodes:
        support = arm.trainer.support_sets[episode.task]
        result += [support.batch(indices) for indices in episode.support_batches]
        if query:
            result.append(arm.trainer.query_sets[episode.task].batch(episode.query_batch))
    return result


def _flops_per_token(
    shape: Any,
    batches: Sequence[Sequence[Any]],
    *,
    lora_rank: int | None,
    padded: bool = False,
    all_logits: bool = False,
) -> float:
    """Operations of one forward and backward over ``batches``, per token of theirs that is no padding."""
    from benchmarks.flops import step_flops

    total = tokens = 0
    for examples in batches:
        lengths = [len(example["input_ids"]) for example in examples]
        tokens += sum(lengths)
        computed = [max(lengths)] * len(lengths) if padded else lengths
        outputs = sum(int(example["loss_mask"].sum()) for example in examples)
        total += step_flops(shape, computed, sum(computed) if all_logits else outputs, lora_rank=lora_rank).total
    return total / tokens


# ----------------------------------------------------------------------------------- against transformers and peft


def peft_loop(settings: Settings) -> dict[str, Any]:
    """A whole META-LORA meta-step on the project's tasks, against a loop over tasks with transformers and peft."""
    import torch

    from benchmarks.peft_loop import PeftLoop
    from metasft.episodes import EpisodeSampler

    tasks, steps = (2, 2) if settings.quick else (4, 5)
    batch = 4
    overrides = [
        f"meta.num_inner_steps={steps}",
        f"meta.inner_batch_size={batch}",
        f"meta.query_batch_size={batch}",
        f"meta.meta_batch_size={tasks}",
        *_samples(settings),
        f"model.lora_rank={RANK}",
    ]
    with tempfile.TemporaryDirectory() as folder, process_group():
        runs: dict[str, Callable[[], dict[str, float]]] = {}
        arms = {}
        for arm, extra in {"batched": TOGETHER, "one_at_a_time": SEQUENTIAL["one_at_a_time"]}.items():
            trainer = build_trainer("meta_lora", settings, Path(folder), [*overrides, _inner_lr(settings, arm), *extra])
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
        batches, shape = _batches(arms["batched"]), _shape(settings)
    seconds = {arm: _column(measured[arm], "seconds") for arm in runs}
    loops = [arm for arm in runs if arm.startswith("peft_loop")]
    fastest = min(loops, key=lambda arm: statistics.median(seconds[arm]))
    tokens = statistics.median(_column(measured["batched"], "tokens"))
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
            "batched": _flops_per_token(shape, batches, lora_rank=RANK),
            "peft_loop": _flops_per_token(shape, batches, lora_rank=RANK, padded=True, all_logits=True),
        },
        "gradient_checks": checks,
    }


def _samples(settings: Settings) -> list[str]:
    """Overrides: examples per task. A small query set tokenises faster; how large it is has no part in a step."""
    return [f"meta.support_samples={_support_samples(settings)}", "meta.query_samples=12"]


def _support_samples(settings: Settings) -> int:
    return 16 if settings.quick else 100


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


# --------------------------------------------------------------------------------------------- against veRL's LoRA SFT


def verl_sft(settings: Settings) -> dict[str, Any]:
    """META-LORA's inner step against one step of veRL's own SFT trainer, unchanged, on the same examples."""
    import time

    from benchmarks.arms import synchronize

    tasks, steps, batch = (2, 2, 4) if settings.quick else (4, 5, 4)
    overrides = [
        f"meta.num_inner_steps={steps}",
        f"meta.inner_batch_size={batch}",
        "meta.query_batch_size=1",
        f"meta.meta_batch_size={tasks}",
        *_samples(settings),
        f"model.lora_rank={RANK}",
    ]
    with tempfile.TemporaryDirectory() as folder, process_group():
        arms, runs = {}, {}
        for arm, extra in {"batched": TOGETHER, "one_at_a_time": SEQUENTIAL["one_at_a_time"]}.items():
            trainer = build_trainer("meta_lora", settings, Path(folder), [*overrides, _inner_lr(settings, arm), *extra])
            arms[arm] = TrainerArm(trainer)
            set_adapters(arms[arm].parameters, settings.seed)
            runs[arm] = _inner_loop_run(arms[arm])
        gradients = {arm: arms[arm].check_step() for arm in arms}
        checks = [compare_gradients(tuple(arms), *gradients.values(), settings.dtype)]
        support = {t.task: t.support for t in trainer.task_files}
        plain = build_verl_sft(settings, list(support.values()), batch, Path(folder))
        step = verl_sft_step(plain, batch)
        sampler = build_sampler_like(arms["batched"])

        def sft() -> dict[str, float]:
            batches = [
                arms["batched"].trainer.support_sets[episode.task].batch(indices)
                for episode in sampler.next_meta_batch()
                for indices in episode.support_batches
            ]
            synchronize()
            started = time.perf_counter()
            for examples in batches:
                step(examples)
            synchronize()
            return {
                "seconds": time.perf_counter() - started,
                "tokens": sum(len(example["input_ids"]) for examples in batches for example in examples),
            }

        runs["verl_sft"] = sft
        sft()  # warm-up, on the examples of the gradient check
        measured = interleave(runs, settings.repeats, 4 * settings.cell_seconds)
        batches, shape = _batches(arms["batched"], query=False), _shape(settings)
    tokens = {arm: _column(samples, "tokens") for arm, samples in measured.items()}
    assert tokens["batched"] == tokens["one_at_a_time"] == tokens["verl_sft"], "the arms saw different examples"
    per_token = {arm: [s["seconds"] / s["tokens"] for s in samples] for arm, samples in measured.items()}
    return {
        "tasks": tasks,
        "examples": batch,
        "steps_per_run": tasks * steps,
        "tokens_per_step": statistics.median(tokens["verl_sft"]) / (tasks * steps),
        "microseconds_per_token": {arm: spread([1e6 * v for v in values]) for arm, values in per_token.items()},
        "tokens_per_second": {arm: 1 / statistics.median(values) for arm, values in per_token.items()},
        "ratio": {arm: ratio(per_token["verl_sft"], per_token[arm]) for arm in arms},
        "flops_per_token": {
            "batched": _flops_per_token(shape, batches, lora_rank=RANK),
            "verl_sft": _flops_per_token(shape, batches, lora_rank=RANK, all_logits=True),
        },
        "gradient_checks": checks,
    }


def _inner_loop_run(arm: TrainerArm) -> Callable[[], dict[str, float]]:
    """A meta-step of which the inner steps alone count."""

    def run() -> dict[str, float]:
        seconds = arm.run()["inner_seconds"]
        sets = arm.trainer.support_sets
        tokens = sum(sets[e.task].tokens(batch) for e in arm.episodes for batch in e.support_batches)
        return {"seconds": seconds, "tokens": tokens}

    return run


def build_sampler_like(arm: TrainerArm) -> Any:
    """A sampler that draws what the arm's own drew from its first meta-step on."""
    from metasft.episodes import EpisodeSampler

    trainer = arm.trainer
    return EpisodeSampler(
        {task: len(examples) for task, examples in trainer.support_sets.items()},
        {task: len(examples) for task, examples in trainer.query_sets.items()},
        num_inner_steps=trainer.meta.num_inner_steps,
        inner_batch_size=trainer.meta.inner_batch_size,
        query_batch_size=trainer.meta.query_batch_size,
        meta_batch_size=trainer.meta.meta_batch_size,
        seed=trainer.config.trainer.seed,
    )


def build_verl_sft(settings: Settings, files: Sequence[Path], batch: int, folder: Path) -> Any:
    """veRL's own trainer on the shipped baseline configuration, with ``batch`` examples per step."""
    import contextlib
    import io

    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf
    from verl.trainer.sft_trainer import SFTTrainer
    from verl.utils.device import get_device_name

    with initialize_config_dir(str(ROOT / "data"), version_base=None):
        config = compose(
            "baseline_lora_mixed",
            overrides=[
                f"model.path={settings.model}",
                f"model.lora_rank={RANK}",
                f"data.train_files=[{','.join(map(str, files))}]",
                "data.train_max_samples=-1",
                f"data.train_batch_size={batch}",
                f"data.micro_batch_size_per_gpu={batch}",
                f"trainer.default_local_dir={folder / 'verl_sft'}",
                "trainer.resume_mode=disable",
                "trainer.total_training_steps=1000000",
                *precision(settings.dtype, lora=True),
            ],
        )
    OmegaConf.set_struct(config, False)
    config.trainer.device = get_device_name()
    with contextlib.redirect_stdout(io.StringIO()):
        return SFTTrainer(config)


def verl_sft_step(trainer: Any, batch: int) -> Callable[[Sequence[Any]], None]:
    """The body of the loop in veRL's ``SFTTrainer.fit``, for examples that are already drawn."""
    from tensordict.tensorclass import NonTensorData
    from verl.utils import tensordict_utils as tu

    config = trainer.config
    meta_info = {
        "use_remove_padding": config.model.use_remove_padding,
        "use_dynamic_bsz": config.data.use_dynamic_bsz,
        "max_token_len_per_gpu": config.data.max_token_len_per_gpu,
        "micro_batch_size_per_gpu": config.data.micro_batch_size_per_gpu,
        "temperature": 1.0,
        "global_batch_size": batch,
        "pad_mode": config.data.pad_mode,
        "pad_token_id": trainer.model_config.tokenizer.pad_token_id,
        # Nothing is offloaded here; without this, veRL collects garbage twice a step on a CPU, which is not compared.
        "disable_auto_offload": True,
    }

    def step(examples: Sequence[Any]) -> None:
        data = tu.get_tensordict(tensor_dict=trainer.collate_fn(list(examples)), non_tensor_dict=meta_info)
        lengths = NonTensorData(trainer._get_batch_seqlens(data=data))
        tu.assign_non_tensor(data, update_lr_scheduler=True, global_token_num=lengths)
        trainer.training_client.train_batch(data=data)

    return step


# -------------------------------------------------------------------------------------------------- against FOMAML

FULL_PASS = {"meta_lora": 100, "fomaml": 300}
"""Support examples per task of one pass, as in the shipped configurations."""

INNER_RATES = {"sgd": {"meta_lora": INNER_LR, "fomaml": 1e-3}, "adamw": {"meta_lora": 1e-3, "fomaml": 1e-4}}


def fomaml(settings: Settings) -> dict[str, Any]:
    """META-LORA's meta-step against FOMAML's, and the factors between them, each measured by itself."""
    tasks, steps, batch = (2, 2, 4) if settings.quick else (4, 5, 4)
    shape = _shape(settings)
    phases: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, process_group():
        for optimizer in _progress(list(INNER_RATES), "FOMAML"):

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
                        *_samples(settings),
                        f"meta.inner_optimizer={inner}",
                        _inner_lr(settings, arm, INNER_RATES[inner][method]),
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
            assert len({tuple(_column(samples[arm], "tokens")) for arm in arms}) == 1, "the arms saw different examples"
            phases[optimizer] = {
                "samples": samples,
                "trained_parameters": trained,
                "gradient_checks": checks,
                "flops_per_token": {
                    "meta_lora": _flops_per_token(shape, _batches(arms["fomaml"]), lora_rank=RANK),
                    "fomaml": _flops_per_token(shape, _batches(arms["fomaml"]), lora_rank=None),
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
    seconds = {arm: _column(samples[arm], "seconds") for arm in samples}

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
        "parts": {arm: {part: statistics.median(_column(samples[arm], part)) for part in parts} for arm in samples},
        "tokens": statistics.median(_column(samples["fomaml"], "tokens")),
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


# ----------------------------------------------------------------------------------------- processes of their own


def _worker(name: str, settings: Settings, extra: dict[str, Any], processes: int | None = None) -> dict[str, Any]:
    """Run ``benchmarks.workers`` in a process of its own (under torchrun with ``processes``); returns its result."""
    from dataclasses import asdict

    with tempfile.TemporaryDirectory() as folder:
        job, out = Path(folder) / "job.json", Path(folder) / "out.json"
        job.write_text(json.dumps({"settings": asdict(settings), **extra}))
        launcher = [sys.executable]
        if processes is not None:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        single = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        environment = {key: value for key, value in os.environ.items() if key not in single}
        environment |= extra.get("arm", {}).get("environment", {})
        finished = subprocess.run(
            [*launcher, "-m", "benchmarks.workers", name, str(job), str(out)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        if finished.returncode or not out.exists():
            raise RuntimeError(
                f"the worker {name} {extra} failed:\n{finished.stdout[-1000:]}\n{finished.stderr[-3000:]}"
            )
        return json.loads(out.read_text())


# glibc gives large buffers back at once instead of keeping them for the next, and oneDNN keeps the code of 64 shapes
# of a product instead of 1024: fresh batches bring fresh shapes, so that little of it is used again.
LEAN = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "131072",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
}
MEMORY_ARMS = {
    "meta_lora_bf16": {"method": "meta_lora", "dtype": "bf16", "overrides": TOGETHER},
    "meta_lora_bf16_one_at_a_time": {"method": "meta_lora", "dtype": "bf16", "overrides": ["meta.task_batch_limit=1"]},
    "meta_lora_fp32": {"method": "meta_lora", "dtype": "fp32", "overrides": TOGETHER},
    "meta_lora_fp32_one_at_a_time": {"method": "meta_lora", "dtype": "fp32", "overrides": ["meta.task_batch_limit=1"]},
    "fomaml_fp32": {"method": "fomaml", "dtype": "fp32"},
    "fomaml_bf16_autocast": {"method": "fomaml", "dtype": "bf16"},
    "fomaml_fp32_adamw": {"method": "fomaml", "dtype": "fp32", "overrides": ["meta.inner_optimizer=adamw"]},
    "meta_lora_bf16_lean": {
        "method": "meta_lora",
        "dtype": "bf16",
        "overrides": ["meta.task_batch_limit=1"],
        "environment": LEAN,
    },
    "fomaml_fp32_lean": {"method": "fomaml", "dtype": "fp32", "environment": LEAN},
    "fomaml_bf16_autocast_lean": {"method": "fomaml", "dtype": "bf16", "environment": LEAN},
    "verl_sft_fp32": {"method": "verl_sft", "dtype": "fp32"},
    "peft_loop_fp32": {"method": "peft_loop", "dtype": "fp32"},
}


def memory(settings: Settings) -> dict[str, Any]:
    """Peak memory of each arm in a process of its own: two steps on the same examples."""
    arms = ["meta_lora_bf16", "fomaml_fp32"] if settings.quick else list(MEMORY_ARMS)
    tasks, steps, batch = (2, 1, 4) if settings.quick else (4, 2, 4)
    shared = {"tasks": tasks, "inner_steps": steps, "batch": batch, "support_samples": _support_samples(settings)}
    results = {
        arm: _worker("memory", settings, {**shared, "arm": MEMORY_ARMS[arm]}) for arm in _progress(arms, "memory")
    }
    return {**shared, "rank": RANK, "lean": LEAN, "arms": results}


def checkpoint(settings: Settings) -> dict[str, Any]:
    """Bytes of what each method exports."""
    from metasft.checkpoint import size_bytes

    sizes = {}
    arms = {"meta_lora_r16": ("meta_lora", 16), "meta_lora_r4": ("meta_lora", 4), "fomaml": ("fomaml", None)}
    with tempfile.TemporaryDirectory() as name, process_group():
        for arm, (method, rank) in arms.items():
            folder = Path(name) / arm
            folder.mkdir()
            rank_override = [] if rank is None else [f"model.lora_rank={rank}"]
            trainer = build_trainer(method, settings, folder, [*rank_override, *_samples(settings)])
            sizes[arm] = size_bytes(trainer.export(1))
            del trainer
            gc.collect()
    return {
        "bytes": sizes,
        "ratio": {arm: sizes["fomaml"] / sizes[arm] for arm in arms if arm != "fomaml"},
    }


def two_processes(settings: Settings) -> dict[str, Any]:
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
        "support_samples": _support_samples(settings),
        "repeats": max(2, settings.repeats // 2),
    }
    results: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for number in _progress(range(rounds), "two processes"):
        for processes in (1, 2) if number % 2 == 0 else (2, 1):
            results[processes].append(_worker("data_parallel", settings, job, processes=processes))
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


# ------------------------------------------------------------------------------------------------------- evaluation


def evaluation(settings: Settings) -> dict[str, Any]:
    """The few-shot grid (2 tasks x 5 shot counts x 3 runs), cells in shared passes against one cell at a time.

    One at a time in two ways: padded batches and transformers' ``generate``, as one would write it and as models run
    whose attention does not pack; and the packed code, restricted to one cell.
    """
    import contextlib
    import io
    import time
    from unittest.mock import patch

    from metasft.evaluation import EvaluationConfig, evaluate

    data_dir = Path(settings.task_dir).parent
    if not (data_dir / "meta_test").is_dir():
        raise NotMeasured(f"{data_dir} has no meta_test folder with unseen tasks")
    shots, runs = ((0, 2), 2) if settings.quick else ((0, 5, 10, 25, 50), 3)
    limit, new_tokens = (2, 2) if settings.quick else (settings.test_items, 16)

    def grid(
        cells_per_batch: int | None, n_shots: tuple[int, ...], limit: int, *, packed: bool = True
    ) -> dict[str, Any]:
        unpacked = patch("metasft.few_shot.model.why_not_packed", lambda *_: "padded for the comparison")
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
    seconds = {arm: _column(s, "seconds") for arm, s in samples.items()}
    return {
        "shots": list(shots),
        "runs": runs,
        "test_items": limit,
        "max_new_tokens": new_tokens,
        "seconds": {arm: spread(values) for arm, values in seconds.items()},
        "ratio": {arm: ratio(seconds[arm], seconds["batched"]) for arm in ("padded", "one_cell")},
        "largest_loss_difference": difference,
    }


SECTIONS: dict[str, Callable[[Settings], dict[str, Any]]] = {
    "inner_step": inner_step,
    "peft_loop": peft_loop,
    "verl_sft": verl_sft,
    "fomaml": fomaml,
    "memory": memory,
    "checkpoint": checkpoint,
    "two_processes": two_processes,
    "evaluation": evaluation,
}


def main(arguments: Sequence[str]) -> int:
    name, job, out = arguments
    settings = Settings(**json.loads(Path(job).read_text()))

    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(settings.threads)
    os.chdir(ROOT)  # the shipped YAML names its files from here
    try:
        result = {"result": SECTIONS[name](settings)}
    except NotMeasured as reason:
        result = {"not_measured": str(reason)}
    except ArmsDiffer as error:
        print(f"bench: {name}: {error}", file=sys.stderr)
        return 3
    except ValueError as error:
        print(f"bench: {name}: {error}", file=sys.stderr)
        return 2
    Path(out).write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
