"""Many sequences in one row: no padding, and what sequences of the same adapter open with is computed once.

A causal model gives two sequences the same states wherever they agree from the start: the system prompt and the wording
of a question, and for a test item its whole prompt, which the loss on the response and the generation both need. The
sequences of one *slot* (one set of adapted parameters) are therefore laid out as a prefix tree, one row entry per node;
all products with weights run over the nodes. In attention a sequence's own nodes look at the keys of its whole path::

    slot 0: "S A B", "S A C"      row: S A B | C        path of the second: S A C, its own nodes: C

Gradients flow through shared nodes from every sequence that passes through them, so that losses and gradients are those
of separate sequences. The same idea serves group rollouts in reinforcement learning (Prefix Grouper, arXiv 2506.05433)
and inference (RadixAttention, arXiv 2312.07104).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

NAME = "few_shot_packed"
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
        mask: additive fp32 [S, 1, q, k]; None where plain causal attention is meant (queries are keys).
        inside: indices into the flattened [S * q] that are no padding.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    mask: torch.Tensor | None
    inside: torch.Tensor


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
        self.input_ids = torch.tensor([tokens], device=device)
        self.position_ids = torch.tensor([depths], device=device)
        self._groups = [self._group(members, device) for members in _similar(self.paths)]
        # Results come group by group; every node is some sequence's own exactly once.
        order = torch.cat([group.queries.flatten()[group.inside] for group in self._groups])
        self._restore = torch.empty_like(order)
        self._restore[order] = torch.arange(len(order), device=device)
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
        mask = None
        if any(m.shared for m in members):
            # A query at depth t of its path sees the keys 0 .. t; what pads the keys lies behind all of them.
            depth = torch.tensor([m.shared for m in members])[:, None] + column[None]
            hidden = torch.arange(longest)[None, None] > depth[:, :, None]
            mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))[:, None].to(device)
        return _Group(queries.to(device), keys.to(device), mask, inside.to(device))

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float | None,
        dropout: float,
    ) -> torch.Tensor:
        """Causal attention of every node along its path.

        Args:
            query: [1, heads, nodes, d].
            key, value: [1, kv heads, nodes, d].

        Returns:
            [1, nodes, heads, d].
        """
        if self.captured is not None:
            self.captured[layer] = (key[0], value[0])
        query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))  # [nodes, heads, d]
        results = []
        for group in self._groups:
            q, k, v = _pick(query, group.queries), _pick(key, group.keys), _pick(value, group.keys)
            attended = _sdpa(q, k, v, group.mask, scaling=scaling, dropout=dropout, causal=group.mask is None)
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


class RowCache:
    """Keys and values of rows that are being decoded, aligned at their right end: all write the same column.

    Args:
        slots: the slot of each row, in ascending order.
    """

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self.width = 0  # columns in use
        self.lengths: list[int] = []  # tokens of each row
        self.slots: list[int] = []
        self._keys: dict[int, torch.Tensor] = {}  # layer -> [rows, kv heads, capacity, d]
        self._values: dict[int, torch.Tensor] = {}
        self._mask: torch.Tensor | None = None  # additive [rows, 1, 1, capacity]
        self._live: torch.Tensor | None = None  # rows that are still decoded; None: all
        self._live_rows: list[int] = []

    @property
    def rows(self) -> list[int]:
        """Numbers of the rows still decoded."""
        return self._live_rows

    @property
    def size(self) -> int:
        """Rows held in memory, finished ones included."""
        return len(self.lengths)

    def rebuild(
        self,
        keep: Sequence[int],
        packed: PackedSequences | None,
        added: Sequence[tuple[int, Sequence[int]]],
        room: int,
    ) -> None:
        """Keep some rows, and add the paths ``added`` (slot, nodes) of ``packed``, which has captured its keys.

        Args:
            room: columns to decode into before the next rebuild.
        """
        lengths = [self.lengths[row] for row in keep] + [len(path) for _, path in added]
        slots = [self.slots[row] for row in keep] + [slot for slot, _ in added]
        assert slots == sorted(slots), slots
        width = max(lengths, default=0)
        if lengths:
            reused = max((self.lengths[row] for row in keep), default=0)
            layers = packed.captured if packed is not None else self._keys
            for layer in list(layers):
                for store, part in ((self._keys, 0), (self._values, 1)):
                    like = packed.captured[layer][part] if packed is not None else store[layer][0]
                    fresh = like.new_zeros(len(lengths), like.shape[0], width + room, like.shape[2])
                    if keep:
                        index = torch.tensor(keep, device=like.device)
                        old = store[layer][:, :, self.width - reused : self.width]
                        fresh[: len(keep), :, width - reused : width] = old[index]
                    for row, (_, path) in enumerate(added, start=len(keep)):
                        nodes = torch.tensor(path, device=like.device)
                        fresh[row, :, width - len(path) : width] = like.index_select(1, nodes)
                    store[layer] = fresh
            device = fresh.device
            column = torch.arange(width + room, device=device)
            first = width - torch.tensor(lengths, device=device)
            hidden = column[None] < first[:, None]
            self._mask = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, float("-inf"))[:, None, None]
        self.lengths, self.slots, self.width = lengths, slots, width
        self._capacity = width + room
        self._live, self._live_rows = None, list(range(len(lengths)))

    def finish(self, rows: Sequence[int]) -> None:
        """Stop decoding ``rows``; their memory goes with the next rebuild."""
        gone = set(rows)
        self._live_rows = [row for row in self._live_rows if row not in gone]
        self._live = torch.tensor(self._live_rows, device=self._mask.device)

    @property
    def counts(self) -> list[int]:
        """Live rows per slot."""
        counts = [0] * self._num_slots
        for row in self._live_rows:
            counts[self.slots[row]] += 1
        return counts

    def position_ids(self) -> torch.Tensor:
        """[1, live rows]: the position of the token that comes next."""
        return torch.tensor([[self.lengths[row] for row in self._live_rows]], device=self._mask.device)

    def advance(self) -> None:
        """Count the column that the last forward wrote."""
        self.width += 1
        self.lengths = [length + 1 for length in self.lengths]

    @property
    def full(self) -> bool:
        return self.width >= self._capacity

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float | None,
        dropout: float,
    ) -> torch.Tensor:
        """One new token per live row: [1, heads, rows, d], twice [1, kv heads, rows, d] -> [1, rows, heads, d]."""
        query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))  # [rows, heads, d]
        keys, values, width = self._keys[layer], self._values[layer], self.width
        live, rows = self._live, self.size
        if live is None:
            keys[:, :, width], values[:, :, width] = key, value
        else:
            keys[live, :, width], values[live, :, width] = key, value
            query = query.new_zeros(rows, *query.shape[1:]).index_copy_(0, live, query)
        kv_heads, size = keys.shape[1], keys.shape[3]
        # The heads that share a key are its queries: grouped-query attention without repeating the keys.
        grouped = query.reshape(rows, kv_heads, -1, size)
        window = slice(0, width + 1)
        result = _sdpa(
            grouped, keys[:, :, window], values[:, :, window], self._mask[..., window], scaling=scaling, causal=False
        ).reshape(rows, -1, size)
        return (result if live is None else result.index_select(0, live)).unsqueeze(0)


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float | None,
    causal: bool,
    dropout: float = 0.0,
) -> torch.Tensor:
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


# What the next forwards' rows are. Not an argument of the model's forward: it does not pass unknown arguments on.
_rows: PackedSequences | RowCache | None = None


@contextmanager
def rows_are(rows: PackedSequences | RowCache) -> Iterator[None]:
    """Say what the rows of the forwards in this context are."""
    global _rows
    before, _rows = _rows, rows
    try:
        yield
    finally:
        _rows = before


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention in the form of transformers' attention interface."""
    assert _rows is not None, "a forward outside of rows_are()"
    result = _rows.attend(module.layer_idx, query, key, value, scaling=scaling, dropout=dropout)
    return result.contiguous(), None


def use_packed_attention(model: torch.nn.Module) -> None:
    """Let all layers of a transformers model attend as the rows of :func:`rows_are` say."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attention)
    model.set_attn_implementation(NAME)


@torch.no_grad()
def why_not_packed(
    model: torch.nn.Module,
    precision: Callable[[], AbstractContextManager],
    samples: tuple[Sequence[int], Sequence[int]],
    longest: int,
) -> str | None:
    """Try packed rows on a model, and leave it with packed attention if they work.

    Attention that is more than causal softmax attention over all tokens before (soft caps, sinks, windows shorter than
    ``longest`` tokens, recurrent layers) gives other logits than the model's own forward, and keeps the latter.

    Args:
        precision: context of the forwards (autocast).
        samples: two texts as token ids that open alike and then differ. Real text: on nonsense, bf16 logits are noise.

    Returns:
        None, or in words why the model keeps its own attention.
    """
    settings = model.config.get_text_config()
    window = getattr(settings, "sliding_window", None) if getattr(settings, "use_sliding_window", True) else None
    if window is not None and window < longest:
        return f"its attention looks back {window} tokens only"
    device = model.get_input_embeddings().weight.device
    with precision():
        expected = [model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0] for ids in samples]
    own = model.config._attn_implementation
    reason = "its layers do not use transformers' attention interface"
    try:
        use_packed_attention(model)
        first, second = samples
        packed = PackedSequences([(0, first), (0, second[:-1])], 1, device)
        packed.capture()
        cache = RowCache(1)
        with precision():
            with rows_are(packed):
                row = model(input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False).logits[0]
            cache.rebuild([], packed, [(0, packed.paths[1].nodes)], 1)
            with rows_are(cache):
                token = torch.tensor([second[-1:]], device=device)
                last = model(input_ids=token, position_ids=cache.position_ids(), use_cache=False).logits[0]
        ours = [row[packed.paths[0].nodes], torch.cat([row[packed.paths[1].nodes], last])]
        errors = torch.cat([(a.float() - b.float()).abs().amax(dim=-1) for a, b in zip(ours, expected, strict=True)])
        errors = errors / max(float(logits.abs().max()) for logits in expected)
        # bf16 rounds differently in another order, much so at single tokens; a wrong attention is off everywhere.
        loose = expected[0].dtype == torch.bfloat16 or model.dtype == torch.bfloat16
        error = float(errors.median() if loose else errors.max())
        if error < (0.1 if loose else 1e-3):
            return None
        reason = f"its logits over packed rows are off by {error:.2%}"
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as problem:
        reason += f" ({type(problem).__name__})"
    model.set_attn_implementation(own)
    return reason
