"""What one meta-step computes, moves, sends and holds on each of its processors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from metasft.config.training import MetaConfig
from metasft.plan.flops import ModelShape, step_flops
from metasft.plan.machines import Machine

EXACT = 3.0
"""Passes that a step of order 2 amounts to: its own, and twice that for differentiating it."""
FP32 = 4


@dataclass(frozen=True)
class MetaStep:
    """A configuration, in the numbers that its cost depends on.

    Attributes:
        lora_rank: 0 = all parameters are trained.
        tasks: of a meta-batch.
        inner_steps: K; ``exact_steps`` of them are differentiated through.
        inner_batch: support examples of an inner step; ``query_batch`` of a query pass, 0 without one.
        shots: different support examples of an episode.
        tokens: of an example; ``response`` of them are predicted.
        top_layers: decoder layers that the inner loop adapts; None = all.
        adamw: whether the inner optimizer is AdamW, else SGD.
        tasks_per_pass: at most, with one adapter each over one frozen base.
        weight_bytes: of a parameter of the base, or of all parameters.
        product_bytes: of the numbers that the model multiplies.
        checkpointed: activations are computed again in the backward.
        gain_share: share of the meta-steps that measure the query loss before adaptation.
    """

    lora_rank: int = 0
    tasks: int = 4
    inner_steps: int = 5
    exact_steps: int = 0
    inner_batch: int = 4
    query_batch: int = 4
    shots: int = 20
    tokens: float = 100
    response: float = 30
    top_layers: int | None = None
    adamw: bool = False
    tasks_per_pass: int = 1
    weight_bytes: int = FP32
    product_bytes: int = FP32
    checkpointed: bool = False
    gain_share: float = 0.0

    @classmethod
    def of(cls, config: Mapping[str, Any], meta: MetaConfig, tokens: float, response: float) -> MetaStep:
        """From a trainer's whole configuration, for examples of so many tokens."""
        engine, data, model = config["engine"], config["data"], config["model"]
        precision = (engine.get("mixed_precision") or {}).get("param_dtype") or engine["model_dtype"]
        batched = model["lora_rank"] > 0 and meta.task_batching is not False
        budget = data["max_token_len_per_gpu"] if data["use_dynamic_bsz"] else data["micro_batch_size_per_gpu"] * tokens
        largest = max(meta.inner_batch_size, meta.query_batch_size) * tokens
        drawn = meta.num_inner_steps * meta.inner_batch_size
        return cls(
            lora_rank=model["lora_rank"],
            tasks=meta.meta_batch_size,
            inner_steps=meta.num_inner_steps,
            exact_steps=meta.exact_steps,
            inner_batch=meta.inner_batch_size,
            query_batch=meta.query_batch_size,
            shots=min(drawn, meta.shots_of_an_episode[1] or meta.support_samples),
            tokens=tokens,
            response=response,
            top_layers=meta.inner_top_layers,
            adamw=meta.inner_optimizer == "adamw",
            tasks_per_pass=min(meta.task_batch_limit or meta.meta_batch_size, max(1, int(budget // largest)))
            if batched
            else 1,
            weight_bytes=_bytes(engine["model_dtype"]),
            product_bytes=_bytes(precision),
            checkpointed=bool(model["enable_gradient_checkpointing"]),
            gain_share=1 / meta.adaptation_gain_freq if meta.adaptation_gain_freq else 0.0,
        )


@dataclass(frozen=True)
class Cost:
    """Of one meta-step, on each processor.

    Attributes:
        tokens: that go through the model.
        flops: operations.
        moved: bytes between memory and processor.
        gathered: bytes from the others of the task group, whose members hold a part of the parameters each.
        reduced: bytes of the meta-gradient's sum over the task groups.
        passes: forwards with their backward, one after another.
        memory: bytes at the peak, beside those of an empty process.
    """

    tokens: float
    flops: float
    moved: float
    gathered: float
    reduced: float
    passes: int
    memory: float

    def seconds(self, machine: Machine, group: int = 1, groups: int = 1) -> dict[str, float]:
        """Part -> seconds; nothing is assumed to overlap, so that their sum is an upper bound."""
        inside = machine.link if group <= machine.per_node else machine.network
        across = machine.link if group * groups <= machine.per_node else machine.network
        return {
            "compute": self.flops / machine.flops,
            "memory": self.moved / machine.bandwidth,
            "start": self.passes * machine.pass_seconds,
            "network": self.gathered / inside + self.reduced / across,
        }


def cost(step: MetaStep, shape: ModelShape, *, group: int = 1, groups: int = 1) -> Cost:
    """Cost of a meta-step on ``groups`` task groups of ``group`` processors.

    The members of a group share the examples of every batch and, fully sharded, the parameters.
    """
    rank = step.lora_rank or None
    trained = shape.adapter_parameters(step.lora_rank) if rank else shape.parameters
    tasks = math.ceil(step.tasks / groups)  # of the group with most of them
    per_pass = min(tasks, step.tasks_per_pass) if rank else 1
    adapted = shape if step.top_layers is None else replace(shape, layers=min(step.top_layers, shape.layers))

    whole, inner = (step_flops(s, [step.tokens], step.response, lora_rank=rank) for s in (shape, adapted))
    # Examples of a processor. One that gets none of a batch computes one of weight 0.
    support, query, drawn = (tasks * math.ceil(n / group) for n in (step.inner_batch, step.query_batch, step.shots))
    exact = 1 + (EXACT - 1) * step.exact_steps / max(1, step.inner_steps)
    again = whole.forward if step.checkpointed else 0
    below = whole.forward - inner.forward  # once per example of an episode
    flops = (
        step.inner_steps * support * exact * (inner.total + again * adapted.layers / shape.layers)
        + query * (whole.total + again + step.gain_share * whole.forward)
        + drawn * below
    )
    tokens = step.tokens * (step.inner_steps * support + query * (1 + step.gain_share))

    passes = math.ceil(tasks / per_pass) * (step.inner_steps + bool(step.query_batch))
    matrices = shape.matrix_parameters + shape.hidden * shape.vocabulary
    weights = 2 * step.weight_bytes * matrices + (0 if rank else 2 * FP32 * shape.parameters)  # read twice; gradients
    kept = shape.layers * shape.kept_per_token * step.product_bytes  # of a token
    update = trained * FP32 * (7 if step.adamw else 3) / group  # parameters, gradients, moments
    moved = passes * weights + 3 * 2 * kept * tokens
    moved += tasks * (step.inner_steps * update + 5 * FP32 * trained / group) + 7 * FP32 * trained / group

    others = (group - 1) / group
    gathered = passes * others * (2 * step.weight_bytes * shape.parameters + FP32 * trained)
    reduced = 2 * (groups - 1) / groups * FP32 * trained / group

    copies = 4 + (2 + 2 * step.adamw) * (per_pass if rank else 1)  # theta, its gradient and moments; those of a task
    largest = math.ceil(max(step.inner_batch, step.query_batch) / group) * per_pass
    if step.checkpointed:
        kept = (shape.layers * shape.hidden + shape.kept_per_token) * step.product_bytes
    kept *= max(1, (EXACT - 1) * step.exact_steps)
    memory = (
        (step.weight_bytes * shape.parameters / group if rank else 0)
        + copies * FP32 * trained / group
        + largest * (step.tokens * kept + 2 * FP32 * step.response * shape.vocabulary)
        + (2 * step.weight_bytes * shape.matrix_parameters / shape.layers if group > 1 else 0)
        + (step.product_bytes * shape.parameters / group if step.product_bytes < step.weight_bytes else 0)
    )
    return Cost(tokens, flops, moved, gathered, reduced, passes, memory)


def _bytes(dtype: str) -> int:
    return FP32 if dtype in ("fp32", "float32") else 2
