"""Causal attention over packed sequences with torch's SDPA, for devices without flash attention's varlen kernels.

Packing puts all sequences of a batch into one row, so that no product runs over padding. Attention with a
block-diagonal mask over that row would cost the square of the row's length; here the sequences are laid side by side
(padded to the longest, for attention alone), each attends to itself, and the padding is dropped again. A causal query
never looks at what comes after it, so padding at the end needs no mask.

The trainers' engine uses it in place of ``sdpa``; with ``flash_attention_2`` nothing of this is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

NAME = "packed_sdpa"


class PackedLayout:
    """Where the sequences of one packed row lie.

    Args:
        lengths: tokens of each sequence, in order.
        device: of the index tensors.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.count, self.longest = len(lengths), max(lengths)
        self.is_plain = self.count == 1
        counts = torch.tensor(lengths)
        starts = counts.cumsum(0) - counts
        column = torch.arange(self.longest)
        # [count, longest]; padding points at the sequence's last token, whose result is never read.
        gather = starts[:, None] + torch.minimum(column[None, :], counts[:, None] - 1)
        inside = column[None, :] < counts[:, None]
        self.gather = gather.flatten().to(device, non_blocking=True)
        self.scatter = inside.flatten().nonzero().squeeze(-1).to(device, non_blocking=True)
        self.equal = len(set(lengths)) == 1

    def unpack(self, states: torch.Tensor) -> torch.Tensor:
        """[1, heads, tokens, d] -> [count, heads, longest, d]."""
        heads, _, size = states.shape[1:]
        rows = states[0].transpose(0, 1)  # [tokens, heads, d]
        if not self.equal:
            rows = rows.index_select(0, self.gather)
        return rows.reshape(self.count, self.longest, heads, size).transpose(1, 2)

    def pack(self, states: torch.Tensor) -> torch.Tensor:
        """[count, heads, longest, d] -> [1, tokens, heads, d]."""
        rows = states.transpose(1, 2).reshape(self.count * self.longest, states.shape[1], states.shape[3])
        if not self.equal:
            rows = rows.index_select(0, self.scatter)
        return rows.unsqueeze(0)


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
    packed = layout is not None and not layout.is_plain
    if packed:
        query, key, value = layout.unpack(query), layout.unpack(key), layout.unpack(value)
    groups = query.shape[1] // key.shape[1]
    on_cpu = query.device.type == "cpu"
    dtype = query.dtype
    if on_cpu and dtype == torch.bfloat16:
        # torch's bf16 attention backward on CPUs takes three times as long as the fp32 one.
        query, key, value = query.float(), key.float(), value.float()
    mask = None
    length = query.shape[2]
    if sliding_window is not None and length > sliding_window:
        position = torch.arange(length, device=query.device)
        distance = position[:, None] - position[None, :]
        mask = (distance >= 0) & (distance < sliding_window)
    if groups > 1 and mask is not None:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        groups = 1
    result = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        scale=scaling,
        is_causal=mask is None and length > 1,
        enable_gqa=groups > 1,
    ).to(dtype)
    return (layout.pack(result) if packed else result.transpose(1, 2).contiguous()), None


def register() -> None:
    """Make ``packed_sdpa`` known to transformers. It asks for no mask, since transformers builds none for it."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_sdpa)
