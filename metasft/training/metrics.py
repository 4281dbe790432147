"""What a meta-step measures of its episodes: recorded on the device, reduced over all ranks once, read once.

The table has a row per episode of the whole meta-batch and one for signals between the ranks. It travels in the
all-reduce of the meta-gradient, so that no step of the inner loop waits for the device or for another rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from metasft.data.episodes import Episode
from metasft.model.inner_loop import upload


@dataclass
class EpisodeRecord:
    """An episode and what one rank saw of it.

    Losses are this rank's part; their mean over the task group is the mean of the batch. They stay on the device (0-dim
    tensors), so that no step of the inner loop waits for it.

    Attributes:
        support_losses: loss before each inner step, K values.
        query_loss_before: query loss at theta (None when not measured).
        query_loss_after: query loss at theta_i (None without a query set).
        contribution_norm: of what the task adds to the outer step, or all tasks of this rank together where theirs are
            not known apart; of this rank's shard.
        tokens: tokens in the forwards that were followed by a backward.
        padding: positions beside them that those forwards computed for nothing.
        features: of support examples, by index, where inner steps start from what the lower layers make of them.
    """

    episode: Episode
    support_losses: list[torch.Tensor] = field(default_factory=list)
    query_loss_before: torch.Tensor | None = None
    query_loss_after: torch.Tensor | None = None
    contribution_norm: torch.Tensor | None = None
    tokens: int = 0
    padding: int = 0
    features: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class EpisodeRow:
    """The same of one episode, over all its ranks, as plain numbers."""

    task: str
    support_losses: list[float]
    query_loss_before: float | None
    query_loss_after: float | None
    contribution_norm: float
    tokens: int
    padding: int


COUNTS = 2
"""The last columns, tokens and padding, are sums over the ranks of a task group; all others are means."""


def to_table(
    records: Sequence[EpisodeRecord], device: torch.device, *, first: int, rows: int, stopping: bool
) -> torch.Tensor:
    """This rank's part of the table, [rows + 1, K + 5] fp32 on ``device``; the rows of other task groups are 0.

    Args:
        records: of this rank's episodes, the ``first`` of which is that row of the meta-batch.
        device: that ranks communicate from.
        rows: episodes of the whole meta-batch.
        stopping: whether this rank was asked to stop.
    """
    table = torch.zeros(rows + 1, len(records[0].support_losses) + 3 + COUNTS, dtype=torch.float32, device=device)
    zero = torch.zeros((), device=device)
    for index, record in enumerate(records, start=first):
        values = [*record.support_losses, record.query_loss_before, record.query_loss_after, record.contribution_norm]
        table[index, :-COUNTS] = torch.stack([zero if value is None else value.to(device) for value in values])
    counts = torch.tensor([[float(record.tokens), float(record.padding)] for record in records])
    table[first : first + len(records), -COUNTS:] = upload(counts, device)
    table[-1, 0] = float(stopping)
    return table


def from_table(
    table: torch.Tensor, tasks: Sequence[str], records: Sequence[EpisodeRecord]
) -> tuple[list[EpisodeRow], bool]:
    """The reduced table on the host, and whether any rank was asked to stop. Waits for the device.

    Args:
        table: as :func:`to_table` gives it, reduced over all ranks.
        tasks: of the whole meta-batch.
        records: of this rank; which query losses were measured is the same for all.
    """
    *values, signals = table.tolist()
    has_before, has_after = (records[0].query_loss_before is not None, records[0].query_loss_after is not None)
    rows = [
        EpisodeRow(
            task=task,
            support_losses=losses,
            query_loss_before=before if has_before else None,
            query_loss_after=after if has_after else None,
            contribution_norm=norm,
            tokens=round(tokens),
            padding=round(padding),
        )
        for task, (*losses, before, after, norm, tokens, padding) in zip(tasks, values, strict=True)
    ]
    return rows, signals[0] > 0


def step_metrics(rows: Sequence[EpisodeRow]) -> dict[str, float]:
    """The documented metrics of a meta-step: means over the meta-batch, and of each task."""
    by_task: dict[str, list[EpisodeRow]] = {}
    for row in rows:
        by_task.setdefault(row.task, []).append(row)
    metrics: dict[str, float] = {}
    for key, value_of in _METRICS.items():
        for name, chosen in [(key, rows), *((f"{key}/{task}", of_task) for task, of_task in by_task.items())]:
            values = [value for row in chosen if (value := value_of(row)) is not None]
            if values:
                metrics[name] = sum(values) / len(values)
    tokens, padding = sum(row.tokens for row in rows), sum(row.padding for row in rows)
    metrics["perf/tokens"] = tokens
    metrics["perf/padding_fraction"] = padding / (tokens + padding)
    return metrics


def _gain(row: EpisodeRow) -> float | None:
    before, after = row.query_loss_before, row.query_loss_after
    return None if before is None or after is None else before - after


_METRICS = {
    "inner/support_loss": lambda row: _mean(row.support_losses),
    "inner/support_loss_first": lambda row: row.support_losses[0] if row.support_losses else None,
    "inner/support_loss_last": lambda row: row.support_losses[-1] if row.support_losses else None,
    "meta/query_loss_before": lambda row: row.query_loss_before,
    "meta/query_loss_after": lambda row: row.query_loss_after,
    "meta/adaptation_gain": _gain,
}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
