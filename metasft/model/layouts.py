"""How examples are laid out for the model, and the proof that a layout computes the model's own losses.

Whether sequences may share a row, or states, depends on how a model's layers are written, which its configuration does
not tell: some choose their attention when they are built, some mix neighbouring tokens by other means, some scale their
logits. A wrong layout raises no error; it lets sequences see each other. So every run compares, on its own
examples and before its first meta-step, the losses of each token with those of the model's plain forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import torch

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest difference between two computations of a token's loss, in nats: of all tokens in fp32, the median in bf16."""
LEAK = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Largest change of a token's loss, in nats, when an example beside it changes."""


class Layout(NamedTuple):
    """How a batch reaches the model.

    Attributes:
        rows: ``shared``: one row in which sequences with the same opening share it; ``packed``: one row, every sequence
            by itself, told apart by its position ids; ``padded``: a row per sequence.
        attention: ``packed``: :mod:`metasft.model.packed_attention` in the place of the model's own; ``own``.
    """

    rows: Literal["shared", "packed", "padded"]
    attention: Literal["packed", "own"]


class Probe(NamedTuple):
    """A tokenised example that the proof computes.

    Attributes:
        task: which task's parameters it meets.
        tensors: veRL's, of one sequence: ``input_ids``, ``loss_mask``, ... [tokens].
    """

    task: int
    tensors: dict[str, torch.Tensor]


Losses = Callable[[Sequence[Probe]], list[torch.Tensor]]
"""Examples computed together -> the loss of each response token of each of them."""


def changed(example: Probe) -> Probe:
    """The same example with its response in another order: what it may share with other examples stays the same."""
    ids = example.tensors["input_ids"].clone()
    start = int(example.tensors["loss_mask"].nonzero()[0])
    ids[start:] = ids[start:].flip(0).roll(1)
    return example._replace(tensors={**example.tensors, "input_ids": ids})


def why_wrong(
    losses: Losses,
    expected: Sequence[torch.Tensor],
    examples: Sequence[Probe],
    dtype: torch.dtype,
    tolerance: float | None = None,
) -> str:
    """What is wrong with computing ``examples`` together; empty where nothing is.

    Args:
        losses: computes examples together.
        expected: the loss of each response token of each example by itself.
        dtype: of the products.
        tolerance: in nats; None means that of ``dtype``.

    Returns:
        In words, to follow the name of the layout.
    """
    try:
        together = losses(examples)
        off = torch.cat([(a - b).abs() for a, b in zip(together, expected, strict=True)])
        error = float(off.max() if dtype == torch.float32 else off.median())
        if not error < (TOLERANCE[dtype] if tolerance is None else tolerance):
            return f"token losses are off by {error:.2g} nats"
        # Random and well-trained models alike attend to much that hardly matters: a leak shows best in what moves.
        for index in {0, len(examples) - 1} if len(examples) > 1 else ():
            others = list(examples)
            others[index] = changed(examples[index])
            moved = [
                float((a - b).abs().max())
                for place, (a, b) in enumerate(zip(losses(others), together, strict=True))
                if place != index
            ]
            if not max(moved) < LEAK[dtype]:
                return f"an example changes the losses of its neighbours by {max(moved):.2g} nats"
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else 'no message'}"
    return ""


def looks_ahead(alone: Callable[[Probe], torch.Tensor], example: Probe, dtype: torch.dtype) -> bool:
    """Whether the loss of a token depends on tokens after the one that it predicts."""
    ids = example.tensors["input_ids"].clone()
    ids[-1] = ids[0] if ids[-1] != ids[0] else ids[1]
    other = example._replace(tensors={**example.tensors, "input_ids": ids})
    moved = (alone(example)[:-1] - alone(other)[:-1]).abs()
    return bool(len(moved)) and not float(moved.max()) < LEAK[dtype]


def first_right(candidates: Iterable[Layout], why_not: Callable[[Layout], str]) -> tuple[Layout | None, list[str]]:
    """The first layout for which ``why_not`` has nothing to say, and what it said of those before."""
    reasons: list[str] = []
    for layout in candidates:
        reason = why_not(layout)
        if not reason:
            return layout, reasons
        reasons.append(f"{layout.rows} rows with {layout.attention} attention: {reason}")
    return None, reasons
