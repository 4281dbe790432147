"""The inner loop: adapt parameters in place on one task, then put theta back bit for bit.

Serves the trainers (parameters may be FSDP2 shards) and the few-shot evaluation (plain modules) alike. Nothing is ever
copied but the trained parameters themselves: with LoRA the frozen base is shared by all tasks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, Self, TypedDict

import torch
from torch.distributed.tensor import DTensor


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of ``tensor`` (the tensor itself when it is not distributed), sharing its storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor``, of the host, on ``device`` without waiting for what the device still has to do.

    From ordinary memory CUDA may first wait for the stream; from pinned memory it never does.
    """
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


@torch.no_grad()
def total_norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Joint L2 norm of the local parts of ``tensors``, 0-dim fp32 on their device; NaN or infinite where they are."""
    if not tensors:
        return torch.zeros(())
    norms = torch._foreach_norm([local_tensor(tensor) for tensor in tensors])
    return torch.stack([norm.to(torch.float32) for norm in norms]).norm()


def make_inner_optimizer(parameters: Sequence[torch.nn.Parameter], name: str, lr: float) -> torch.optim.Optimizer:
    """A fresh inner optimizer. Plain SGD, or AdamW without weight decay (decay would pull towards 0, not theta).

    Raises:
        ValueError: ``name`` is neither ``sgd`` nor ``adamw``.
    """
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=lr)
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    raise ValueError(f"meta.inner_optimizer={name!r} is unknown; choose one of sgd, adamw")


class InnerSettings(TypedDict):
    """Of an inner step: learning rate, ``sgd`` or ``adamw``, and the largest gradient norm of a task (None: any)."""

    lr: float
    optimizer: str
    clip_grad: float | None


class Adaptation(Protocol):
    """Adapts theta to tasks and puts it back: one task at a time in place (:class:`InnerLoop`), or T at once, each in a
    copy of the LoRA adapter (:class:`~metasft.model.stacked_lora.TaskBatchedLoRA`)."""

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """theta, in the order of the model's parameters."""

    def adapting(self, num_tasks: int) -> AbstractContextManager[Self]:
        """Everything that needs theta_i happens inside; afterwards theta is as it was, bit for bit, and ``.grad`` of
        theta holds the sum over the tasks of the gradients since the last :meth:`step`."""

    def step(self) -> None:
        """One inner step of every task along its own gradients; clears them."""

    def zero_grad(self) -> None:
        """Clear all gradients, so that the next backward starts from none."""

    def gradients(self) -> Sequence[torch.Tensor | None]:
        """Sum over the tasks of the gradients since the last step, one tensor (local shard) per parameter; None where
        there is none."""

    # What differentiating through inner steps needs (:mod:`metasft.model.second_order`):

    lr: float

    def tensors(self) -> list[torch.Tensor]:
        """theta_i of all tasks, as they lie in memory."""

    def task_gradients(self) -> list[torch.Tensor]:
        """Their gradients since the last step, to be changed in place."""

    def load(self, tensors: Sequence[torch.Tensor]) -> None:
        """Put earlier :meth:`tensors` in their place."""

    def moment_scale(self) -> list[torch.Tensor] | None:
        """c of the last step, whose direction was c times the first moment; None for sgd."""

    def leaves(self) -> AbstractContextManager[list[torch.Tensor]]:
        """Inside, losses can be differentiated twice with respect to these tensors, which are :meth:`tensors`."""

    def gradient_norms(self) -> torch.Tensor:
        """Norm of each task's gradients since the last step, of this rank's shard, fp32 [T]."""

    def difference(self) -> list[torch.Tensor]:
        """sum_i (theta_i - theta), one tensor (local shard) per parameter: the direction Reptile moves along."""


class InnerLoop:
    """Task adaptation of a fixed list of parameters.

    theta_{i,0} = theta;  theta_{i,k+1} = theta_{i,k} - lr * d/dtheta L(theta_{i,k}; batch k)      (sgd)

    Use :meth:`adapting` around everything that needs theta_i, the backward of the query loss included::

        with inner_loop.adapting() as adaptation:
            for batch in support_batches:
                loss_and_backward(batch)
                adaptation.step()
            loss_and_backward(query_batch)      # the gradient at theta_i is now in .grad

    Args:
        parameters: the trained parameters theta (shards of them under FSDP2).
        lr: inner learning rate.
        optimizer: ``sgd`` or ``adamw``; its state starts fresh in every episode.
        clip_grad: largest gradient norm of one inner step over all ranks of the task group; None = no clipping.
    """

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], *, lr: float, optimizer: str, clip_grad: float | None = None
    ) -> None:
        self.parameters = list(parameters)
        if not self.parameters:
            raise ValueError("there is no trainable parameter to adapt; check model.lora_rank and model.target_modules")
        self.lr = lr
        self._optimizer_name = optimizer
        self._clip_grad = clip_grad
        # Allocated once: the snapshot is the only extra copy of theta that meta-training needs.
        self._theta: list[torch.Tensor] = []

    @contextmanager
    def adapting(self, num_tasks: int = 1) -> Iterator[InnerLoop]:
        """Remember theta, let the caller adapt one task, and restore theta even when the caller raises."""
        assert num_tasks == 1, num_tasks
        self._remember()
        self._optimizer = make_inner_optimizer(self.parameters, self._optimizer_name, self.lr)
        try:
            yield self
        finally:
            self.restore()
            del self._optimizer

    @torch.no_grad()
    def _remember(self) -> None:
        local = [local_tensor(parameter) for parameter in self.parameters]
        if not self._theta:
            self._theta = [torch.empty_like(tensor) for tensor in local]
        torch._foreach_copy_(self._theta, local)

    @torch.no_grad()
    def restore(self) -> None:
        """Put theta back in place, bit for bit. Gradients are left alone."""
        torch._foreach_copy_([local_tensor(parameter) for parameter in self.parameters], self._theta)

    def step(self) -> None:
        """As :meth:`Adaptation.step`, along the gradients in ``.grad``."""
        if self._clip_grad is not None:
            clip_grad_norm(self.parameters, self._clip_grad)
        self._optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        """As :meth:`Adaptation.zero_grad`."""
        for parameter in self.parameters:
            parameter.grad = None

    def gradients(self) -> Sequence[torch.Tensor | None]:
        """As :meth:`Adaptation.gradients`, of one task."""
        return [None if p.grad is None else local_tensor(p.grad) for p in self.parameters]

    @torch.no_grad()
    def gradient_norms(self) -> torch.Tensor:
        """As :meth:`Adaptation.gradient_norms`, [1]."""
        return total_norm([p.grad for p in self.parameters if p.grad is not None]).reshape(1)

    @torch.no_grad()
    def difference(self) -> list[torch.Tensor]:
        """As :meth:`Adaptation.difference`, of one task."""
        return [local_tensor(p) - theta for p, theta in zip(self.parameters, self._theta, strict=True)]

    # ---- differentiating through steps ------------------------------------------------------------------------------

    def tensors(self) -> list[torch.Tensor]:
        """As :meth:`Adaptation.tensors`, of one task."""
        return [parameter.data for parameter in self.parameters]

    def task_gradients(self) -> list[torch.Tensor]:
        """As :meth:`Adaptation.task_gradients`."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def load(self, tensors: Sequence[torch.Tensor]) -> None:
        """As :meth:`Adaptation.load`."""
        torch._foreach_copy_(self.tensors(), list(tensors))

    def moment_scale(self) -> list[torch.Tensor] | None:
        """As :meth:`Adaptation.moment_scale`."""
        return moment_scale(self._optimizer, self.parameters)

    @contextmanager
    def leaves(self) -> Iterator[list[torch.Tensor]]:
        """As :meth:`Adaptation.leaves`: PEFT's layers are plain products."""
        yield list(self.parameters)


BETA_1 = 0.9
"""Of AdamW, torch's default."""


def moment_scale(
    optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter]
) -> list[torch.Tensor] | None:
    """c in AdamW's last direction c * m: 1 / ((1 - beta_1^t) (sqrt(v / (1 - beta_2^t)) + eps)); None for sgd."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return None
    scales = []
    for parameter in parameters:
        state, settings = optimizer.state[parameter], optimizer.defaults
        (beta_1, beta_2), t = settings["betas"], float(state["step"])
        assert beta_1 == BETA_1, beta_1
        root = (state["exp_avg_sq"] / (1 - beta_2**t)).sqrt_().add_(settings["eps"])
        scales.append(root.reciprocal_().div_(1 - beta_1**t))
    return scales


def clip_grad_norm(parameters: Sequence[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """Clip the joint gradient norm of ``parameters`` (plain or FSDP2 shards) in place; returns the norm before."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm: Any = torch.nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        # With engine.offload_policy the shards lie on the host, and ranks communicate from the device.
        norm = norm.to(norm.device_mesh.device_type).full_tensor()  # type: ignore[attr-defined]
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
