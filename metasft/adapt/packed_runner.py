"""Adapting and testing several sets of adapted parameters at once, over rows without padding.

A *slot* is one set of adapted parameters: one adapter of a :class:`~metasft.model.stacked_lora.TaskBatchedLoRA`, or the
model's own parameters under an :class:`~metasft.model.inner_loop.InnerLoop`, which has one slot.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy

from metasft.adapt.row_cache import RowCache
from metasft.files.untrusted import reason
from metasft.model.forward_pass import ForwardPass, LowerLayers, running
from metasft.model.inner_loop import Adaptation
from metasft.model.lower_layers import base_model, decoder_layers, in_rows, watch_decoder_layers
from metasft.model.packed_attention import PackedSequences

if TYPE_CHECKING:
    from metasft.data.task_sets import TokenizedSet

Example = Mapping[str, torch.Tensor]
"""One tokenised example: ``input_ids``, ``position_ids`` and ``loss_mask``, each [tokens]; with ``features``, [tokens,
hidden size], what the lower layers make of it, update steps start from there."""


TWO_PARTS_TOLERANCE = 1e-3
"""Largest difference of logits relative to the largest logit: the same products are computed in two parts."""


class TestItem(NamedTuple):
    """A test item as token ids.

    Attributes:
        prompt: what the model continues.
        ids: prompt and reference response, as in training.
        targets: positions in ``ids`` of the response's tokens, those that count in the loss.
    """

    __test__ = False  # pytest would take it for a test class

    prompt: list[int]
    ids: list[int]
    targets: list[int]

    @classmethod
    def of(cls, examples: TokenizedSet, index: int) -> TestItem:
        """The example at ``index``."""
        example = examples[index]
        return cls(examples.prompt_ids(index), example["input_ids"].tolist(), response_targets(example))

    @property
    def draft(self) -> list[int]:
        """The reference response's tokens, where ``ids`` continues the prompt; else nothing."""
        size = len(self.prompt)
        return self.ids[size:] if self.ids[:size] == self.prompt else []


class Tested(NamedTuple):
    """One test item under one slot: ``nll`` in nats over ``tokens`` response tokens, and the generated token ids."""

    nll: float
    tokens: int
    output: list[int]


@dataclass
class TokenCount:
    """What the forwards worked on.

    Attributes:
        sequences: tokens of all sequences that were read.
        computed: entries that went through the model for them, fewer where they share what they open with.
        decoded: entries of the generation, one per token and row.
        padding: entries of ``computed`` that stand for no token.
    """

    sequences: int = 0
    computed: int = 0
    decoded: int = 0
    padding: int = 0

    def as_settings(self) -> dict[str, float]:
        """For the settings file: the counts, and the share of the entries that are padding."""
        entries = max(1, self.computed)
        return {
            "of_sequences": self.sequences,
            "computed": self.computed,
            "decoded": self.decoded,
            "padding_fraction": round(self.padding / entries, 4),
        }


@dataclass
class Budget:
    """How much goes into one forward.

    Attributes:
        adapt_tokens: tokens of one forward and backward.
        test_tokens: tokens of one forward without gradient.
        logits_bytes: of fp32 logits at a time.
        cache_bytes: of keys and values of rows that are decoded together.
    """

    adapt_tokens: int
    test_tokens: int
    logits_bytes: int
    cache_bytes: int

    @classmethod
    def of(cls, device: torch.device) -> Budget:
        """A CPU core has its products at full speed from a few hundred rows on; a GPU wants thousands."""
        if device.type == "cpu":
            return cls(adapt_tokens=1024, test_tokens=2048, logits_bytes=2**28, cache_bytes=2**30)
        return cls(adapt_tokens=8192, test_tokens=16384, logits_bytes=2**30, cache_bytes=2**33)


@dataclass
class PackedRunner:
    """Forwards of a model whose attention is :func:`~metasft.model.packed_attention.use_packed_attention`.

    Attributes:
        model: the model, in evaluation mode but for adaptation with dropout.
        precision: context of every forward (autocast).
        stop: token ids that end a generation.
        max_new_tokens: longest generation.
        batch_size: rows decoded together.
        share: whether sequences of a slot share what they open with, in adaptation.
    """

    model: Any
    device: torch.device
    precision: Callable[[], AbstractContextManager]
    stop: Collection[int]
    max_new_tokens: int
    batch_size: int
    share: bool = True
    budget: Budget = None  # type: ignore[assignment]
    tokens: TokenCount = field(default_factory=TokenCount)
    lowest_layer: int = 0
    """Number of the decoder layer that update steps start at, where those below are computed once per example."""

    def __post_init__(self) -> None:
        self.budget = self.budget or Budget.of(self.device)

    # ---- adaptation --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def start_at(self, lowest_layer: int, samples: Sequence[Sequence[int]]) -> str:
        """Let update steps start at a decoder layer, if that computes the same.

        Args:
            lowest_layer: number of that layer.
            samples: texts as token ids, to try it on.

        Returns:
            In words, why they do not; empty where they do.
        """
        try:
            watch_decoder_layers(decoder_layers(base_model(self.model)))
        except (AttributeError, ValueError) as error:
            return reason(error)
        packed = PackedSequences([(0, ids) for ids in samples], 1, self.device)
        expected = self._forward(packed, packed, None, None)
        lower = LowerLayers(lowest_layer)
        self._forward(packed, packed, [], [0], lower)
        found = self._forward(packed, packed, None, None, LowerLayers(lowest_layer, lower.found))
        share = float((found - expected).abs().max() / expected.abs().max())
        if not share < TWO_PARTS_TOLERANCE:
            return f"its logits are off by {share:.2%}"
        self.lowest_layer = lowest_layer
        return ""

    @torch.no_grad()
    def with_features(self, examples: Sequence[Example]) -> list[Example]:
        """The examples with what the layers below :attr:`lowest_layer` make of them."""
        found: list[Example] = []
        for some in self._split([(0, [example]) for example in examples]):
            packed = PackedSequences(
                [(0, example["input_ids"].tolist()) for _, (example,) in some], 1, self.device, share=self.share
            )
            lower = LowerLayers(self.lowest_layer)
            self._forward(packed, packed, [], [0], lower)
            assert lower.found is not None
            for (_, (example,)), path in zip(some, packed.paths, strict=True):
                found.append({**example, "features": lower.found[0, path.nodes]})
        return found

    def step(
        self, adaptation: Adaptation, batches: Sequence[tuple[int, Sequence[Example]]], num_slots: int
    ) -> torch.Tensor:
        """One update step: every slot in ``batches`` along the gradient of the mean response loss of its examples.

        Args:
            batches: (slot, examples), slots in ascending order.

        Returns:
            the loss of each batch before the step, [batches].
        """
        losses = []
        for some in self._split(batches):
            whole = [(slot, example, response_targets(example)) for slot, examples in some for example in examples]
            # The last token of a response is predicted and predicts nothing.
            sequences = [(slot, example["input_ids"][: last[-1]].tolist()) for slot, example, last in whole]
            packed = PackedSequences(sequences, num_slots, self.device, share=self.share)
            nodes: list[int] = []
            labels: list[int] = []
            batch_of: list[int] = []
            output_counts = [0] * num_slots
            numbers = [number for number, (_, examples) in enumerate(some) for _ in examples]
            for number, (slot, example, targets), path in zip(numbers, whole, packed.paths, strict=True):
                nodes += [path.nodes[target - 1] for target in targets]
                labels += example["input_ids"][targets].tolist()
                batch_of += [number] * len(targets)
                output_counts[slot] += len(targets)
            lower = None
            if self.lowest_layer:
                features = [example["features"] for _, example, _ in whole]
                given = in_rows(features, [path.nodes for path in packed.paths], packed.nodes)
                lower = LowerLayers(self.lowest_layer, given[None])
            logits = self._forward(packed, packed, nodes, output_counts, lower)
            batch = torch.tensor(batch_of, device=self.device)
            nll = cross_entropy(logits.float(), torch.tensor(labels, device=self.device), reduction="none")
            mean = nll.new_zeros(len(some)).index_add(0, batch, nll) / torch.bincount(batch, minlength=len(some))
            # Slots share no parameter: the gradient of the sum holds each slot's own gradient.
            mean.sum().backward()
            losses.append(mean.detach())
        adaptation.step()
        return torch.cat(losses)

    def _split(self, batches: Sequence[tuple[int, Sequence[Example]]]) -> Iterator[list[tuple[int, Sequence[Example]]]]:
        some: list[tuple[int, Sequence[Example]]] = []
        total = 0
        for slot, examples in batches:
            size = sum(len(example["input_ids"]) for example in examples)
            if some and total + size > self.budget.adapt_tokens:
                yield some
                some, total = [], 0
            some.append((slot, examples))
            total += size
        if some:
            yield some

    # ---- test --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def test(
        self, adaptation: Adaptation, rows: Sequence[tuple[int, TestItem]], num_slots: int, *, generate: bool
    ) -> Iterator[tuple[int, Tested]]:
        """Loss on the reference response and greedy generation of every row, a test item under a slot.

        The loss's forward over prompt and response fills the cache that the generation starts from. It also tells
        what the model would have said at each place of the reference response: as long as that is the reference's next
        token, generation has already happened (speculative decoding, arXiv 2211.17192, with the reference as the
        draft; the output is the model's own greedy choice throughout).

        Args:
            rows: (slot, item), slots in ascending order; rows of a slot should be sorted by their ids, since neighbours
                share what they open with.
            generate: False measures the loss alone.

        Yields:
            (index into ``rows``, result), as rows are finished.
        """
        pending = deque(range(len(rows)))
        cache = RowCache(num_slots)
        row_of: list[int] = []  # row of the cache -> index into rows
        outputs: dict[int, list[int]] = {}
        losses: dict[int, tuple[float, int]] = {}
        while pending or cache.rows:
            taken: list[int] = []
            if pending and len(cache.rows) <= self.batch_size // 2:
                taken = self._take(pending, rows, self.batch_size - len(cache.rows), cache, generate)
            if taken:
                packed, unfinished = self._read(taken, rows, num_slots, outputs, losses, generate)
                for index in taken:
                    if index not in unfinished:
                        yield index, Tested(*losses.pop(index), outputs.pop(index, []))
                if unfinished:
                    row_of = [row_of[row] for row in cache.rows] + list(unfinished)
                    added = [(rows[index][0], path) for index, path in unfinished.items()]
                    cache.rebuild(cache.rows, packed, added, self._room(row_of, outputs))
                continue
            if cache.full or len(cache.rows) <= cache.size // 2:
                row_of = [row_of[row] for row in cache.rows]
                cache.rebuild(cache.rows, None, [], self._room(row_of, outputs))
            finished = self._decode(cache, [outputs[row_of[row]] for row in cache.rows])
            for row in finished:
                index = row_of[row]
                yield index, Tested(*losses.pop(index), outputs.pop(index))
            cache.finish(finished)

    def _take(
        self, pending: deque[int], rows: Sequence[tuple[int, TestItem]], limit: int, cache: RowCache, generate: bool
    ) -> list[int]:
        """The next rows that go through the model together; none where they should wait for the cache to empty."""
        config = self.model.config.get_text_config()
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        per_token = 2 * 4 * config.num_hidden_layers * kv_heads * head
        taken: list[int] = []
        tokens = logits = 0
        longest = max((cache.lengths[row] for row in cache.rows), default=0)
        while pending and len(taken) < limit:
            slot, item = rows[pending[0]]
            before = rows[taken[-1]] if taken else None
            # Sorted rows: what a row shares with any before it, it shares with the last one.
            tokens += len(item.ids) - (_common(before[1].ids, item.ids) if before and before[0] == slot else 0)
            logits += len(item.ids) - min(item.targets[0], len(item.prompt)) + 1
            longest = max(longest, len(item.ids))
            cached = (len(cache.rows) + len(taken) + 1) * (longest + self.max_new_tokens) * per_token
            if generate and cached > self.budget.cache_bytes and (taken or cache.rows):
                if not cache.rows:
                    break
                # Beside the rows under way there is no room for many: taken few at a time, they would share little.
                pending.extendleft(reversed(taken))
                return []
            if taken and (
                tokens > self.budget.test_tokens or logits * 4 * config.vocab_size > self.budget.logits_bytes
            ):
                break
            taken.append(pending.popleft())
        return taken

    def _room(self, indices: Sequence[int], outputs: Mapping[int, list[int]]) -> int:
        return self.max_new_tokens - min((len(outputs[index]) for index in indices), default=0)

    def _read(
        self,
        taken: Sequence[int],
        rows: Sequence[tuple[int, TestItem]],
        num_slots: int,
        outputs: dict[int, list[int]],
        losses: dict[int, tuple[float, int]],
        generate: bool,
    ) -> tuple[PackedSequences, dict[int, list[int]]]:
        """Run prompts and reference responses through the model: losses, and outputs as far as the draft carries.

        Returns:
            (the row with its keys, index -> path of the tokens whose keys the rest of the generation needs).
        """
        sequences: list[tuple[int, list[int]]] = []
        place_of: dict[int, tuple[int, int]] = {}  # index -> its sequences: reference, prompt
        for index in taken:
            slot, item = rows[index]
            place_of[index] = (len(sequences), len(sequences))
            sequences.append((slot, item.ids))
            if generate and item.ids[: len(item.prompt)] != item.prompt:
                place_of[index] = (len(sequences) - 1, len(sequences))
                sequences.append((slot, item.prompt))
        packed = PackedSequences(sequences, num_slots, self.device)
        if generate:
            packed.capture()
        logit_of: dict[int, int] = {}  # node -> its row of the logits
        targets: list[tuple[int, int]] = []  # (row of the logits, token to predict), item after item
        output_counts = [0] * num_slots
        last = {}
        for index in taken:
            slot, item = rows[index]
            reference, prompt = (packed.paths[place].nodes for place in place_of[index])
            before = len(logit_of)
            for target in item.targets:
                node = reference[target - 1]
                targets.append((logit_of.setdefault(node, len(logit_of)), item.ids[target]))
            if generate:
                start = len(item.prompt) - 1
                last[index] = min(start + len(item.draft), start + self.max_new_tokens - 1)
                for position in range(start, last[index] + 1):
                    logit_of.setdefault(prompt[position], len(logit_of))
            output_counts[slot] += len(logit_of) - before
        logits = self._forward(packed, packed, list(logit_of), output_counts).float()
        picked = torch.tensor(targets, device=self.device)
        nll = (logits.logsumexp(dim=-1)[picked[:, 0]] - logits[picked[:, 0], picked[:, 1]]).double().tolist()
        choice = logits.argmax(dim=-1).tolist() if generate else []
        unfinished: dict[int, list[int]] = {}
        done = 0
        for index in taken:
            item = rows[index][1]
            count = len(item.targets)
            losses[index] = (sum(nll[done : done + count]), count)
            done += count
            if not generate:
                continue
            path = packed.paths[place_of[index][1]].nodes
            start, output, draft = len(item.prompt) - 1, [], item.draft
            for position in range(start, last[index] + 1):
                token = choice[logit_of[path[position]]]
                output.append(token)
                if self._ends(output):
                    break
                accepted = position - start
                if accepted >= len(draft) or draft[accepted] != token:
                    unfinished[index] = path[: position + 1]
                    break
            outputs[index] = output
        return packed, unfinished

    def _ends(self, output: Sequence[int]) -> bool:
        return output[-1] in self.stop or len(output) >= self.max_new_tokens

    def _decode(self, cache: RowCache, outputs: Sequence[list[int]]) -> list[int]:
        """One more token for every live row, appended to its output; returns the rows that have ended."""
        tokens = torch.tensor([[output[-1] for output in outputs]], device=self.device)
        counts = cache.counts
        logits = self._forward(cache, _Rows(tokens, cache.position_ids(), counts), None, counts)
        self.tokens.decoded += len(outputs)
        cache.advance()
        finished = []
        for row, output, token in zip(cache.rows, outputs, logits.argmax(dim=-1).tolist(), strict=True):
            output.append(token)
            if self._ends(output):
                finished.append(row)
        return finished

    # ---- the model ---------------------------------------------------------------------------------------------------

    def _forward(
        self,
        rows: PackedSequences | RowCache,
        entries: Any,
        nodes: Sequence[int] | None,
        outputs: Any,
        lower: LowerLayers | None = None,
    ) -> torch.Tensor:
        """Logits [nodes, vocabulary] at ``nodes`` (None: everywhere)."""
        if isinstance(rows, PackedSequences):
            self.tokens.sequences += rows.tokens
            self.tokens.computed += rows.nodes
        keep = 0 if nodes is None else torch.tensor(nodes, dtype=torch.long, device=self.device)
        with running(ForwardPass(rows, entries.counts, outputs, lower=lower)), self.precision():
            logits = self.model(
                input_ids=entries.input_ids,
                position_ids=entries.position_ids,
                attention_mask=None,
                logits_to_keep=keep,
                use_cache=False,
            ).logits
        return logits[0]


class _Rows(NamedTuple):
    """The next token of each row of a cache, in the form of a packed row."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    counts: list[int]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences open alike with."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))


def response_targets(example: Example) -> list[int]:
    """Positions of the response's tokens; the first token of all has nothing to be predicted from."""
    return [position for position in example["loss_mask"].nonzero().flatten().tolist() if position > 0]
