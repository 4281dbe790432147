"""The choice of how examples and tasks share a pass: the fastest way that computes the model's own losses.

:mod:`metasft.model.layouts` says what is compared and why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from metasft.backend.engine import MetaFSDPEngine
from metasft.files.untrusted import reason
from metasft.model.forward_pass import OUTPUTS
from metasft.model.layouts import Layout, Probe, first_right, looks_ahead, why_wrong
from metasft.model.lower_layers import base_model, decoder_layers, watch_decoder_layers
from metasft.model.stacked_lora import TaskBatchedLoRA

TOUCH_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Settings of models that change logits after the output layer: too little to show in the loss of some tokens."""
OUTPUT_TOLERANCE = 1e-4


def choose_layout(engine: MetaFSDPEngine, examples: Sequence[Probe], settings: Mapping[str, Any]) -> list[str]:
    """Choose the engine's ``output`` and ``layout``: the fastest of each with the losses of the model's own forward.

    Every rank computes the same, so that all come to the same choice. In the engine's ``eval_mode``, since dropout
    would make two computations of a loss differ.

    Args:
        engine: with its model.
        examples: two or more, some of one task and alike at their beginning, among them the longest of the run.
        settings: veRL's batch settings; ``use_remove_padding`` false asks for padded rows.

    Returns:
        What was not chosen, and why.

    Raises:
        ValueError: the model predicts a token from what comes after it, or its losses in a padded batch are not those
            of its own forward.
    """
    dtype = engine.product_dtype

    def alone(example: Probe) -> torch.Tensor:
        return engine.token_losses([example], settings)[0]

    engine.use_layout(Layout("padded", "own"))
    engine.output = "logits"
    short = min(examples, key=lambda example: len(example.tensors["input_ids"]))
    model_settings = base_model(engine.module).config
    model = f"model.path={engine.model_config.path} ({model_settings.model_type})"
    try:
        ahead = looks_ahead(alone, short, dtype)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{model} cannot compute the loss of an example ({type(error).__name__}: {reason(error)}); use another "
            "model, or name fewer modules in model.target_modules"
        ) from error
    if ahead:
        raise ValueError(
            f"{model} with {engine.own_attention} attention predicts a token from the tokens after it, so that its "
            "loss says nothing; use a causal language model (an encoder may need is_decoder=true in its config.json, a "
            "decoder +model.override_config.attn_implementation=eager)"
        )
    expected = [alone(example) for example in examples]
    reasons = []
    touched = any(getattr(model_settings.get_text_config(), name, None) for name in TOUCH_LOGITS)
    # The same hidden states each time: what differs by more than rounding is another function of the logits.
    tolerance = OUTPUT_TOLERANCE if dtype == torch.float32 else None
    for output in OUTPUTS[1:] if touched else OUTPUTS:
        engine.output = output
        if not (why := why_wrong(lambda e: [alone(e[0])], expected[:1], examples[:1], dtype, tolerance)):
            break
        reasons.append(f"output layer with {output}: {why}")
    wanted = [Layout("packed", "own"), Layout("padded", "own")]
    if engine.own_attention == "sdpa":
        wanted = [Layout("shared", "packed"), Layout("packed", "own")]
        wanted += [Layout("padded", "packed"), Layout("padded", "own")]
    if not settings["use_remove_padding"]:
        wanted = [layout for layout in wanted if layout.rows == "padded"]

    def why_not(layout: Layout) -> str:
        def losses(together: Sequence[Probe]) -> list[torch.Tensor]:
            engine.use_layout(layout)
            return engine.token_losses(together, settings)

        return why_wrong(losses, expected, examples, dtype)

    layout, of_layouts = first_right(wanted, why_not)
    if layout is None:
        raise ValueError(f"{model} cannot be trained in batches: {'; '.join(of_layouts)}; use another model")
    engine.use_layout(layout)
    return [*reasons, *of_layouts]


def why_not_in_two_parts(
    engine: MetaFSDPEngine, lowest_layer: int, examples: Sequence[Probe], settings: Mapping[str, Any]
) -> str:
    """Try passes that start at a decoder layer, and leave the engine with them if they compute the same losses.

    Args:
        engine: with a layout from :func:`choose_layout`.
        lowest_layer: number of that layer.
        examples, settings: as of :func:`choose_layout`.

    Returns:
        In words, why every pass is whole; empty where it is not.
    """
    try:
        watch_decoder_layers(decoder_layers(base_model(engine.module)))
    except (AttributeError, ValueError) as error:
        return reason(error)
    expected = engine.token_losses(examples, settings)
    engine.lowest_layer = lowest_layer
    why = why_wrong(
        lambda e: engine.token_losses(e, settings, in_two_parts=True), expected, examples, engine.product_dtype
    )
    if why:
        engine.lowest_layer = 0
    return why


def check_stacked(
    engine: MetaFSDPEngine, stacked: TaskBatchedLoRA, examples: Sequence[Probe], settings: Mapping[str, Any]
) -> None:
    """Compare two tasks in one pass, whose adapters are drawn at random, with each of them loaded into the model alone.

    Args:
        engine: in whose passes ``stacked`` is, with a layout from :func:`choose_layout`.
        stacked: the adapters.
        examples, settings: as of :func:`choose_layout`.

    Raises:
        ValueError: the losses differ.
    """
    dtype = engine.product_dtype

    def with_two_tasks(compute: Callable[[TaskBatchedLoRA], Any]) -> Any:
        with stacked.adapting(2) as adaptation:
            adaptation.draw(torch.Generator().manual_seed(0))
            return compute(adaptation)

    own = [parameter.data for parameter in stacked.parameters]
    theta = [tensor.clone() for tensor in own]
    try:
        adapted = with_two_tasks(lambda both: [[part.clone() for part in both.task_tensors(task)] for task in (0, 1)])
        expected = []
        for example in examples:
            torch._foreach_copy_(own, adapted[example.task])
            expected += engine.token_losses([example], settings)
        torch._foreach_copy_(own, theta)
        why = with_two_tasks(lambda _: why_wrong(lambda e: engine.token_losses(e, settings), expected, examples, dtype))
    finally:
        torch._foreach_copy_(own, theta)
    if why:
        raise ValueError(f"stacked adapters do not compute what each of them does alone ({why})")
