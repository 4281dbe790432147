"""The passes of a meta-step through the model: which episodes share one, their inner loops and their query losses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from metasft.backend.batches import count_micro_batches, make_batch
from metasft.backend.engine import MetaFSDPEngine
from metasft.config.training import MetaConfig
from metasft.data.episodes import Episode
from metasft.data.task_sets import TokenizedSet
from metasft.model.inner_loop import Adaptation, Rates
from metasft.model.second_order import Tape
from metasft.model.stacked_lora import TaskBatchedLoRA
from metasft.training.meta_step import split_into_passes
from metasft.training.metrics import EpisodeRecord
from metasft.training.update_rules import MetaGradient

CPU_TOKENS, CPU_TOKENS_ALONE = 512, 256
"""Where tasks in one pass stop gaining on a CPU core (docs/performance.md, one inner step)."""


class EpisodeRunner:
    """Runs the episodes that this rank works on.

    Args:
        engine: with the model.
        inner_loop: of its trained parameters.
        meta: the ``meta`` group.
        support_sets: of each task.
        query_sets: of each task that has one.
        batch_settings: of :func:`metasft.backend.batches.make_batch`.
        on_cpu: whether the engine computes there.
    """

    def __init__(
        self,
        engine: MetaFSDPEngine,
        inner_loop: Adaptation,
        meta: MetaConfig,
        support_sets: Mapping[str, TokenizedSet],
        query_sets: Mapping[str, TokenizedSet],
        batch_settings: Mapping[str, Any],
        *,
        on_cpu: bool,
    ) -> None:
        self.engine, self.inner_loop, self.meta = engine, inner_loop, meta
        self.support_sets, self.query_sets = support_sets, query_sets
        self._batch_settings, self._on_cpu = batch_settings, on_cpu

    def passes(self, episodes: Sequence[Episode]) -> list[list[EpisodeRecord]]:
        """Records for the episodes, in the portions that are adapted together: one by one without task batching.

        With it, as many as ``meta.task_batch_limit`` and the memory of one pass allow: ``data.max_token_len_per_gpu``
        tokens, or ``data.micro_batch_size_per_gpu`` examples where micro-batches have a fixed size. Without a limit, a
        pass on a CPU holds :data:`CPU_TOKENS`, and tasks of :data:`CPU_TOKENS_ALONE` or more are alone. Every rank of a
        task group cuts alike, since all of them know all the examples.
        """
        records = [EpisodeRecord(episode) for episode in episodes]
        if not isinstance(self.inner_loop, TaskBatchedLoRA):
            return [[record] for record in records]
        limit, settings, alone = self.meta.task_batch_limit, self._batch_settings, None
        is_dynamic = settings["use_dynamic_bsz"]
        budget = settings["max_token_len_per_gpu" if is_dynamic else "micro_batch_size_per_gpu"]
        if limit is None and self._on_cpu and is_dynamic:
            # A core's products run at full speed from a few hundred rows on: more of them only take more memory.
            budget, alone = min(budget, CPU_TOKENS), CPU_TOKENS_ALONE
        sizes = [self._size_in_a_pass(episode) for episode in episodes]
        return [records[part] for part in split_into_passes(sizes, budget=budget, alone=alone, most=limit)]

    def _size_in_a_pass(self, episode: Episode) -> int:
        """What the episode's largest batch adds to a pass of one rank: tokens, or examples in fixed micro-batches."""
        group = self.engine.get_data_parallel_size()
        if not self._batch_settings["use_dynamic_bsz"]:
            return -(-max(map(len, (*episode.support_batches, episode.query_batch))) // group)
        sizes = [self.support_sets[episode.task].tokens(batch) for batch in episode.support_batches]
        if episode.query_batch:
            sizes.append(self.query_sets[episode.task].tokens(episode.query_batch))
        return -(-max(sizes) // group)

    @contextmanager
    def adapting(self, records: Sequence[EpisodeRecord], rates: Rates | None = None) -> Iterator[Adaptation]:
        """``inner_loop.adapting()`` for the episodes of one pass.

        Where inner steps adapt the top layers alone, what the layers below make of the support examples is computed
        here, once for all steps and without a graph.
        """
        if self.engine.lowest_layer:
            self._compute_features(records)
        with self.inner_loop.adapting(len(records), rates) as adaptation:
            yield adaptation

    def _compute_features(self, records: Sequence[EpisodeRecord]) -> None:
        rank, size = self.engine.get_data_parallel_rank(), self.engine.get_data_parallel_size()
        settings = self._batch_settings
        wanted: list[list[tuple[EpisodeRecord, int]]] = [[] for _ in range(size)]  # by the ranks of the group
        for record in records:
            batches = [self._filled(batch) for batch in record.episode.support_batches]
            for other, mine in enumerate(wanted):
                mine += [(record, i) for i in dict.fromkeys(i for batch in batches for i in batch[other::size])]
        tokens = [[self.support_sets[r.episode.task].tokens([i]) for r, i in mine] for mine in wanted]
        mine = wanted[rank]
        if not settings["use_dynamic_bsz"]:  # as many micro-batches of the same size on every rank
            unit = settings["micro_batch_size_per_gpu"]
            mine = mine + mine[:1] * (-(-max(map(len, wanted)) // unit) * unit - len(mine))
        examples = [self.support_sets[record.episode.task].batch([index])[0] for record, index in mine]
        least = count_micro_batches(tokens, settings["max_token_len_per_gpu"])
        none = [0] * len(examples)
        batch = make_batch(examples, none, none, {**settings, "least_micro_batches": least})
        for (record, index), features in zip(mine, self.engine.features(batch), strict=True):
            record.features[index] = features

    def adapt(
        self, records: Sequence[EpisodeRecord], trajectory: MetaGradient | None = None, tape: Tape | None = None
    ) -> None:
        """The inner loops of the episodes of one pass, inside :meth:`adapting`: K steps on their supports.

        Args:
            trajectory: takes the support gradients in, before they are clipped.
            tape: takes the last steps, those that the meta-gradient goes through.
        """
        for k, indices in enumerate(self.support_backwards(records)):
            if trajectory is not None:
                trajectory.add_support(self.inner_loop.gradients())
            if tape is not None and k >= self.meta.num_inner_steps - self.meta.exact_steps:
                tape.step(indices)
            else:
                self.inner_loop.step()
        for record in records:
            record.features.clear()

    def support_backwards(self, records: Sequence[EpisodeRecord]) -> Iterator[Sequence[Sequence[int]]]:
        """Run the backward of each support batch in turn and yield its examples; the caller uses the gradients before
        it goes on."""
        for indices in zip(*(record.episode.support_batches for record in records), strict=True):
            losses = self.engine.loss_and_backward(self._support_batch(records, indices), len(records))
            for record, loss in zip(records, losses.unbind(), strict=True):
                record.support_losses.append(loss)
            yield indices

    def _support_batch(self, records: Sequence[EpisodeRecord], indices: Sequence[Sequence[int]]) -> Any:
        sets = [self.support_sets[record.episode.task] for record in records]
        features = [record.features for record in records] if self.engine.lowest_layer else None
        return self._batch(sets, indices, records, features)

    def _hessian_vector(
        self, records: Sequence[EpisodeRecord], indices: Sequence[Sequence[int]], vector: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        batch = self._support_batch(records, indices)
        return self.engine.hessian_vector(batch, len(records), self.inner_loop, vector)

    def backward_through(self, tape: Tape, records: Sequence[EpisodeRecord]) -> torch.Tensor:
        """From the query gradient at theta_i to the one at theta, through the inner steps of ``tape``; as
        :meth:`Tape.backward`."""
        return tape.backward(partial(self._hessian_vector, records))

    def query_backward(self, records: Sequence[EpisodeRecord]) -> None:
        """Backward of the query losses at whatever parameters are loaded."""
        for record, loss in zip(records, self._query_losses(records, backward=True), strict=True):
            record.query_loss_after = loss

    def measure_before(self, records: Sequence[EpisodeRecord]) -> None:
        """Query losses at theta, for the adaptation gain."""
        for record, loss in zip(records, self._query_losses(records, backward=False), strict=True):
            record.query_loss_before = loss

    def measure_after(self, records: Sequence[EpisodeRecord]) -> None:
        """Query losses at the adapted parameters, for algorithms that take no gradient there."""
        for record, loss in zip(records, self._query_losses(records, backward=False), strict=True):
            record.query_loss_after = loss

    def _query_losses(self, records: Sequence[EpisodeRecord], *, backward: bool) -> tuple[torch.Tensor, ...]:
        sets = [self.query_sets[record.episode.task] for record in records]
        queries = [record.episode.query_batch for record in records]
        batch = self._batch(sets, queries, records if backward else None)
        run = self.engine.loss_and_backward if backward else self.engine.loss_only
        return run(batch, len(records)).unbind()

    def _batch(
        self,
        sets: Sequence[TokenizedSet],
        indices: Sequence[Sequence[int]],
        counted: Sequence[EpisodeRecord] | None = None,
        features: Sequence[Mapping[int, torch.Tensor]] | None = None,
    ) -> Any:
        """This rank's share of the batches of one pass, a task per entry; counts its tokens in ``counted``.

        With ``features``, by their indices what the lower layers make of the examples, the pass goes on from there.

        Batches that the ranks or their fixed micro-batches do not divide, such as 5 shots, are filled up with an
        example that has no weight.
        """
        rank, size = self.engine.get_data_parallel_rank(), self.engine.get_data_parallel_size()
        settings = self._batch_settings
        examples: list[Any] = []
        from_here: list[torch.Tensor] = []
        tasks: list[int] = []
        weights: list[float] = []
        lengths_of_ranks: list[list[int]] = [[] for _ in range(size)]
        for task, (task_set, chosen) in enumerate(zip(sets, indices, strict=True)):
            filled = self._filled(chosen)
            for other, lengths in enumerate(lengths_of_ranks):
                lengths += [task_set.tokens([index]) for index in filled[other::size]]
            share = task_set.batch(filled[rank::size])
            examples += share
            tasks += [task] * len(share)
            weight = 1.0 / task_set.response_tokens(chosen)
            weights += [*[weight] * len(chosen), *[0.0] * (len(filled) - len(chosen))][rank::size]
            if features is not None:
                from_here += [features[task][index] for index in filled[rank::size]]
        if counted is not None:
            lengths = [len(example["input_ids"]) for example in examples]
            width = max(lengths) if self.engine.layout.rows == "padded" else 0
            for task, length in zip(tasks, lengths, strict=True):
                counted[task].tokens += length
                counted[task].padding += max(width - length, 0)
        least = count_micro_batches(lengths_of_ranks, settings["max_token_len_per_gpu"])
        settings = {**settings, "least_micro_batches": least}
        return make_batch(examples, tasks, weights, settings, from_here or None)

    def _filled(self, chosen: Sequence[int]) -> list[int]:
        """The examples of a batch, and some more where the ranks or their micro-batches do not divide it."""
        settings, size = self._batch_settings, self.engine.get_data_parallel_size()
        unit = size if settings["use_dynamic_bsz"] else size * settings["micro_batch_size_per_gpu"]
        return [*chosen, *[chosen[0]] * (-len(chosen) % unit)]
