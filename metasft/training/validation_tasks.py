"""``trainer.test_freq``: the loss after adaptation on tasks that are not trained on, and where it was lowest.

An episode of it is adapted as one of training is, on 5 and on 10 shots of a validation task, and measured on test items
of that task; no update of theta follows. Shots and their order are those of run 0 of the few-shot evaluation with the
run's seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from metasft.backend.devices import get_device_id
from metasft.config.training import MetaConfig
from metasft.data.episodes import Episode
from metasft.data.task_sets import VALIDATION_SHOTS, TaskFiles
from metasft.data.unseen_tasks import order_of_shots, shot_indices

LOSS = "valid/loss"


def validation_episodes(files: Iterable[TaskFiles], meta: MetaConfig, seed: int) -> list[Episode]:
    """Of every task one episode per shot count, in the order of :data:`VALIDATION_SHOTS`; the same whenever asked.

    Args:
        files: from :func:`metasft.data.task_sets.find_validation_files`.
        meta: says how many inner steps of how many examples an episode takes.
        seed: the run's.
    """
    return [_episode(task, shots, meta, seed) for task in files for shots in VALIDATION_SHOTS]


def _episode(files: TaskFiles, shots: int, meta: MetaConfig, seed: int) -> Episode:
    draw: dict[str, Any] = {"seed": seed, "task": files.task.rpartition("/")[2], "run": 0}
    chosen = shot_indices(files.support_samples, shots, **draw)
    order = order_of_shots(shots, **draw)
    batches = (order.take(min(shots, meta.inner_batch_size)) for _ in range(meta.num_inner_steps))
    support = tuple(tuple(chosen[index] for index in batch) for batch in batches)
    return Episode(files.task, support, tuple(range(files.query_samples)))


def validation_metrics(losses: Sequence[float]) -> dict[str, float]:
    """Means over the tasks, each with the same weight, of every shot count and of all.

    Args:
        losses: of :func:`validation_episodes`, nats per response token.
    """
    counts = len(VALIDATION_SHOTS)
    means = {f"{LOSS}_{shots}_shots": _mean(losses[i::counts]) for i, shots in enumerate(VALIDATION_SHOTS)}
    return {**means, LOSS: _mean(list(means.values()))}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@contextmanager
def fixed_masks(device_type: str, seed: int) -> Iterator[None]:
    """Dropout draws the same masks whenever it is entered, and training draws those that it would have drawn anyway."""
    devices = [] if device_type == "cpu" else [get_device_id()]
    with torch.random.fork_rng(devices=devices, device_type=device_type):
        torch.manual_seed(seed)
        yield


class Measured(NamedTuple):
    """``valid/loss`` at a meta-step, in nats per response token."""

    step: int
    loss: float


def better(best: Measured | None, record: Mapping[str, Any]) -> Measured | None:
    """The lowest finite loss once a meta-step's metrics are there, the earlier of equal ones."""
    loss = record.get(LOSS)
    if not isinstance(loss, int | float) or not math.isfinite(loss) or (best is not None and loss >= best.loss):
        return best
    return Measured(record["step"], loss)
