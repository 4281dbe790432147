"""Bytes of a checkpoint."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.arms import Settings, build_trainer, process_group
from benchmarks.sections.common import sample_counts


def measure(settings: Settings) -> dict[str, Any]:
    """Bytes of what each method exports."""
    from metasft.checkpoint.exports import size_bytes

    sizes = {}
    arms = {"meta_lora_r16": ("meta_lora", 16), "meta_lora_r4": ("meta_lora", 4), "fomaml": ("fomaml", None)}
    with tempfile.TemporaryDirectory() as name, process_group():
        for arm, (method, rank) in arms.items():
            folder = Path(name) / arm
            folder.mkdir()
            rank_override = [] if rank is None else [f"model.lora_rank={rank}"]
            trainer = build_trainer(method, settings, folder, [*rank_override, *sample_counts(settings)])
            sizes[arm] = size_bytes(trainer.export(1))
            del trainer
            gc.collect()
    return {
        "bytes": sizes,
        "ratio": {arm: sizes["fomaml"] / sizes[arm] for arm in arms if arm != "fomaml"},
    }
