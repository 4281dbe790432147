"""What goes into a meta-step, what comes out of it, and which tasks of it share a pass through the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from metasft.data.episodes import Episode
from metasft.training.metrics import EpisodeRow


@dataclass(frozen=True)
class MetaBatch:
    """A meta-step's work, as a task group sees it.

    Attributes:
        step: counted from 1.
        tasks: of every episode of the whole meta-batch, in order.
        episodes: those that this rank's task group works on.
        first: number of the first of them in the whole meta-batch.
        measures_gain: whether query losses before adaptation are measured, too.
    """

    step: int
    tasks: tuple[str, ...]
    episodes: Sequence[Episode]
    first: int
    measures_gain: bool


@dataclass(frozen=True)
class MetaStepResult:
    """What a meta-step leaves for the run, the same on every rank.

    Attributes:
        rows: of every episode of the meta-batch.
        is_stopping: some rank was asked to stop.
        fault: why theta was left as it was; None where it was updated, or not meant to be.
        grad_norm: of the meta-gradient before clipping; None where the algorithm has none.
    """

    rows: list[EpisodeRow]
    is_stopping: bool
    fault: str | None = None
    grad_norm: float | None = None


def split_into_passes(
    sizes: Sequence[int], *, budget: int, alone: int | None = None, most: int | None = None
) -> Iterator[slice]:
    """Contiguous portions of a sequence of episodes, as large as a pass allows.

    Args:
        sizes: of each episode's largest batch, tokens or examples.
        budget: of one pass, in the same unit; a larger episode has a pass to itself.
        alone: an episode of this size or more shares no pass; None = however large.
        most: episodes per pass; None = no limit.
    """
    start, used = 0, 0
    for index, size in enumerate(sizes):
        if alone is not None and size >= alone:
            size = budget
        if index > start and (index - start == most or used + size > budget):
            yield slice(start, index)
            start, used = index, 0
        used += size
    yield slice(start, len(sizes))
