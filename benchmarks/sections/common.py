"""What several sections share: their sizes, the two ways of adapting, tokens and operations counted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.arms import Settings, TrainerArm

RANK = 16

INNER_LR = 0.005
"""A tenth of the shipped rate, which costs the same time: what two arms round differently grows with every inner step,
and at the shipped rate 8 steps on random words make 4e-5 of it."""

TOGETHER = ["meta.task_batch_limit=64"]
"""All tasks of a meta-batch in one pass, whatever their size: left to itself, a CPU takes large ones alone."""

SEQUENTIAL = {"one_at_a_time": ["meta.task_batch_limit=1"], "peft_layers": ["meta.task_batching=false"]}
"""The two ways to adapt one task after the other: through the fused adapters, and through PEFT's own layers."""


class NotMeasured(Exception):
    """This section cannot be measured here; the message says why."""


def inner_lr(settings: Settings, arm: str, lr: float = INNER_LR) -> str:
    return f"meta.inner_lr={lr * 1.1 if settings.deviate == arm else lr}"


def sample_counts(settings: Settings) -> list[str]:
    """Overrides: examples per task. A small query set tokenises faster; how large it is has no part in a step."""
    return [f"meta.support_samples={support_samples(settings)}", "meta.query_samples=12"]


def support_samples(settings: Settings) -> int:
    return 16 if settings.quick else 100


def model_shape(settings: Settings) -> Any:
    from transformers import AutoConfig

    from metasft.plan.flops import ModelShape

    return ModelShape.from_config(AutoConfig.from_pretrained(settings.model, trust_remote_code=False))


def adaptable_model(settings: Settings, folder: Path, **flags: Any) -> Any:
    """The model with a fresh LoRA as ``adapt.py`` opens it; ``flags`` as of its settings."""
    from metasft.adapt.adaptable_model import AdaptableModel
    from metasft.adapt.open_model import open_model
    from metasft.adapt.settings import AdaptConfig
    from metasft.adapt.starts import find_model_source

    config = AdaptConfig(
        model_path=settings.model,
        examples=Path(settings.task_dir),
        output=folder,
        lora_rank=RANK,
        device=settings.device,
        dtype={"fp32": "float32", "bf16": "bfloat16"}[settings.dtype],
        max_length=1024,
        max_new_tokens=1,
        **flags,
    )
    return AdaptableModel(config, open_model(config, find_model_source(config)))


def tokenized(file: Path, examples: int, model: Any) -> Any:
    """The first examples of a parquet file for :func:`adaptable_model`."""
    from metasft.adapt.open_model import UNLIMITED
    from metasft.data.task_sets import TokenizedSet

    return TokenizedSet(file, examples, model.tokenizer, UNLIMITED)


def progress(items: Sequence[Any], name: str) -> Any:
    from tqdm import tqdm

    return tqdm(items, desc=name, unit="comparison")


def column(samples: Sequence[dict[str, float]], key: str) -> list[float]:
    return [sample[key] for sample in samples]


def tokenized_batches(arm: TrainerArm, *, query: bool = True) -> list[list[Any]]:
    """The tokenised batches of the arm's last meta-step."""
    result = []
    for episode in arm.episodes:
        support = arm.trainer.support_sets[episode.task]
        result += [support.batch(indices) for indices in episode.support_batches]
        if query:
            result.append(arm.trainer.query_sets[episode.task].batch(episode.query_batch))
    return result


def flops_per_token(
    shape: Any,
    batches: Sequence[Sequence[Any]],
    *,
    lora_rank: int | None,
    padded: bool = False,
    all_logits: bool = False,
) -> float:
    """Operations of one forward and backward over ``batches``, per token of theirs that is no padding."""
    from metasft.plan.flops import step_flops

    total = tokens = 0
    for examples in batches:
        lengths = [len(example["input_ids"]) for example in examples]
        tokens += sum(lengths)
        computed = [max(lengths)] * len(lengths) if padded else lengths
        outputs = sum(int(example["loss_mask"].sum()) for example in examples)
        total += step_flops(shape, computed, sum(computed) if all_logits else outputs, lora_rank=lora_rank).total
    return total / tokens
