"""Adapting and testing over padded batches with the model's own attention and transformers' ``generate``.

For models whose attention :mod:`metasft.adapt.row_cache` does not cover; one slot at a time. The results are the
same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from metasft.adapt.packed_runner import Example, Tested, TestItem, TokenCount, response_targets
from metasft.model.inner_loop import Adaptation


@dataclass
class PaddedRunner:
    """The counterpart of :class:`~metasft.adapt.packed_runner.PackedRunner`, with the same methods and one slot.

    Attributes:
        pad: token id that pads.
    """

    model: Any
    device: torch.device
    precision: Callable[[], AbstractContextManager]
    pad: int
    max_new_tokens: int
    batch_size: int
    tokens: TokenCount = field(default_factory=TokenCount)
    lowest_layer: int = 0
    """As of ``PackedRunner``; here every step runs all layers."""

    def step(
        self, adaptation: Adaptation, batches: Sequence[tuple[int, Sequence[Example]]], num_slots: int
    ) -> torch.Tensor:
        """One update step along the gradient of the mean response loss; returns that loss, [1]."""
        ((_, examples),) = batches
        rows = [example["input_ids"].tolist() for example in examples]
        nll, tokens = self._response_nll(rows, [response_targets(example) for example in examples])
        loss = nll.sum() / tokens.sum()
        loss.backward()
        adaptation.step()
        return loss.detach()[None]

    @torch.no_grad()
    def test(
        self, adaptation: Adaptation, rows: Sequence[tuple[int, TestItem]], num_slots: int, *, generate: bool
    ) -> Iterator[tuple[int, Tested]]:
        """Loss on the reference response and greedy generation of every row."""
        # The longest first: what does not fit in memory fails at once.
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index][1].ids))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            items = [rows[index][1] for index in batch]
            nll, tokens = self._response_nll([item.ids for item in items], [item.targets for item in items])
            outputs = self._generate([item.prompt for item in items]) if generate else [[]] * len(items)
            for index, sum_, count, output in zip(batch, nll.double().tolist(), tokens.tolist(), outputs, strict=True):
                yield index, Tested(sum_, count, output)

    def _response_nll(
        self, rows: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum of the negative log-likelihoods in nats [rows], response tokens [rows])."""
        input_ids, attention_mask = self._left_padded(rows)
        width = input_ids.shape[1]
        wanted = torch.zeros(len(rows), width - 1, dtype=torch.bool)  # position t predicts token t + 1
        for number, (row, places) in enumerate(zip(rows, targets, strict=True)):
            wanted[number, [width - len(row) + place - 1 for place in places]] = True
        wanted = wanted.to(self.device)
        # With the padding on the left, responses share their columns: the output layer, a large share of a small
        # model's work, runs over those alone.
        columns = wanted.any(dim=0).nonzero().squeeze(-1)
        with self.precision():
            logits = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=(attention_mask.cumsum(dim=-1) - 1).clamp(min=0),
                logits_to_keep=columns,
                use_cache=False,
            ).logits
        self.tokens.sequences += int(attention_mask.sum())
        self.tokens.computed += attention_mask.numel()
        self.tokens.padding += attention_mask.numel() - int(attention_mask.sum())
        chosen = wanted[:, columns]
        losses = cross_entropy(logits[chosen].float(), input_ids[:, columns + 1][chosen], reduction="none")
        return losses.new_zeros(len(rows)).index_add(0, chosen.nonzero()[:, 0], losses), chosen.sum(dim=1)

    def _generate(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        input_ids, attention_mask = self._left_padded(prompts)
        with self.precision():
            generated = self.model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                use_cache=True,
            )
        return generated[:, input_ids.shape[1] :].tolist()

    def _left_padded(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """(token ids, attention mask), both [rows, longest]."""
        width = max(len(row) for row in rows)
        values = torch.tensor([[self.pad] * (width - len(row)) + list(row) for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return values.to(self.device), mask.to(self.device)
