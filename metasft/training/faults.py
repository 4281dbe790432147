"""What can go wrong in a run while every process is alive: losses and gradients that are not finite, losses that grow,
files that cannot be written, ranks that no longer train the same model. Each is said in one sentence, and theta is
never poisoned.
"""

from __future__ import annotations

import math
import shutil
import statistics
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from metasft.model.inner_loop import local_tensor
from metasft.training.metrics import EpisodeRow


class RunFault(RuntimeError):
    """Ends the run on every rank, with a sentence for the user. What was saved before is intact."""


# ---- losses and gradients -------------------------------------------------------------------------------------------


def first_fault(rows: Sequence[EpisodeRow]) -> str | None:
    """Where a meta-step first left the finite range: tasks and inner step; None where everything is finite.

    A gradient of an inner step that is not finite shows in the loss of the next one, or in the query loss after the
    last: nothing is computed, and no device waited for, inside the inner loop. What goes wrong in one task may reach
    others of its pass one step later, so that only the earliest place counts.

    Args:
        rows: of the whole meta-batch.
    """
    places = [_first_place(row) for row in rows]
    earliest = min((place[0] for place in places if place is not None), default=None)
    if earliest is None:
        return None
    found = [(row, place) for row, place in zip(rows, places, strict=True) if place and place[0] == earliest]
    _, (_, what, where, value) = found[0]
    tasks = " and ".join(dict.fromkeys(repr(row.task) for row, _ in found))
    return f"the {what} of {'task' if len(found) == 1 else 'tasks'} {tasks} is {value} {where}"


def _first_place(row: EpisodeRow) -> tuple[int, str, str, float | None] | None:
    """(rank in time, what, where, value) of the first number of an episode that is not finite."""
    steps = len(row.support_losses)
    places = [(0, "query loss", "before adaptation", row.query_loss_before)]
    for k, loss in enumerate(row.support_losses, start=1):
        after = f", after the update of inner step {k - 1}" if k > 1 else ""
        places.append((k, "support loss", f"at inner step {k} of {steps}{after}", loss))
    places.append((steps + 1, "query loss", f"after inner step {steps}", row.query_loss_after))
    # The query gradient; in Reptile theta_i - theta.
    places.append((steps + 2, "contribution to the meta-step", f"after inner step {steps}", row.contribution_norm))
    return next((place for place in places if place[3] is not None and not math.isfinite(place[3])), None)


# ---- losses that grow -----------------------------------------------------------------------------------------------

WATCHED_LOSSES = {
    "inner/support_loss_first": "support loss before adaptation",
    "meta/query_loss_after": "query loss after adaptation",
}
"""Metric -> what it is called."""
_FIRST, _LATEST = 10, 20
_GROWTH = 2.0
_CHANCE = 5e-4
_SMALLEST = 0.1  # nats per response token: losses below it grow many times over without meaning anything


class Divergence(NamedTuple):
    """A loss that has grown: its medians over the first and the latest measured meta-steps, in nats per token."""

    metric: str
    step: int
    first: float
    latest: float

    @property
    def factor(self) -> float:
        return self.latest / max(self.first, _SMALLEST)

    def text(self) -> str:
        """The sentence for the user, without a remedy."""
        return (
            f"meta-step {self.step}: the {WATCHED_LOSSES[self.metric]} diverges: its median over the latest meta-steps "
            f"is {self.latest:.3g}, {self.factor:.1f} times that of the first {_FIRST} ({self.first:.3g})"
        )


class DivergenceWatch:
    """Finds losses that grow although every number is finite: the learning rates are too high, and the run would end
    with a worse model and exit code 0.

    A loss diverges when its median over the latest meta-steps (10, later 20) is at least twice that over the first 10,
    and the Mann-Whitney test leaves a chance below 1 in 2,000 that the two differ by the choice of tasks alone. Tasks
    differ more from each other than one factor could allow for; the test takes their spread into account.

    Attributes:
        found: so far, each loss once.
    """

    def __init__(self) -> None:
        self.found: list[Divergence] = []
        self._first: dict[str, list[float]] = {metric: [] for metric in WATCHED_LOSSES}
        self._latest: dict[str, deque[float]] = {metric: deque(maxlen=_LATEST) for metric in WATCHED_LOSSES}

    def add(self, record: Mapping[str, Any]) -> list[Divergence]:
        """Take the metrics of a meta-step, in order; returns what it shows to diverge for the first time."""
        found = []
        for metric, first in self._first.items():
            value = record.get(metric)
            if not isinstance(value, int | float) or not math.isfinite(value):
                continue
            latest = self._latest[metric]
            if len(first) < _FIRST:
                first.append(value)
                continue
            latest.append(value)
            if metric not in (known.metric for known in self.found) and _has_grown(first, latest):
                found.append(Divergence(metric, record["step"], statistics.median(first), statistics.median(latest)))
        self.found += found
        return found


def _has_grown(first: Sequence[float], latest: Sequence[float]) -> bool:
    if len(latest) < _FIRST or statistics.median(latest) < _GROWTH * max(statistics.median(first), _SMALLEST):
        return False
    from scipy.stats import mannwhitneyu

    return mannwhitneyu(first, latest, alternative="less", method="asymptotic").pvalue < _CHANCE


# ---- files ----------------------------------------------------------------------------------------------------------


@contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """A part of a run in which ranks write files: when one of them cannot, all of them leave with the same sentence.

    Entered and left by every rank, whether it writes or not.

    Args:
        what: that is written, for the message.
        folder: ``trainer.default_local_dir``.

    Raises:
        RunFault: naming ``what``, the reason and the remedy.
    """
    reason = None
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save reports a full disk as RuntimeError
        reason = _reason(error, folder)
    reasons = [reason]
    if dist.is_initialized() and dist.get_world_size() > 1:
        reasons = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, reason)
    reason = next((reason for reason in reasons if reason is not None), None)
    if reason is not None:
        raise RunFault(
            f"{what} could not be written to {folder} ({reason}); what was saved before is intact: make room or the "
            "folder writable, or set another trainer.default_local_dir, and start the same command again"
        )


def _reason(error: Exception, folder: Path) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error).strip().partition("\n")[0]
    name = getattr(error, "filename", None)
    try:
        free = f"; {shutil.disk_usage(folder).free / 2**20:.0f} MiB are free there"
    except OSError:
        free = ""
    return (f"{Path(name).name}: " if name else "") + (text or type(error).__name__) + free


# ---- ranks ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def theta_checksum(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """A number, 0-dim int64 on their device, of the bits of the local parts of ``parameters``."""
    sums = []
    for parameter in parameters:
        bits = local_tensor(parameter).detach().reshape(-1)
        # Integer sums wrap around instead of rounding: the order of the additions makes no difference.
        sums.append(bits.view(torch.int32 if bits.element_size() == 4 else torch.int16).sum(dtype=torch.int32))
    weights = torch.arange(1, 2 * len(sums), 2, device=sums[0].device)
    return (torch.stack(sums).to(torch.int64) * weights).sum()


def check_theta(parameters: Sequence[torch.Tensor], shards: int, device: torch.device, step: int, saved: int) -> None:
    """End the run where ranks that hold the same part of theta do not hold the same bits.

    Args:
        parameters: theta.
        shards: over how many consecutive ranks theta is cut: the size of a task group, 1 where every rank holds it all.
        device: what the process group communicates from.
        step: meta-steps done.
        saved: the meta-step that was saved last, 0 when none was.

    Raises:
        RunFault: on every rank, naming the ranks that differ.
    """
    world = dist.get_world_size()
    if world == shards:
        return
    mine = theta_checksum(parameters).to(device).reshape(1)
    checksums = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(checksums, mine)
    values = torch.cat(checksums).tolist()
    differing = [rank for rank in range(world) if values[rank] != values[rank % shards]]
    if differing:
        raise RunFault(
            f"meta-step {step}: theta on {'rank' if len(differing) == 1 else 'ranks'} "
            f"{', '.join(map(str, differing))} is no longer bit for bit that of rank {differing[0] % shards}; nothing "
            f"was saved since meta-step {saved}: start the same command again to resume from there, and suspect the "
            "hardware if it happens again"
        )
