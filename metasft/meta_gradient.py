"""How the tasks of a meta-batch become one update of the shared parameters.

* FOMAML and META-LORA (first-order MAML, Finn et al. 2017, arXiv 1703.03400, section 5.2; MeTA-LoRA, arXiv 2510.11598):
  g = aggregate_i d/dtheta L(theta_i,K; Q_i), accumulated in fp32 and handed to veRL's optimizer as ``.grad``.
* Reptile (Nichol et al. 2018, arXiv 1803.02999, eq. 1 with the batched form of section 3): theta + eps * mean_i(theta_i - theta).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from metasft.adaptation import local_tensor


class MetaGradient:
    """Sums task gradients of fixed parameters in fp32, each with the same weight whatever the task's token count.

    Gradients are taken over from ``.grad`` rather than copied: with one task per group nothing is allocated.

    Args:
        parameters: theta (shards under FSDP2).
        weight: of each task, 1 / meta_batch_size for the mean and 1 for the sum.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], weight: float) -> None:
        self._parameters = parameters
        self._weight = weight
        self._sum: list[torch.Tensor | None] = [None] * len(parameters)

    @torch.no_grad()
    def take(self) -> None:
        """Add the gradients in ``.grad`` (one task's query gradient) and clear them."""
        for i, parameter in enumerate(self._parameters):
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:
                continue
            total = self._sum[i]
            if total is None:
                self._sum[i] = gradient.to(torch.float32)
                local_tensor(self._sum[i]).mul_(self._weight)
            else:
                local_tensor(total).add_(local_tensor(gradient), alpha=self._weight)

    def tensors(self) -> list[torch.Tensor]:
        """The local parts of the sums, zeros where no task had a gradient: what is reduced over the task groups."""
        for i, parameter in enumerate(self._parameters):
            if self._sum[i] is None:
                self._sum[i] = torch.zeros_like(parameter, dtype=torch.float32)
        return [local_tensor(total) for total in self._sum]

    def hand_over(self) -> None:
        """Put the meta-gradient into ``.grad`` for the optimizer."""
        for parameter, total in zip(self._parameters, self._sum, strict=True):
            parameter.grad = None if total is None else total.to(parameter.dtype)
        self._sum = [None] * len(self._parameters)
