"""How the tasks of a meta-batch become one update of the shared parameters.

* FOMAML (first-order MAML, Finn et al. 2017, arXiv 1703.03400, section 5.2) and META-LORA (MeTA-LoRA, arXiv
  2510.11598): g = aggregate_i g_i with g_i = d/dtheta L(theta_i,K; Q_i), accumulated in fp32, then ``.grad`` for veRL's
  optimizer. With a trajectory weight w the support gradients of the inner loop, which are there anyway, take part:
  g_i = (1 - w) d/dtheta L(theta_i,K; Q_i) + w/K sum_k d/dtheta L(theta_i,k; batch k of S_i).
* Reptile (Nichol et al. 2018, arXiv 1803.02999, algorithm 2): theta + eps * mean_i(theta_i,K - theta).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from metasft.model.inner_loop import local_tensor


class MetaGradient:
    """Sums task gradients of fixed parameters in fp32, each with the same weight whatever the task's token count.

    The first task's ``.grad`` becomes the sum rather than being copied: with one task per group nothing is allocated.

    Args:
        parameters: theta (shards under FSDP2).
        weight: of each task, 1 / meta_batch_size for the mean and 1 for the sum.
        trajectory: w, the share of the support gradients in each task's.
        num_inner_steps: K.
        with_support: of which tensors support gradients take part; of the others the query gradient alone, with weight
            1. None: of all.
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        weight: float,
        *,
        trajectory: float = 0.0,
        num_inner_steps: int = 0,
        with_support: Sequence[bool] | None = None,
    ) -> None:
        self._parameters = parameters
        self._with_support = [True] * len(parameters) if with_support is None else with_support
        self._weights = [weight * (1 - trajectory if support else 1) for support in self._with_support]
        self._support_weight = weight * trajectory / num_inner_steps if trajectory else 0.0
        self._sum: list[torch.Tensor | None] = [None] * len(parameters)

    @torch.no_grad()
    def add_support(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Add the gradients (local parts) of one inner step: of a task, or the sum over several."""
        for i, (parameter, gradient) in enumerate(zip(self._parameters, gradients, strict=True)):
            if gradient is None or not self._with_support[i]:
                continue
            if self._sum[i] is None:
                self._sum[i] = torch.zeros_like(parameter, dtype=torch.float32)
            total = self._sum[i]
            assert total is not None
            local_tensor(total).add_(gradient, alpha=self._support_weight)

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the gradients in ``.grad`` (the query gradient of a task, or the sum over several) and clear them."""
        for i, parameter in enumerate(self._parameters):
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:
                continue
            total = self._sum[i]
            if total is None:
                self._sum[i] = first = gradient.to(torch.float32)
                local_tensor(first).mul_(self._weights[i])
            else:
                local_tensor(total).add_(local_tensor(gradient), alpha=self._weights[i])

    def tensors(self) -> list[torch.Tensor]:
        """The local parts of the sums, zeros where no task had a gradient: what is reduced over the task groups."""
        sums = [
            torch.zeros_like(parameter, dtype=torch.float32) if total is None else total
            for parameter, total in zip(self._parameters, self._sum, strict=True)
        ]
        self._sum = list(sums)
        return [local_tensor(total) for total in sums]

    def to_grad(self) -> None:
        """Put the meta-gradient into ``.grad`` for the optimizer."""
        for parameter, total in zip(self._parameters, self._sum, strict=True):
            parameter.grad = None if total is None else total.to(parameter.dtype)
        self._sum = [None] * len(self._parameters)


class MeanDifference:
    """mean_i(theta_i - theta) over the tasks of a meta-batch, in fp32: the direction of a Reptile step.

    Args:
        parameters: theta (shards under FSDP2).
        num_tasks: tasks in the whole meta-batch, over all task groups.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], num_tasks: int) -> None:
        self._parameters = parameters
        self._sum = [torch.zeros_like(local_tensor(p), dtype=torch.float32) for p in parameters]
        self._weight = 1.0 / num_tasks

    @torch.no_grad()
    def add(self, difference: Sequence[torch.Tensor]) -> None:
        """Add theta_i - theta (local parts) of a task, or its sum over several."""
        torch._foreach_add_(self._sum, [part.to(torch.float32) for part in difference], alpha=self._weight)

    def tensors(self) -> list[torch.Tensor]:
        """The local parts of the sums: what is reduced over the task groups."""
        return self._sum

    @torch.no_grad()
    def interpolate(self, step_size: float) -> None:
        """theta <- theta + step_size * mean difference, in place."""
        for parameter, total in zip(self._parameters, self._sum, strict=True):
            local_tensor(parameter).add_(total.to(parameter.dtype), alpha=step_size)

    def to_grad(self) -> None:
        """Put the negative mean difference into ``.grad``: descending it moves theta towards the adapted parameters."""
        for parameter, total in zip(self._parameters, self._sum, strict=True):
            gradient = torch.zeros_like(parameter)
            local_tensor(gradient).copy_(-total)
            parameter.grad = gradient
