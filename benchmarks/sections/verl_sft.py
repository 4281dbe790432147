"""META-LORA's inner step against veRL's own LoRA SFT."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.arms import (
    ROOT,
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
)
from benchmarks.sections.common import (
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
    """META-LORA's inner step against one step of veRL's own SFT trainer, unchanged, on the same examples."""
    import time

    from benchmarks.arms import synchronize

    tasks, steps, batch = (2, 2, 4) if settings.quick else (4, 5, 4)
    overrides = [
        f"meta.num_inner_steps={steps}",
        f"meta.inner_batch_size={batch}",
        "meta.query_batch_size=1",
        f"meta.meta_batch_size={tasks}",
        *sample_counts(settings),
        f"model.lora_rank={RANK}",
    ]
    with tempfile.TemporaryDirectory() as folder, process_group():
        arms, runs = {}, {}
        for arm, extra in {"batched": TOGETHER, "one_at_a_time": SEQUENTIAL["one_at_a_time"]}.items():
            trainer = build_trainer("meta_lora", settings, Path(folder), [*overrides, inner_lr(settings, arm), *extra])
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
        batches, shape = tokenized_batches(arms["batched"], query=False), model_shape(settings)
    tokens = {arm: column(samples, "tokens") for arm, samples in measured.items()}
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
            "batched": flops_per_token(shape, batches, lora_rank=RANK),
            "verl_sft": flops_per_token(shape, batches, lora_rank=RANK, all_logits=True),
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
    from metasft.data.episodes import EpisodeSampler

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
