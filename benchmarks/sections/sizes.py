"""Larger models, with random weights: neither speed nor memory depends on what the weights say."""

from __future__ import annotations

import gc
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.arms import (
    Settings,
    TrainerArm,
    build_trainer,
    interleave,
    process_group,
    ratio,
    spread,
    write_random_model,
)
from benchmarks.sections import memory, peft_loop, verl_sft
from benchmarks.sections.common import RANK, TOGETHER, column, progress, sample_counts

MODELS = ("smollm2-360m", "qwen2.5-0.5b")


def measure(settings: Settings) -> dict[str, Any]:
    """META-LORA against FOMAML, the loop over transformers + peft and veRL's LoRA step, 2 tasks and K = 2, with peaks.

    The sections of the smaller model measure the last two; their arms have to compute the same meta-gradient here, too.
    """
    from transformers import AutoTokenizer

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in progress(MODELS[:1] if settings.quick else MODELS, "sizes"):
            path = Path(folder) / name
            write_random_model(name, path)
            # Words in place of bytes, and no more of them than the model has embeddings.
            AutoTokenizer.from_pretrained(settings.model, trust_remote_code=False).save_pretrained(path)
            of_size = replace(settings, model=str(path), quick=True)
            found[name] = {
                "fomaml": _against_fomaml(of_size),
                "peft_loop": peft_loop.measure(of_size),
                "verl_sft": verl_sft.measure(of_size),
                "memory": memory.measure(of_size)["arms"],
            }
    return {"tasks": 2, "inner_steps": 2, "examples": 4, "rank": RANK, "models": found}


def _against_fomaml(settings: Settings) -> dict[str, Any]:
    shared = ["meta.num_inner_steps=2", "meta.meta_batch_size=2", *sample_counts(settings)]
    shared += ["meta.inner_batch_size=4", "meta.query_batch_size=4", "meta.inner_optimizer=sgd", "meta.inner_lr=1e-4"]
    with tempfile.TemporaryDirectory() as folder, process_group():
        arms = {
            method: TrainerArm(build_trainer(method, settings, Path(folder), [*shared, *own]))
            for method, own in {"meta_lora": [f"model.lora_rank={RANK}", *TOGETHER], "fomaml": []}.items()
        }
        for arm in arms.values():
            arm.run()  # warm-up
        samples = interleave({method: arm.run for method, arm in arms.items()}, settings.repeats, settings.cell_seconds)
        tokens = {method: column(found, "tokens") for method, found in samples.items()}
        assert tokens["meta_lora"] == tokens["fomaml"], "the arms saw different examples"
        del arms
        gc.collect()
    seconds = {method: column(found, "seconds") for method, found in samples.items()}
    return {
        "tokens": tokens["fomaml"][0],
        "seconds": {method: spread(values) for method, values in seconds.items()},
        "ratio": ratio(seconds["fomaml"], seconds["meta_lora"]),
    }
