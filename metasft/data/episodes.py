"""Episodes: which tasks a meta-step visits and which support and query examples each of them draws.

Pure Python over indices: no tensors, no files. Every process runs the same :class:`EpisodeSampler` and takes its own
slice of the meta-batch, so the ranks agree without talking to each other.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Episode:
    """One task's part of a meta-step.

    Attributes:
        task: task name.
        support_batches: indices into the task's support set, one inner tuple per inner step (K tuples).
        query_batch: rows of the task's query examples (empty without a query set).
    """

    task: str
    support_batches: tuple[tuple[int, ...], ...]
    query_batch: tuple[int, ...]


_START_OVER = "put it back, or give another trainer.default_local_dir to start over"


def _entry(state: Any, name: str) -> Any:
    if not isinstance(state, Mapping) or name not in state:
        raise ValueError(f"the resume state of the examples drawn has no {name}; {_START_OVER}")
    return state[name]


class ShuffledStream:
    """An endless stream over ``range(size)``: without replacement within a pass, reshuffled for each pass.

    Items taken together are distinct as long as ``count <= size``: where a take crosses into the next pass, the items
    it already holds move to the end of that pass. The order depends on ``seed`` alone.
    """

    def __init__(self, size: int, seed: str) -> None:
        if size < 1:
            raise ValueError(f"cannot draw from an empty set (stream {seed!r})")
        self._size = size
        self._seed = seed
        self._pass = 0
        self._remaining: list[int] = []

    def take(self, count: int) -> tuple[int, ...]:
        """The next ``count`` items."""
        taken: list[int] = []
        while len(taken) < count:
            if not self._remaining:
                self._start_pass(taken)
            need = count - len(taken)
            taken += self._remaining[:need]
            del self._remaining[:need]
        return tuple(taken)

    def _start_pass(self, already_taken: Sequence[int]) -> None:
        order = list(range(self._size))
        # A string seeds random.Random through SHA-512: the same in every process and Python build.
        random.Random(f"{self._seed}/{self._pass}").shuffle(order)
        held = set(already_taken)
        self._remaining = [i for i in order if i not in held] + [i for i in order if i in held]
        self._pass += 1

    def state_dict(self) -> dict[str, Any]:
        return {"size": self._size, "pass": self._pass, "remaining": list(self._remaining)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken.

        Raises:
            ValueError: the state is of another set, or is none.
        """
        size, passes, remaining = (_entry(state, name) for name in ("size", "pass", "remaining"))
        if size != self._size:
            raise ValueError(
                f"stream {self._seed!r} was saved over {size!r} items but now has {self._size}; resume with the same "
                "data and sample counts"
            )
        items = isinstance(remaining, list) and all(type(item) is int and 0 <= item < size for item in remaining)
        if type(passes) is not int or passes < 0 or not items or len(set(remaining)) < len(remaining):
            raise ValueError(f"the resume state of stream {self._seed!r} is damaged; {_START_OVER}")
        self._pass, self._remaining = passes, list(remaining)


class EpisodeSampler:
    """Draws the meta-batches of a run. Seeded and resumable; the state is plain JSON.

    Args:
        support_sizes: task name -> number of support examples.
        query_sizes: task name -> number of query examples (ignored when ``query_batch_size`` is 0).
        query_starts: task name -> row of the first query example, where other examples come before it; None: 0.
        num_inner_steps: K.
        inner_batch_size: support examples per inner step.
        query_batch_size: query examples per episode.
        meta_batch_size: tasks per meta-step. Tasks are drawn without replacement while tasks last; with more slots than
            tasks a task recurs, with its next examples.
        seed: the run's seed.
        episode_shots: (least, most) support examples of one episode, which its inner steps cycle through as the
            evaluation does; (0, 0): every inner step draws the next ones of the support set.

    Raises:
        ValueError: a set is smaller than the batch drawn from it, or nothing is drawn at all.
    """

    def __init__(
        self,
        support_sizes: Mapping[str, int],
        query_sizes: Mapping[str, int],
        query_starts: Mapping[str, int] | None = None,
        *,
        num_inner_steps: int,
        inner_batch_size: int,
        query_batch_size: int,
        meta_batch_size: int,
        seed: int,
        episode_shots: tuple[int, int] = (0, 0),
    ) -> None:
        if not support_sizes:
            raise ValueError("there is no task to draw episodes from")
        if not num_inner_steps and not query_batch_size:
            raise ValueError("meta.num_inner_steps=0 and meta.query_batch_size=0 draw no examples; raise one of them")
        self.tasks = sorted(support_sizes)
        for task in self.tasks:
            if support_sizes[task] < inner_batch_size:
                raise ValueError(
                    f"task {task!r} has {support_sizes[task]} support examples, fewer than meta.inner_batch_size="
                    f"{inner_batch_size}; lower the batch or prepare more support examples"
                )
            if query_batch_size and query_sizes[task] < query_batch_size:
                raise ValueError(
                    f"task {task!r} has {query_sizes[task]} query examples, fewer than meta.query_batch_size="
                    f"{query_batch_size}; lower the batch or prepare more query examples"
                )
        self.num_inner_steps = num_inner_steps
        self.inner_batch_size = inner_batch_size
        self.query_batch_size = query_batch_size
        self.meta_batch_size = meta_batch_size
        self._query_starts = dict(query_starts or {})
        self._seed, self._shots, self._drawn = seed, episode_shots, 0
        self._task_stream = ShuffledStream(len(self.tasks), f"{seed}/tasks")
        self._support = {task: ShuffledStream(support_sizes[task], f"{seed}/support/{task}") for task in self.tasks}
        self._query = (
            {task: ShuffledStream(query_sizes[task], f"{seed}/query/{task}") for task in self.tasks}
            if query_batch_size
            else {}
        )

    def next_meta_batch(self) -> list[Episode]:
        """The next ``meta_batch_size`` episodes, the same on every process."""
        return [self._draw(self.tasks[index]) for index in self._task_stream.take(self.meta_batch_size)]

    def _draw(self, task: str) -> Episode:
        support = tuple(self._draw_support(task))
        query = self._query[task].take(self.query_batch_size) if self.query_batch_size else ()
        start = self._query_starts.get(task, 0)
        return Episode(task=task, support_batches=support, query_batch=tuple(start + index for index in query))

    def _draw_support(self, task: str) -> Iterator[tuple[int, ...]]:
        """One batch per inner step."""
        stream, batch = self._support[task], self.inner_batch_size
        least, most = self._shots
        if not most:
            yield from (stream.take(batch) for _ in range(self.num_inner_steps))
            return
        self._drawn += 1
        episode = f"{self._seed}/episode/{self._drawn}"
        shots = stream.take(random.Random(episode).randint(least, most))
        cycle = ShuffledStream(len(shots), episode)
        for _ in range(self.num_inner_steps):
            yield tuple(shots[i] for i in cycle.take(min(len(shots), batch)))

    def state_dict(self) -> dict[str, Any]:
        """Positions of all streams, as plain JSON data."""
        return {
            "drawn": self._drawn,
            "tasks": list(self.tasks),
            "task_stream": self._task_stream.state_dict(),
            "support": {task: stream.state_dict() for task, stream in self._support.items()},
            "query": {task: stream.state_dict() for task, stream in self._query.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken.

        Raises:
            ValueError: the saved state belongs to other tasks or other set sizes.
        """
        tasks = _entry(state, "tasks")
        if tasks != self.tasks:
            saved = ", ".join(map(str, tasks)) if isinstance(tasks, list) else repr(tasks)
            raise ValueError(
                f"the resume state was saved for the tasks {saved}, this run has {', '.join(self.tasks)}; resume with "
                "the same meta.tasks or use another trainer.default_local_dir"
            )
        drawn = state.get("drawn", 0)  # of earlier releases
        if type(drawn) is not int or drawn < 0:
            raise ValueError(f"the resume state of the examples drawn is damaged; {_START_OVER}")
        self._drawn = drawn
        self._task_stream.load_state_dict(_entry(state, "task_stream"))
        for name, streams in (("support", self._support), ("query", self._query)):
            positions = _entry(state, name)
            if not isinstance(positions, Mapping) or set(positions) != set(streams):
                raise ValueError(
                    f"the resume state has no {name} positions for some tasks; resume with the same settings"
                )
            for task, stream in streams.items():
                stream.load_state_dict(positions[task])

    def __len__(self) -> int:
        """Meta-steps in one pass over all support sets (query sets when K = 0): what an epoch means here."""
        if self.num_inner_steps:
            total = sum(stream._size for stream in self._support.values())
            least, most = self._shots
            drawn = (least + most) / 2 if most else self.num_inner_steps * self.inner_batch_size
            per_step = self.meta_batch_size * drawn
        else:
            total = sum(stream._size for stream in self._query.values())
            per_step = self.meta_batch_size * self.query_batch_size
        return max(1, math.ceil(total / per_step))
