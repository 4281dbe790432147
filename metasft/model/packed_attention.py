"""Many sequences in one row: no padding, and what sequences of the same adapter open with is computed once.

A causal model gives two sequences the same states wherever they agree from the start: the system prompt and the wording
of a question, and for a test item its whole prompt, which the loss on the response and the generation both need. The
sequences of one *slot* (one set of adapted parameters) are therefore laid out as a prefix tree, one row entry per node;
all products with weights run over the nodes. In attention a sequence's own nodes look at the keys of its whole path::

    slot 0: "S A B", "S A C"      row: S A B | C        path of the second: S A C, its own nodes: C

Gradients flow through shared nodes from every sequence that passes through them, so that losses and gradients are those
of separate sequences. The same idea serves group rollouts in reinforcement learning (Prefix Grouper, arXiv 2506.05433)
and inference (RadixAttention, arXiv 2312.07104).

transformers' ``sdpa`` over a packed row would build a block-diagonal mask and pay for the square of the row's length;
here sequences of similar length are laid side by side (padded to the longest of them, for attention alone), each
attends to itself, and the padding is dropped again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from metasft.model.forward_pass import current
from metasft.model.inner_loop import upload

NAME = "packed_sdpa"
MAX_WASTE = 1.25
"""Largest ratio of computed to needed attention scores within one group of sequences."""


class Path(NamedTuple):
    """Where one sequence lies in the row: its nodes in order, and how many at the front are other sequences' own."""

    nodes: list[int]
    shared: int


class _Group(NamedTuple):
    """Sequences of similar shape, attended to together.

    Attributes:
        queries: [S, q] nodes whose queries are computed; padding repeats a node.
        keys: [S, k] nodes of the paths, likewise.
        depth: [S, q] place of each query in its path; None where queries and keys are the same nodes.
        inside: indices into the flattened [S * q] that are no padding.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    depth: torch.Tensor | None
    inside: torch.Tensor

    def mask(self, window: int | None) -> torch.Tensor | None:
        """Additive fp32 [S or 1, 1, q, k]; None where plain causal attention is meant."""
        length = self.keys.shape[1]
        if window is not None and window >= length:
            window = None
        if self.depth is None and window is None:
            return None
        column = torch.arange(length, device=self.keys.device)
        depth = column[None] if self.depth is None else self.depth
        # A query sees what is not after it; what pads the keys comes after all of them.
        distance = depth[:, :, None] - column[None, None]
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        return torch.zeros(hidden.shape, device=column.device).masked_fill_(hidden, float("-inf"))[:, None]


class PackedSequences:
    """Sequences of token ids as one row of prefix-tree nodes.

    Args:
        sequences: (slot, token ids), slots in ascending order.
        num_slots: slots of the adapter batch.
        device: of the tensors.
        share: False lays every sequence out on its own (dropout would otherwise hit all of them alike).
    """

    def __init__(
        self,
        sequences: Sequence[tuple[int, Sequence[int]]],
        num_slots: int,
        device: torch.device,
        *,
        share: bool = True,
    ) -> None:
        tokens: list[int] = []
        depths: list[int] = []
        self.counts = [0] * num_slots
        self.paths: list[Path] = []
        children: dict[tuple[int, int], int] = {}
        slot_before = -1
        for slot, ids in sequences:
            assert slot >= slot_before, (slot, slot_before)
            if slot != slot_before or not share:
                children, slot_before = {}, slot
            path: list[int] = []
            node, shared = -1, 0
            for depth, token in enumerate(ids):
                known = children.get((node, token))
                if known is None:
                    known = children[node, token] = len(tokens)
                    tokens.append(token)
                    depths.append(depth)
                    self.counts[slot] += 1
                else:
                    shared += 1
                node = known
                path.append(node)
            self.paths.append(Path(path, shared))
        self.nodes = len(tokens)
        self.tokens = sum(len(sequence.nodes) for sequence in self.paths)
        self.input_ids = upload(torch.tensor([tokens]), device)
        self.position_ids = upload(torch.tensor([depths]), device)
        self._groups = [self._group(members, device) for members in _similar(self.paths)]
        # Results come group by group; every node is some sequence's own exactly once.
        order = torch.cat([group.queries.flatten()[group.inside] for group in self._groups])
        self._restore = torch.empty_like(order)
        self._restore[order] = torch.arange(len(order), device=device)
        self._masks: dict[int | None, list[torch.Tensor | None]] = {}
        self.captured: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None

    def capture(self) -> None:
        """Keep keys and values, layer -> ([kv heads, nodes, d], the same), of the next forward."""
        self.captured = {}

    def _group(self, members: Sequence[Path], device: torch.device) -> _Group:
        own = [len(m.nodes) - m.shared for m in members]
        lengths = [len(m.nodes) for m in members]
        longest_own, longest = max(own), max(lengths)
        queries = torch.tensor(
            [m.nodes[m.shared :] + m.nodes[-1:] * (longest_own - n) for m, n in zip(members, own, strict=True)]
        )
        keys = torch.tensor([m.nodes + m.nodes[-1:] * (longest - n) for m, n in zip(members, lengths, strict=True)])
        column = torch.arange(longest_own)
        inside = (column[None] < torch.tensor(own)[:, None]).flatten().nonzero().squeeze(-1)
        depth = None
        if any(m.shared for m in members):
            depth = upload(torch.tensor([m.shared for m in members])[:, None] + column[None], device)
        return _Group(upload(queries, device), upload(keys, device), depth, upload(inside, device))

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
    ) -> torch.Tensor:
        """Causal attention of every node along its path.

        Args:
            query: [1, heads, nodes, d].
            key, value: [1, kv heads, nodes, d].
            window: how many tokens of its path a node sees, itself included; None = all.

        Returns:
            [1, nodes, heads, d].
        """
        if window not in self._masks:  # the same for all layers
            self._masks[window] = [group.mask(window) for group in self._groups]
        if self.captured is not None:
            self.captured[layer] = (key[0], value[0])
        query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))  # [nodes, heads, d]
        results = []
        for group, mask in zip(self._groups, self._masks[window], strict=True):
            q, k, v = _pick(query, group.queries), _pick(key, group.keys), _pick(value, group.keys)
            attended = sdpa(q, k, v, mask, scaling=scaling, dropout=dropout, causal=mask is None)
            results.append(attended.transpose(1, 2).flatten(0, 1).index_select(0, group.inside))
        return torch.cat(results).index_select(0, self._restore).unsqueeze(0)


def _pick(states: torch.Tensor, nodes: torch.Tensor) -> torch.Tensor:
    """[nodes, heads, d] and [S, n] -> [S, heads, n, d]; its gradient adds up where a node is picked repeatedly."""
    picked = states.index_select(0, nodes.flatten())
    return picked.view(*nodes.shape, *states.shape[1:]).transpose(1, 2)


def _similar(sequences: Sequence[Path]) -> list[list[Path]]:
    """Groups of sequences with nodes of their own whose padded attention wastes little."""
    groups: list[list[Path]] = []
    for with_prefix in (False, True):
        candidates = [s for s in sequences if bool(s.shared) is with_prefix and len(s.nodes) > s.shared]
        candidates.sort(key=lambda s: (len(s.nodes) - s.shared, len(s.nodes)))
        group: list[Path] = []
        needed = longest = 0
        for sequence in candidates:
            own = len(sequence.nodes) - sequence.shared
            area, width = own * len(sequence.nodes), max(longest, len(sequence.nodes))
            if group and (len(group) + 1) * own * width > MAX_WASTE * (needed + area):
                groups.append(group)
                group, needed, width = [], 0, len(sequence.nodes)
            group.append(sequence)
            needed, longest = needed + area, width
        if group:
            groups.append(group)
    return groups


def sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float | None,
    causal: bool,
    dropout: float = 0.0,
) -> torch.Tensor:
    """torch's attention with grouped queries, in the precision that is fast: [S, heads, q, d], [S, kv heads, k, d]."""
    dtype = query.dtype
    if query.device.type == "cpu" and dtype == torch.bfloat16 and torch.is_grad_enabled():
        # torch's bf16 attention backward on CPUs takes three times as long as the fp32 one.
        query, key, value = query.float(), key.float(), value.float()
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and query.device.type != "cpu" and mask is not None:
        # On a GPU grouped queries with a mask fall back to the slow kernel.
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        groups = 1
    result = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask.to(query.dtype) if mask is not None else None,
        dropout_p=dropout,
        is_causal=causal,
        scale=scaling,
        enable_gqa=groups > 1,
    )
    return result.to(dtype)


def packed_sdpa(
    module: Any,
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
        attention_mask: ignored: a causal query never looks at what comes after it, so padding at the end needs no mask.
        sliding_window: how many tokens back (itself included) a token sees; None = all.

    Returns:
        ([rows, tokens, heads, d], None).
    """
    if (rows := current().rows) is not None:
        result = rows.attend(
            module.layer_idx, query, key, value, scaling=scaling, dropout=dropout, window=sliding_window
        )
        return result.contiguous(), None
    length, mask = query.shape[2], None
    if sliding_window is not None and length > sliding_window:
        column = torch.arange(length, device=query.device)
        mask = _Group(column[None], column[None], None, column).mask(sliding_window)
    result = sdpa(query, key, value, mask, scaling=scaling, dropout=dropout, causal=mask is None and length > 1)
    return result.transpose(1, 2).contiguous(), None


def use_packed_attention(model: Any) -> None:
    """Let all layers of a transformers model attend as the rows of the pass say (:mod:`metasft.model.forward_pass`).

    transformers builds no mask for an attention that it does not know.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_sdpa)
    model.set_attn_implementation(NAME)
