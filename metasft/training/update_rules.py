"""How the tasks of a meta-batch become one update of the shared parameters.

* FOMAML (first-order MAML, Finn et al. 2017, arXiv 1703.03400, section 5.2) and META-LORA (MeTA-LoRA, arXiv
  2510.11598): g = aggregate_i d/dtheta L(theta_i,K; Q_i), accumulated in fp32, then ``.grad`` for veRL's optimizer.
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
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], weight: float) -> None:
        self._parameters = parameters
        self._weight = weight
        self._sum: list[torch.Tensor | None] = [None] * len(parameters)

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
                local_tensor(first).mul_(self._weight)
            else:
                local_tensor(total).add_(local_tensor(gradient), alpha=self._weight)

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
