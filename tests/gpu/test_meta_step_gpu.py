"""One meta-step on a GPU against the same independent reference that the CPU tiers use."""

from __future__ import annotations

import json

import pytest
import torch
from meta_reference import Reference, relative_error
from script_runner import ROOT, must_run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, none is visible")

# name -> script, configuration, inner learning rate, overrides, largest relative error. TF32 is off by default, but
# kernels sum in other orders; bf16 has 8 bits of mantissa.
LORA = ("meta_lora_trainer.py", "config_meta_lora_example", 0.3)
RANK_4 = ["model.lora_rank=4", "model.lora_alpha=8"]
BF16 = [
    "model.lora_rank=8",
    "model.lora_alpha=16",
    "engine.model_dtype=bf16",
    "engine.mixed_precision.param_dtype=bf16",
]
METHODS = {
    "meta_lora": (*LORA, RANK_4, 1e-4),  # ragged blocks: masked products
    "one_at_a_time": (*LORA, [*RANK_4, "meta.task_batching=false"], 1e-4),
    "bf16": (*LORA[:2], 0.02, BF16, 0.1),  # ragged blocks: grouped GEMM
    "fomaml": ("maml_sft_trainer.py", "config_fomaml_math_science", 0.05, [], 1e-4),
    "fomaml_bf16": (
        *("maml_sft_trainer.py", "config_fomaml_math_science", 0.02),
        ["engine.mixed_precision.param_dtype=bf16"],  # over fp32 weights
        0.1,
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("padding", ["packed", "padded"])
def test_meta_gradient_on_the_gpu_matches_the_reference(method, padding, tiny_model, task_dir, tmp_path):
    script, config, lr, overrides, tolerance = METHODS[method]
    case = {
        "name": method,
        "script": script,
        "config": config,
        "steps": 2,
        "overrides": [
            f"model.path={tiny_model}",
            f"meta.task_dir={task_dir}",
            "meta.support_samples=24",
            "meta.num_inner_steps=3",
            f"meta.inner_lr={lr}",
            "trainer.total_training_steps=4",
            "trainer.resume_mode=disable",
            "trainer.logger=[]",
            "optim.clip_grad=1e9",
            f"model.use_remove_padding={'true' if padding == 'packed' else 'false'}",
            *overrides,
        ],
    }
    (tmp_path / "cases.json").write_text(json.dumps([case]))
    must_run(ROOT / "tests/support/meta_step_worker.py", tmp_path / "cases.json", tmp_path, processes=1)
    result = torch.load(tmp_path / f"{method}_rank0.pt", weights_only=False)
    rank = 8 if method == "bf16" else 4
    settings = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"}
    reference = Reference(tiny_model, task_dir, settings if script == LORA[0] else None)
    expected = reference.first_order_gradient(result["theta_before"], result["episodes"], lr)
    assert relative_error(result["gradient"], expected) < tolerance
