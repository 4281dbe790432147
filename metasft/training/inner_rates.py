"""Inner learning rates that meta-training learns: one per trained tensor (Meta-SGD, Li et al. 2017, arXiv 1707.09835),
or one per tensor and inner step (MAML++, Antoniou et al. 2019, arXiv 1810.09502).

Their logarithms a are learned, so that rates stay positive and a step is a factor. They are few and live on the host:
setting a rate never waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


class InnerRates:
    """The rates of a run, the same bits on every rank.

    Args:
        names: of the trained tensors, in the order of the adaptation's parameters.
        columns: S, K for rates of every inner step, else 1.
        start: the rate that all start at.
        build_optimizer: an optimizer of the parameters it is given.

    Attributes:
        logarithms: a, fp32 [tensors, S].
    """

    def __init__(
        self,
        names: Sequence[str],
        columns: int,
        start: float,
        build_optimizer: Callable[[Sequence[torch.nn.Parameter]], torch.optim.Optimizer],
    ) -> None:
        self.names = list(names)
        self.logarithms = torch.nn.Parameter(torch.full((len(names), columns), start).log())
        self._optimizer = build_optimizer([self.logarithms])

    @property
    def values(self) -> torch.Tensor:
        """The rates, fp32 [tensors, S]."""
        return self.logarithms.detach().exp()

    def step(self, gradient: torch.Tensor, lr: float) -> None:
        """Step a along ``gradient``, [tensors, S], at the learning rate ``lr``; nothing clips it."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self.logarithms.grad = gradient
        self._optimizer.step()
        self._optimizer.zero_grad()

    def metrics(self) -> dict[str, float]:
        """Mean, least and largest rate."""
        values = self.values
        return {
            "inner/rate_mean": values.mean().item(),
            "inner/rate_least": values.min().item(),
            "inner/rate_largest": values.max().item(),
        }

    def by_name(self) -> dict[str, torch.Tensor]:
        """Name -> rates [S]."""
        return {name: rates.clone() for name, rates in zip(self.names, self.values, strict=True)}

    def tensors(self) -> list[torch.Tensor]:
        """What every rank holds alike."""
        return [self.logarithms]

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on with the same bits."""
        state = self._optimizer.state_dict()["state"]
        return {"names": self.names, "logarithms": self.logarithms.detach(), "optimizer": state}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a and the optimizer's moments; the optimizer's settings stay those of this run."""
        assert state["names"] == self.names, "the rates are those of other tensors"
        self.logarithms.copy_(state["logarithms"])
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": state["optimizer"]})
