"""Where a meta-step makes the host wait for the device, counted on a device that is made of host memory."""

from __future__ import annotations

import json
import math

import pytest
from script_runner import ROOT, must_run

TASKS = 2
COMMON = [
    "meta.support_samples=24",
    "meta.num_inner_steps=2",
    f"meta.meta_batch_size={TASKS}",
    "meta.inner_lr=0.05",
    "data.max_token_len_per_gpu=160",  # several micro-batches
    "trainer.total_training_steps=4",
    "trainer.resume_mode=disable",
    "trainer.logger=[]",
]
META_LORA = ("meta_lora_trainer.py", "config_meta_lora_guide", ["model.lora_rank=4", "model.lora_alpha=8"])
RATES = ["meta.learned_inner_lr=per_tensor_per_step", "meta.inner_lr_meta_lr=0.1"]
CASES = {
    "meta_lora": (*META_LORA[:2], [*META_LORA[2], "meta.task_batch_limit=2"]),
    "learned_rates": (*META_LORA[:2], [*META_LORA[2], "meta.task_batch_limit=2", *RATES]),
    "one_at_a_time": (
        *META_LORA[:2],
        [
            *META_LORA[2],
            "meta.task_batching=false",
            "meta.inner_optimizer=adamw",
            "meta.inner_clip_grad=1.0",
            *RATES,
            "model.use_remove_padding=false",
            "model.enable_gradient_checkpointing=true",
        ],
    ),
    "second_order": (*META_LORA[:2], [*META_LORA[2], "meta.task_batch_limit=2", "meta.order=2"]),
    "lora_ml": ("lora_ml_trainer.py", "config_lora_ml", [*META_LORA[2], "meta.task_lora_rank=2"]),
    "fomaml": ("maml_sft_trainer.py", "config_fomaml_math_science", []),
    "reptile": ("reptile_sft_trainer.py", "config_reptile_math_science", []),
}
TABLE = ["_to_copy to cpu", "metrics.py:from_table", "outer"]
RATE_GRADIENT = ["_to_copy to cpu", "trainer.py:adapted_gradient_step", "outer"]
TASK_GRADIENTS = ["_local_scalar_dense", "lora_ml_trainer.py:meta_step", "outer"]
NORM = ["_local_scalar_dense", "transformer_impl.py:optimizer_step", "outer"]


@pytest.fixture(scope="module")
def watched(untied_model, task_dir, tmp_path_factory):
    """The folder of what ``watched_device.py`` saw of one meta-step of every case."""
    out = tmp_path_factory.mktemp("watched")
    paths = [f"model.path={untied_model}", f"meta.task_dir={task_dir}", f"trainer.default_local_dir={out}"]
    cases = [
        {"name": name, "script": script, "config": config, "overrides": [*COMMON, *overrides, *paths]}
        for name, (script, config, overrides) in CASES.items()
    ]
    (out / "cases.json").write_text(json.dumps(cases))
    must_run(ROOT / "tests/support/watched_device.py", out / "cases.json", out, fresh=True)  # before veRL is imported
    return out


@pytest.mark.parametrize("case", CASES)
def test_no_inner_step_waits_for_the_device(case, watched):
    """A meta-step waits for its table of losses, with learned rates or LoRAs of tasks right after it for their
    gradient, and veRL's optimizer step twice for the norm; nothing else does."""
    seen = json.loads((watched / f"{case}.json").read_text())
    assert math.isfinite(seen["metrics"]["meta/query_loss_after"])
    rates = [RATE_GRADIENT] if RATES[0] in CASES[case][2] else []
    beside = [TASK_GRADIENTS] if case == "lora_ml" else rates
    assert seen["waits"] == ([TABLE] if case == "reptile" else [TABLE, *beside, NORM, NORM])


def test_tensors_on_the_host_are_reduced_on_the_device(watched):
    """NCCL cannot reduce what engine.offload_policy keeps on the host."""
    seen = json.loads((watched / "reduction.json").read_text())
    assert seen == {"places": ["watched"], "shard": [0.0, 2.0, 4.0], "table": [2.0, 2.0], "table_on": "watched"}
