"""The inner loop: adapt parameters in place on one task, then put theta back bit for bit.

Serves the trainers (parameters may be FSDP2 shards) and the few-shot evaluation (plain modules) alike. Nothing is ever
copied but the trained parameters themselves: with LoRA the frozen base is shared by all tasks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol, Self, TypedDict

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


def names_of(parameters: Iterable[torch.nn.Parameter], model: torch.nn.Module) -> list[str]:
    """The names of some parameters of a model, in their order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for parameter in parameters]


@torch.no_grad()
def total_norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Joint L2 norm of the local parts of ``tensors``, 0-dim fp32 on their device; NaN or infinite where they are."""
    if not tensors:
        return torch.zeros(())
    norms = torch._foreach_norm([local_tensor(tensor) for tensor in tensors])
    return torch.stack([norm.to(torch.float32) for norm in norms]).norm()


def make_inner_optimizer(parameters: Iterable[Any], name: str, lr: float) -> torch.optim.Optimizer:
    """A fresh inner optimizer. Plain SGD, or AdamW without weight decay (decay would pull towards 0, not theta).

    Args:
        parameters: or parameter groups, whose own ``lr`` counts.

    Raises:
        ValueError: ``name`` is neither ``sgd`` nor ``adamw``.
    """
    groups = list(parameters)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr)
    if name == "adamw":
        tensors = [t for group in groups for t in (group["params"] if isinstance(group, dict) else [group])]
        # On a CPU torch's default makes several temporary tensors of the parameters' size in every step.
        fused = all(t.device.type == "cpu" and not isinstance(t, DTensor) for t in tensors)
        return torch.optim.AdamW(groups, lr=lr, weight_decay=0.0, fused=fused or None)
    raise ValueError(f"meta.inner_optimizer={name!r} is unknown; choose one of sgd, adamw")


class InnerSettings(TypedDict):
    """Of an inner step: learning rate, ``sgd`` or ``adamw``, and the largest gradient norm of a task (None: any)."""

    lr: float
    optimizer: str
    clip_grad: float | None


class Rates(NamedTuple):
    """Inner learning rates of one's own for every adapted tensor (Meta-SGD, Li et al. 2017, arXiv 1707.09835) and,
    where S > 1, every inner step (MAML++, Antoniou et al. 2019, arXiv 1810.09502).

    Attributes:
        values: [tensors][S], of the host: to set them never waits for the device. Beyond S steps the last. A tensor
            with rates of 0 is not adapted, and its gradient has no part in clipping.
        are_learned: whether :meth:`Adaptation.rate_gradients` is going to be asked for.
    """

    values: Sequence[Sequence[float]]
    are_learned: bool = False


class InnerScope(NamedTuple):
    """What inner steps adapt of all that is trained, as ANIL (Raghu et al. 2020, arXiv 1909.09157) adapts a part.

    Attributes:
        kind: ``all``; ``lora_b``: the B matrices of an adapter; ``top_layers``: what lies inside the last decoder
            layers, so that the layers below compute the same in every inner step.
        top_layers: how many, with that kind.
    """

    kind: str = "all"
    top_layers: int | None = None

    def lowest_layer(self, num_layers: int) -> int:
        """Number of the first decoder layer of ``num_layers`` in which something is adapted.

        Raises:
            ValueError: there are not more layers than are to be adapted.
        """
        if self.kind != "top_layers":
            return 0
        assert self.top_layers is not None
        if self.top_layers >= num_layers:
            raise ValueError(
                f"{self.top_layers} top layers are to be adapted, and the model has {num_layers}: adapt fewer, or all"
            )
        return num_layers - self.top_layers

    def adapted(self, names: Sequence[str], num_layers: int) -> list[bool]:
        """Which of the tensors with these names are adapted.

        Raises:
            ValueError: as of :meth:`lowest_layer`, or none of them is.
        """
        if self.kind != "top_layers":
            return [self.kind == "all" or "lora_B" in name for name in names]
        lowest = self.lowest_layer(num_layers)
        # The first number in a name is that of its decoder layer; what has none is no part of one.
        layers = [re.search(r"\.([0-9]+)\.", name) for name in names]
        inside = [found is not None and int(found[1]) >= lowest for found in layers]
        if not any(inside):
            raise ValueError(
                f"nothing that is trained lies in the top {self.top_layers} layers: adapt more of them, or all"
            )
        return inside


ALL = InnerScope()


def within_scope(rates: Rates | None, lr: float, adapted: Sequence[bool]) -> Rates | None:
    """The rates with 0 for what inner steps leave alone.

    Args:
        rates: of every trained tensor; None: ``lr`` for all of them.
        adapted: which of these tensors inner steps adapt.
    """
    if all(adapted):
        return rates
    rows = [[lr]] * len(adapted) if rates is None else rates.values
    values = [row if inside else [0.0] * len(row) for inside, row in zip(adapted, rows, strict=True)]
    return Rates(values, rates is not None and rates.are_learned)


class RatedSteps:
    """The inner optimizer with :class:`Rates`: a parameter group per tensor, and what their gradients need.

    To first order, d theta_K / d a_k = theta_k+1 - theta_k for the logarithm a_k of a tensor's rate at step k, so that
    d L / d a_k = <d L / d theta_K, theta_k+1 - theta_k>. With one rate for all steps (S = 1) the sum of these is taken
    from theta_K - theta; with S > 1 every step is remembered: S buffers of the size of the adapted tensors.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], name: str, rates: Rates) -> None:
        assert len(parameters) == len(rates.values), (len(parameters), len(rates.values))
        groups = ({"params": [p], "lr": row[0]} for p, row in zip(parameters, rates.values, strict=True))
        self.optimizer = make_inner_optimizer(groups, name, lr=0.0)
        self._rates, self._done = rates.values, 0
        self._tensors = [local_tensor(parameter.detach()) for parameter in parameters]
        self._left_out = [p for p, row in zip(parameters, rates.values, strict=True) if not any(row)]
        steps = len(rates.values[0])
        self._moves: list[torch.Tensor] = []  # [S, *shape] of each tensor
        if rates.are_learned and steps > 1:
            self._moves = [torch.zeros(steps, *t.shape, dtype=t.dtype, device=t.device) for t in self._tensors]

    @torch.no_grad()
    def leave_out(self) -> None:
        """Clear the gradients of what is not adapted: before a step, and before it is clipped."""
        for parameter in self._left_out:
            if parameter.grad is not None:
                parameter.grad.zero_()

    @torch.no_grad()
    def step(self) -> None:
        """One inner step along ``.grad``."""
        for group, row in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = row[min(self._done, len(row) - 1)]
        moves = [move[self._done] for move in self._moves]
        if moves:
            torch._foreach_copy_(moves, self._tensors)
        self.optimizer.step()
        if moves:
            torch._foreach_neg_(moves)
            torch._foreach_add_(moves, self._tensors)
        self._done += 1

    @torch.no_grad()
    def rate_gradients(self, gradients: Sequence[torch.Tensor | None], theta: Sequence[torch.Tensor]) -> torch.Tensor:
        """As :meth:`Adaptation.rate_gradients`.

        Args:
            gradients: of each tensor, at its current value.
            theta: what each tensor started from, of a shape that broadcasts to its own.
        """
        moves = self._moves or [(t - start)[None] for t, start in zip(self._tensors, theta, strict=True)]
        return torch.stack(
            [
                move.new_zeros(len(move)) if gradient is None else move.flatten(1) @ gradient.flatten().to(move.dtype)
                for move, gradient in zip(moves, gradients, strict=True)
            ]
        ).to(torch.float32)


def plain_optimizer(optimizer: torch.optim.Optimizer | RatedSteps) -> torch.optim.Optimizer:
    """torch's own."""
    return optimizer.optimizer if isinstance(optimizer, RatedSteps) else optimizer


class Adaptation(Protocol):
    """Adapts theta to tasks and puts it back: one task at a time in place (:class:`InnerLoop`), or T at once, each in a
    copy of the LoRA adapter (:class:`~metasft.model.stacked_lora.TaskBatchedLoRA`)."""

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """theta, in the order of the model's parameters."""

    def adapting(self, num_tasks: int, rates: Rates | None = None) -> AbstractContextManager[Self]:
        """Everything that needs theta_i happens inside; afterwards theta is as it was, bit for bit, and ``.grad`` of
        theta holds the sum over the tasks of the gradients since the last :meth:`step`. With ``rates``, in the order of
        :attr:`parameters`, these take the place of the one rate."""

    def step(self) -> None:
        """One inner step of every task along its own gradients; clears them."""

    def zero_grad(self) -> None:
        """Clear all gradients, so that the next backward starts from none."""

    def gradients(self) -> Sequence[torch.Tensor | None]:
        """Sum over the tasks of the gradients since the last step, one tensor (local shard) per parameter; None where
        there is none."""

    def rate_gradients(self) -> torch.Tensor:
        """Sum over the tasks of the derivatives of the loss whose gradients these are by the logarithm of each rate, to
        first order; of this rank's shard, fp32 [tensors, S] on its device. After at most S steps at learned rates."""

    # What differentiating through inner steps (:mod:`metasft.model.second_order`) and LoRAs of single tasks need:

    def tensors(self) -> list[torch.Tensor]:
        """theta_i of all tasks, as they lie in memory."""

    def task_gradients(self) -> list[torch.Tensor]:
        """Their gradients since the last step, to be changed in place."""

    def load(self, tensors: Sequence[torch.Tensor]) -> None:
        """Put earlier :meth:`tensors` in their place."""

    def refresh(self) -> None:
        """After :meth:`tensors` were changed in place: bring up to date what products read."""

    def step_rates(self) -> list[float]:
        """The rate of each of :meth:`tensors` in the last step."""

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
    def adapting(self, num_tasks: int = 1, rates: Rates | None = None) -> Iterator[InnerLoop]:
        """Remember theta, let the caller adapt one task, and restore theta even when the caller raises."""
        assert num_tasks == 1, num_tasks
        self._remember()
        self._optimizer: torch.optim.Optimizer | RatedSteps
        if rates is None:
            self._optimizer = make_inner_optimizer(self.parameters, self._optimizer_name, self.lr)
        else:
            self._optimizer = RatedSteps(self.parameters, self._optimizer_name, rates)
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
        if isinstance(self._optimizer, RatedSteps):
            self._optimizer.leave_out()
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

    def rate_gradients(self) -> torch.Tensor:
        """As :meth:`Adaptation.rate_gradients`, of one task."""
        assert isinstance(self._optimizer, RatedSteps), "there are no rates"
        return self._optimizer.rate_gradients(self.gradients(), self._theta)

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

    def refresh(self) -> None:
        """As :meth:`Adaptation.refresh`: products read the parameters themselves."""

    def step_rates(self) -> list[float]:
        """As :meth:`Adaptation.step_rates`."""
        return step_rates(self._optimizer, len(self.parameters))

    def moment_scale(self) -> list[torch.Tensor] | None:
        """As :meth:`Adaptation.moment_scale`."""
        return moment_scale(self._optimizer)

    @contextmanager
    def leaves(self) -> Iterator[list[torch.Tensor]]:
        """As :meth:`Adaptation.leaves`: PEFT's layers are plain products."""
        yield list(self.parameters)


BETA_1 = 0.9
"""Of AdamW, torch's default."""


def step_rates(optimizer: torch.optim.Optimizer | RatedSteps, tensors: int) -> list[float]:
    """The rate of each adapted tensor in the last step."""
    rates = [group["lr"] for group in plain_optimizer(optimizer).param_groups]
    return rates * tensors if len(rates) == 1 else rates


def moment_scale(optimizer: torch.optim.Optimizer | RatedSteps) -> list[torch.Tensor] | None:
    """c in AdamW's last direction c * m: 1 / ((1 - beta_1^t) (sqrt(v / (1 - beta_2^t)) + eps)); None for sgd."""
    optimizer = plain_optimizer(optimizer)
    if not isinstance(optimizer, torch.optim.AdamW):
        return None
    scales = []
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
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
