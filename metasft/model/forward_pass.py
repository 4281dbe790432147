"""What one pass through the model carries beside the arguments of its forward.

Four places deep inside a model have to know something about the batch: attention, how the entries of a row attend;
stacked adapters, which rows belong to which task; decoder layers, whether they take part; the output layer, which
tokens are trained on. Many architectures drop arguments that they do not know, and activation checkpointing calls
layers again during the backward, on whichever thread autograd runs it. So this is one value of the process, set by
:func:`running` around a forward and its backward, and this module is the only place where anything travels beside the
arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

Output = Literal["loss", "selected", "logits"]
OUTPUTS: tuple[Output, ...] = ("loss", "selected", "logits")
"""What the output layer computes: the loss, the logits of response positions, or those of all positions."""


class Rows(Protocol):
    """What the rows of a forward are made of, and how their entries attend."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float | None,
        dropout: float,
        window: int | None = None,
    ) -> torch.Tensor: ...


@dataclass
class ResponseTokens:
    """The positions of a batch whose next token is trained on, in the order of the flattened batch.

    Attributes:
        index: into the rows of the output layer's input, [n].
        labels: the tokens to predict, [n].
        weights: of each token in the loss, [n] fp32.
        tasks: which task each token belongs to, [n].
        output: what the output layer computes.
        loss: the weighted sum of ``nll`` [n], the negative log-likelihoods. The output layer sets both where ``output``
            is "loss" (:mod:`metasft.model.response_loss`).
    """

    index: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    tasks: torch.Tensor
    output: Output = "logits"
    loss: torch.Tensor | None = None
    nll: torch.Tensor | None = None


@dataclass
class LowerLayers:
    """A pass through a part of the decoder layers (:mod:`metasft.model.lower_layers`).

    Attributes:
        end: number of the first layer that is not one of the lower ones.
        given: what the lower layers have made of the batch, in the shape of the model's hidden states: the pass goes on
            from there. None: the pass runs the lower layers alone.
        found: then, what they make of it.
    """

    end: int
    given: torch.Tensor | None = None
    found: torch.Tensor | None = None


@dataclass(frozen=True)
class ForwardPass:
    """One pass.

    Attributes:
        rows: how the entries of the row attend; None: one sequence per row, padded at its end.
        counts: rows of each task, for stacked adapters: tokens of a packed row, or examples of a padded batch, which
            then count with all their tokens. Those of a task are contiguous and tasks in order. None: one task.
        output_counts: the same at the output layer, where it sees other rows; None: as ``counts``.
        response: the tokens that the output layer computes a loss or logits for; None: logits as the model gives them.
        lower: where the pass runs a part of the decoder layers.
    """

    rows: Rows | None = None
    counts: Sequence[int] | None = None
    output_counts: Sequence[int] | None = None
    response: ResponseTokens | None = None
    lower: LowerLayers | None = None


_current = ForwardPass()


def current() -> ForwardPass:
    """The pass that is under way; an empty one outside of :func:`running`."""
    return _current


@contextmanager
def running(forward_pass: ForwardPass) -> Iterator[None]:
    """The forward and backward inside are those of ``forward_pass``."""
    global _current
    before, _current = _current, forward_pass
    try:
        yield
    finally:
        _current = before
