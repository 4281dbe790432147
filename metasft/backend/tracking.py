"""veRL's loggers, such as the console or wandb: started on rank 0, or an error of one sentence on all."""

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


class Tracker:
    """The loggers of a run on rank 0; on the others it does nothing. Every rank makes one.

    Args:
        config: the composed configuration, which the loggers keep too.

    Raises:
        CannotTrack: on every rank, for instance without a key for wandb.
    """

    def __init__(self, config: Any) -> None:
        self._tracking: Tracking | None = None
        failure: list[str | None] = [None]
        if dist.get_rank() == 0:
            plain: Any = OmegaConf.to_container(config, resolve=True)
            names, project, experiment = (
                plain["trainer"][key] for key in ("logger", "project_name", "experiment_name")
            )
            try:
                self._tracking = Tracking(project, experiment, default_backend=names, config=plain)
            except Exception as error:  # of whatever package
                failure[0] = (
                    f"trainer.logger={names} cannot be started with trainer.project_name={project} and "
                    f"trainer.experiment_name={experiment} ({reason(error)}): give it what it asks for, or leave it out"
                )
        dist.broadcast_object_list(failure, src=0)
        if failure[0] is not None:
            raise CannotTrack(failure[0])

    def track(self, metrics: dict[str, float], step: int) -> None:
        """Give every logger the metrics of a meta-step; the console one readable line, without those per task."""
        if self._tracking is None:
            return
        for backend in self._tracking.logger:
            data = {k: v for k, v in metrics.items() if k.count("/") == 1} if backend == "console" else metrics
            try:
                self._tracking.log(data=data, step=step, backend=[backend])
            except OSError as error:  # a full disk: metrics.jsonl has them, and only a checkpoint is worth ending for
                why = error.strerror or error
                logger.warning("trainer.logger %s cannot write meta-step %d: %s", backend, step, why)

    def finish(self) -> None:
        """Close the loggers."""
        if self._tracking is not None:
            self._tracking.finish()
