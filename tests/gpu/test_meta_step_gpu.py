"""One meta-step on GPUs against the same independent reference that the CPU tiers use."""

from __future__ import annotations

import json

import pytest
import torch
from meta_reference import Reference, anything, relative_error
from script_runner import ROOT, must_run

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = pytest.mark.skipif(not GPUS, reason="needs a CUDA GPU, none is visible")
needs_two = pytest.mark.skipif(GPUS < 2, reason=f"needs two CUDA GPUs, {GPUS} visible")

# name -> script, configuration, inner learning rate, overrides, largest relative error. TF32 is off by default, but
# kernels sum in other orders; bf16 has 8 bits of mantissa.
LORA = ("meta_lora_trainer.py", "config_meta_lora_guide", 0.3)
RANK_4 = ["model.lora_rank=4", "model.lora_alpha=8"]
RATES = ["meta.learned_inner_lr=per_tensor_per_step", "meta.inner_lr_meta_lr=0.2"]
BF16 = [
    "model.lora_rank=8",
    "model.lora_alpha=16",
    "engine.model_dtype=bf16",
    "engine.mixed_precision.param_dtype=bf16",
]
FOMAML = ("maml_sft_trainer.py", "config_fomaml_math_science", 0.05)
METHODS = {
    "meta_lora": (*LORA, RANK_4, 1e-4),  # ragged blocks: masked products
    "one_at_a_time": (*LORA, [*RANK_4, "meta.task_batching=false"], 1e-4),
    "rates": (*LORA, [*RANK_4, *RATES], 1e-4),
    "trajectory": (*LORA, [*RANK_4, "meta.trajectory_weight=0.5"], 1e-4),
    "lora_b": (*LORA, [*RANK_4, "meta.inner_scope=lora_b"], 1e-4),
    "top_layer": (*LORA, [*RANK_4, "meta.inner_scope=top_layers", "meta.inner_top_layers=1"], 1e-4),
    "second_order": (*LORA, [*RANK_4, "meta.order=2"], 1e-4),
    "lora_ml": ("lora_ml_trainer.py", "config_lora_ml", 0.3, [*RANK_4, "meta.task_lora_rank=1"], 1e-4),
    "bf16": (*LORA[:2], 0.02, BF16, 0.1),  # ragged blocks: grouped GEMM where there is a kernel for it
    "fomaml": (*FOMAML, [], 1e-4),
    "fomaml_rates": (*FOMAML, RATES, 1e-4),
    "fomaml_bf16": (*FOMAML[:2], 0.02, ["engine.mixed_precision.param_dtype=bf16"], 0.1),  # over fp32 weights
}
# Passes of several micro-batches; one rank's shards, or the base under its adapters, on the host between uses.
GROUP = ["meta.task_group_size=2", "data.max_token_len_per_gpu=160"]
ON_HOST = [*GROUP, "engine.offload_policy=true"]
TWO = {
    "task_groups": (*LORA, [*RANK_4, "meta.task_group_size=1"], 1e-4),
    "meta_lora": (*LORA, [*RANK_4, *GROUP], 1e-4),
    "fomaml": (*FOMAML, GROUP, 1e-4),
    "meta_lora_on_host": (*LORA, [*RANK_4, *ON_HOST], 1e-4),
    "fomaml_on_host": (*FOMAML, [*ON_HOST, "meta.inner_clip_grad=1e9"], 1e-4),
}


@pytest.fixture
def measured(record_property):
    """Keeps a relative error for the report of the run, and gives it back."""

    def keep(error):
        record_property("relative_error", error)
        return error

    return keep


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("padding", ["packed", "padded"])
def test_meta_gradient_on_the_gpu_matches_the_reference(method, padding, tiny_model, task_dir, tmp_path, measured):
    """And torch raises where a pass of the second meta-step waits for the GPU."""
    script, config, lr, overrides, tolerance = METHODS[method]
    more = [f"model.use_remove_padding={'true' if padding == 'packed' else 'false'}"]
    case = case_of(method, script, config, lr, [*overrides, *more], tiny_model, task_dir)
    error = measured(error_of({**case, "no_waits": True}, lr, tiny_model, task_dir, tmp_path, processes=1))
    assert error < tolerance


@needs_two
@pytest.mark.parametrize("layout", TWO)
def test_two_gpus_match_the_reference(layout, tiny_model, task_dir, tmp_path, measured):
    script, config, lr, overrides, tolerance = TWO[layout]
    case = case_of(layout, script, config, lr, overrides, tiny_model, task_dir)
    assert measured(error_of(case, lr, tiny_model, task_dir, tmp_path, processes=2)) < tolerance


def case_of(name, script, config, lr, overrides, model, task_dir):
    return {
        "name": name,
        "script": script,
        "config": config,
        "steps": 2,
        "overrides": [
            f"model.path={model}",
            f"meta.task_dir={task_dir}",
            "meta.support_samples=24",
            "meta.num_inner_steps=3",
            f"meta.inner_lr={lr}",
            "trainer.total_training_steps=4",
            "trainer.resume_mode=disable",
            "trainer.logger=[]",
            "optim.clip_grad=1e9",
            *overrides,
        ],
    }


def error_of(case, lr, model, task_dir, folder, *, processes):
    """The relative error of the meta-gradient that the case's second meta-step hands to the optimizer, or of that of
    learned rates where it is larger."""
    (folder / "cases.json").write_text(json.dumps([case]))
    must_run(ROOT / "tests/support/meta_step_worker.py", folder / "cases.json", folder, processes=processes)
    result = torch.load(folder / f"{case['name']}_rank0.pt", weights_only=False)
    lora = None
    if "lora" in case["script"]:
        rank = next(int(o.partition("=")[2]) for o in case["overrides"] if o.startswith("model.lora_rank"))
        lora = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"}
    reference = Reference(model, task_dir, lora)
    rates, drawn = result.get("rates"), (result["theta_before"], result["episodes"])
    if case["name"] == "lora_ml":
        theta, episodes = drawn
        shared, own = reference.joint_gradient(theta, result["own_before"], episodes)
        return max(relative_error(result["gradient"], shared), relative_error(result["own_gradient"], own))
    if case["name"] == "second_order":
        return relative_error(result["gradient"], reference.exact_gradient(*drawn, lr)[0])
    weight = 0.5 if case["name"] == "trajectory" else 0.0
    scopes = {"lora_b": lambda name: "lora_B" in name, "top_layer": lambda name: ".layers.1." in name}  # of two
    scope = scopes.get(case["name"], anything)
    expected = reference.first_order_gradient(*drawn, lr, trajectory=weight, rates=rates, only=scope)
    error = relative_error(result["gradient"], expected)
    if rates is None:
        return error
    return max(error, relative_error(result["rate_gradient"], reference.rate_gradient(*drawn, rates)))
