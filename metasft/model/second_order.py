"""The derivative of a loss after adaptation with respect to where the adaptation started, exact through its last steps.

MAML (Finn et al. 2017, arXiv 1703.03400) differentiates through the inner loop. Instead of one graph of K steps, what
one step does to the derivative is computed after another, from the last to the first, with a product of that step's
Hessian and a vector (Pearlmutter 1994): with u_k the direction of step k and alpha its rate

    theta_k+1 = theta_k - alpha u_k                      lambda_K = d L(theta_K; Q) / d theta_K
    lambda_k  = lambda_k+1 + H_k v_k                     H_k: Hessian of L(.; batch k) at theta_k
        sgd     v_k = -alpha lambda_k+1
        adamw   v_k = (1 - beta_1) mu_k,  mu_k = beta_1 mu_k+1 - alpha c_k lambda_k+1,  c_k: of the first moment in u_k;
                sqrt(v) + eps in it is held constant: where a gradient is 0 its derivative is not defined

Learned rates, alpha = exp(a) of a tensor: d / d a_k = <lambda_k+1, theta_k+1 - theta_k>, of the steps gone through.

A step's memory is that of one pass with its two backwards, whatever K is; theta_k and c_k of the steps are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from metasft.model.inner_loop import BETA_1, Adaptation

Tensors = Sequence[torch.Tensor]
HessianVector = Callable[[Any, Tensors], Tensors]
"""(batch, vector) -> the Hessian of the batch's loss, at the parameters that are loaded, times the vector."""


class _Step(NamedTuple):
    batch: Any
    theta: list[torch.Tensor]
    rates: list[float]  # of each tensor
    scale: list[torch.Tensor] | None  # c_k


class Tape:
    """The steps of an inner loop that are to be differentiated through.

    Args:
        adaptation: whose steps they are.
    """

    def __init__(self, adaptation: Adaptation) -> None:
        self._adaptation = adaptation
        self._steps: list[_Step] = []

    @torch.no_grad()
    def step(self, batch: Any) -> None:
        """An inner step along the gradients of ``batch``."""
        theta = [tensor.clone() for tensor in self._adaptation.tensors()]
        self._adaptation.step()
        rates, scale = self._adaptation.step_rates(), self._adaptation.moment_scale()
        self._steps.append(_Step(batch, theta, rates, scale))

    @torch.no_grad()
    def backward(self, hessian_vector: HessianVector) -> torch.Tensor:
        """Turn the gradients at theta_K, which are those of the adaptation now, into those at the first theta kept.

        The adaptation is left at that theta.

        Returns:
            The derivatives by the logarithm of each tensor's rate at each step kept, fp32 [tensors, steps].
        """
        of_rates: list[torch.Tensor] = []
        adaptation = self._adaptation
        gradients = adaptation.task_gradients()
        momentum: list[torch.Tensor] | None = None
        for batch, theta, rates, scale in reversed(self._steps):
            moves = torch._foreach_sub(adaptation.tensors(), theta)
            products = [(move * gradient).sum() for move, gradient in zip(moves, gradients, strict=True)]
            of_rates.insert(0, torch.stack(products).float())
            vector = torch._foreach_mul(gradients, [-rate for rate in rates])
            if scale is not None:
                torch._foreach_mul_(vector, scale)
                if momentum is not None:
                    torch._foreach_add_(vector, momentum, alpha=BETA_1)
                momentum = list(vector)
                vector = torch._foreach_mul(vector, 1 - BETA_1)
            adaptation.load(theta)
            with torch.enable_grad():
                product = hessian_vector(batch, vector)
            torch._foreach_add_(gradients, list(product))
        return torch.stack(of_rates, dim=1)
