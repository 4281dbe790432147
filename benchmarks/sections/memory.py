"""Peak memory."""

from __future__ import annotations

from typing import Any

from benchmarks.arms import Settings
from benchmarks.sections.common import RANK, TOGETHER, progress, support_samples
from benchmarks.sections.worker_process import run_worker

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


def measure(settings: Settings) -> dict[str, Any]:
    """Peak memory of each arm in a process of its own: two steps on the same examples."""
    arms = ["meta_lora_bf16", "fomaml_fp32"] if settings.quick else list(MEMORY_ARMS)
    tasks, steps, batch = (2, 1, 4) if settings.quick else (4, 2, 4)
    shared = {"tasks": tasks, "inner_steps": steps, "batch": batch, "support_samples": support_samples(settings)}
    results = {
        arm: run_worker("memory", settings, {**shared, "arm": MEMORY_ARMS[arm]}) for arm in progress(arms, "memory")
    }
    return {**shared, "rank": RANK, "lean": LEAN, "arms": results}
