"""Causal attention over packed sequences with torch's SDPA, for devices without flash attention's varlen kernels.

Packing puts all sequences of a batch into one row, so that no product runs over padding. Attention with a
block-diagonal mask over that row would cost the square of the row's length; here the sequences are laid side by side
(padded to the longest, for attention alone), each attends to itself, and the padding is dropped again. A causal query
never looks at what comes after it, so padding at the end needs no mask.

The trainers' engine uses it in place of ``sdpa``; with ``flash_attention_2`` nothing of this is needed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

NAME = "packed_sdpa"


PADDING_LIMIT = 0.25
"""Padding positions per token that a group of sequences may have: more groups, more calls; fewer, more padding."""


class PackedLayout:
    """Where the sequences of one packed row lie, and which of them attend in one call.

    Sequences of similar length form a group: attention costs the square of a group's longest one.

    Args:
        lengths: tokens of each sequence, in order.
        device: of the index tensors.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.is_plain = len(lengths) == 1
        self.groups = _group(lengths)
        # One group of equal sequences in their own order needs no index at all.
        self.is_regular = len(self.groups) == 1 and len(set(lengths)) == 1
        self.shapes = [(len(group), max(lengths[i] for i in group)) for group in self.groups]
        starts = [0, *itertools.accumulate(lengths)]
        gather, scatter, base = [], torch.empty(starts[-1], dtype=torch.long), 0
        for group, (_, longest) in zip(self.groups, self.shapes, strict=True):
            for i in group:
                column = torch.arange(longest)
                # Padding points at the sequence's last token; its result is never read.
                gather.append(starts[i] + column.clamp(max=lengths[i] - 1))
                scatter[starts[i] : starts[i + 1]] = base + column[: lengths[i]]
                base += longest
        self.gather = torch.cat(gather).to(device, non_blocking=True)
        self.scatter = scatter.to(device, non_blocking=True)

    def unpack(self, states: torch.Tensor) -> list[torch.Tensor]:
        """[1, heads, tokens, d] -> for each group [sequences, heads, longest, d]."""
        rows = states[0].transpose(0, 1)  # [tokens, heads, d]
        if not self.is_regular:
            rows = rows.index_select(0, self.gather)
        parts = rows.split([count * longest for count, longest in self.shapes])
        return [
            part.reshape(count, longest, *part.shape[1:]).transpose(1, 2)
            for part, (count, longest) in zip(parts, self.shapes, strict=True)
        ]

    def pack(self, groups: Sequence[torch.Tensor]) -> torch.Tensor:
        """For each group [sequences, heads, longest, d] -> [1, tokens, heads, d]."""
        rows = torch.cat([states.transpose(1, 2).flatten(0, 1) for states in groups])
        if not self.is_regular:
            rows = rows.index_select(0, self.scatter)
        return rows.unsqueeze(0)


def _group(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of the sequences in groups of similar length, the padding of each within :data:`PADDING_LIMIT`."""
    groups: list[list[int]] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups:
            padded = lengths[groups[-1][0]] * (len(groups[-1]) + 1)
            if padded - tokens - lengths[i] <= PADDING_LIMIT * (tokens + lengths[i]):
                groups[-1].append(i)
                tokens += lengths[i]
                continue
        groups.append([i])
        tokens = lengths[i]
    return groups


# Of the batch at hand; None for padded ones. A global and not an argument of the model's forward, because the
# recomputation under activation checkpointing calls the layers again, on whichever thread autograd runs the backward.
_layout: PackedLayout | None = None


def set_layout(layout: PackedLayout | None) -> None:
    """Say how the next forwards' rows are packed; None: one sequence per row, padded at the end."""
    global _layout
    _layout = layout


def packed_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal self-attention in the form of transformers' attention interface.

    Args:
        query, key, value: [rows, heads, tokens, d]; fewer heads for key and value with grouped queries.
        attention_mask: ignored: sequences are causal and padded at the end.
        sliding_window: how many tokens back (itself included) a token sees; None = all.

    Returns:
        ([rows, tokens, heads, d], None).
    """
    layout = _layout
    if layout is None or layout.is_plain:
        return _causal(query, key, value, dropout, scaling, sliding_window).transpose(1, 2).contiguous(), None
    parts = zip(layout.unpack(query), layout.unpack(key), layout.unpack(value), strict=True)
    return layout.pack([_causal(*part, dropout, scaling, sliding_window) for part in parts]), None


def _causal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """Each row's tokens attend to what comes before them: [rows, heads, tokens, d]."""
    groups = query.shape[1] // key.shape[1]
    dtype, length = query.dtype, query.shape[2]
    if query.device.type == "cpu" and dtype == torch.bfloat16:
        # torch's bf16 attention backward on CPUs takes three times as long as the fp32 one.
        query, key, value = query.float(), key.float(), value.float()
    mask = None
    if sliding_window is not None and length > sliding_window:
        position = torch.arange(length, device=query.device)
        distance = position[:, None] - position[None, :]
        mask = (distance >= 0) & (distance < sliding_window)
        if groups > 1:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
            groups = 1
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        scale=scaling,
        is_causal=mask is None and length > 1,
        enable_gqa=groups > 1,
    ).to(dtype)


def register() -> None:
    """Make ``packed_sdpa`` known to transformers. It asks for no mask, since transformers builds none for it."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_sdpa)
