"""veRL's loggers, such as the console or wandb: started on rank 0, or refused in one sentence on all."""

from __future__ import annotations

import logging
from typing import Any

import torch.distributed as dist
from omegaconf import OmegaConf
from verl.utils.tracking import Tracking

from metasft.files.untrusted import reason

logger = logging.getLogger(__name__)


class CannotTrack(ValueError):
    """One of ``trainer.logger`` cannot be started; the message says why, and what to do."""


def start_tracking(config: Any) -> Tracking | None:
    """The loggers of a run on rank 0, None on the others; every rank calls it.

    Args:
        config: the composed configuration, which the loggers keep too.

    Raises:
        CannotTrack: on every rank, for instance without a key for wandb.
    """
    tracking, refused = None, [None]
    if dist.get_rank() == 0:
        plain = OmegaConf.to_container(config, resolve=True)
        names, project, experiment = (plain["trainer"][key] for key in ("logger", "project_name", "experiment_name"))
        try:
            tracking = Tracking(project, experiment, default_backend=names, config=plain)
        except Exception as error:  # of whatever package
            refused[0] = (
                f"trainer.logger={names} cannot be started with trainer.project_name={project} and "
                f"trainer.experiment_name={experiment} ({reason(error)}): give it what it asks for, or leave it out"
            )
    dist.broadcast_object_list(refused, src=0)
    if refused[0] is not None:
        raise CannotTrack(refused[0])
    return tracking


def track(tracking: Tracking, metrics: dict[str, float], step: int) -> None:
    """Hand the metrics of a meta-step to every logger; on the console one readable line, without those per task."""
    for backend in tracking.logger:
        data = {k: v for k, v in metrics.items() if k.count("/") == 1} if backend == "console" else metrics
        try:
            tracking.log(data=data, step=step, backend=[backend])
        except OSError as error:  # a full disk: metrics.jsonl has them too, and only a checkpoint is worth ending for
            logger.warning("trainer.logger %s cannot write meta-step %d: %s", backend, step, error.strerror or error)
