"""What can go wrong in a run while every process is alive: losses and gradients that are not finite, files that cannot
be written, ranks that no longer train the same model. Each ends in one sentence, and theta is never poisoned.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from metasft.adaptation import local_tensor
from metasft.episode_table import EpisodeRow


class RunFault(RuntimeError):
    """Ends the run on every rank, with a sentence for the user. What was saved before is intact."""


class SkipMetaStep(Exception):
    """Leaves a meta-step before theta is updated; raised on every rank alike. The message says where it went wrong."""


# ---- losses and gradients -------------------------------------------------------------------------------------------


def first_fault(rows: Sequence[EpisodeRow]) -> str | None:
    """Where a meta-step first left the finite range: tasks and inner step; None where everything is finite.

    A gradient of an inner step that is not finite shows in the loss of the next one, or in the query loss behind the
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


def _first_place(row: EpisodeRow) -> tuple[int, str, str, float] | None:
    """(rank in time, what, where, value) of the first number of an episode that is not finite."""
    steps = len(row.support_losses)
    places = [(0, "query loss", "before adaptation", row.query_loss_before)]
    for k, loss in enumerate(row.support_losses, start=1):
        behind = f", behind the update of inner step {k - 1}" if k > 1 else ""
        places.append((k, "support loss", f"at inner step {k} of {steps}{behind}", loss))
    places.append((steps + 1, "query loss", f"behind inner step {steps}", row.query_loss_after))
    # The query gradient; in Reptile theta_i - theta.
    places.append((steps + 2, "contribution to the meta-step", f"behind inner step {steps}", row.contribution_norm))
    return next((place for place in places if place[3] is not None and not math.isfinite(place[3])), None)


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
            f"was saved since meta-step {saved}: start the same command again to go on from there, and suspect the "
            "hardware if it happens again"
        )
