"""The keys and values of many rows that are decoded together, and whether a model's attention allows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch

from metasft.model.forward_pass import ForwardPass, running
from metasft.model.packed_attention import PackedSequences, sdpa, use_packed_attention


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
        window: int | None = None,
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
        result = sdpa(
            grouped, keys[:, :, window], values[:, :, window], self._mask[..., window], scaling=scaling, causal=False
        ).reshape(rows, -1, size)
        return (result if live is None else result.index_select(0, live)).unsqueeze(0)


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
            with running(ForwardPass(packed)):
                row = model(input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False).logits[0]
            cache.rebuild([], packed, [(0, packed.paths[1].nodes)], 1)
            with running(ForwardPass(cache)):
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
