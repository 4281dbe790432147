"""The LoRA adapters of several tasks over one frozen base, in one forward and backward.

The adapters of T tasks are stacked, ``A[T, r, in]`` and ``B[T, r, out]`` (transposed, so that every product below has
its long side contiguous). Rows of the input belong to tasks in contiguous blocks, and for the block X_t of task t

    Y_t = X_t W' + s X_t A_t' B_t                    dX_t = G_t W + s G_t B_t' A_t
    dA_t = s (G_t B_t')' X_t                         dB_t = s (X_t A_t')' G_t

with W the frozen weight and s the LoRA scaling (LoRA, Hu et al. 2021, arXiv 2106.09685, section 4.1): the products with
W run once over the rows of all tasks, the small ones task by task as one batched product. Gradients go straight into
one flat buffer, task beside task, so that an inner step of all tasks is one step of one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from metasft.model.forward_pass import current
from metasft.model.inner_loop import RatedSteps, Rates, make_inner_optimizer, moment_scale, step_rates, upload

REMEDY = "set meta.task_batching=false to adapt one task at a time"


# ------------------------------------------------------------------------------------------------- grouped products


@dataclass(frozen=True)
class Blocks:
    """Contiguous blocks of rows, one per task.

    Attributes:
        counts: rows of each task, in order; 0 where a task has none.
        strategy: how products over blocks of different size are computed: ``loop`` (one product per task: cheapest on a
            CPU), ``grouped`` (torch's grouped GEMM) or ``masked`` (one product over all tasks' adapters side by side,
            the foreign ones masked out: few launches, more arithmetic).
    """

    counts: tuple[int, ...]
    strategy: str = "loop"

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def equal(self) -> bool:
        return len(set(self.counts)) == 1

    def slices(self) -> Iterator[tuple[int, slice]]:
        """(task, rows) of the tasks that have rows."""
        start = 0
        for task, count in enumerate(self.counts):
            if count:
                yield task, slice(start, start + count)
            start += count

    def ends(self, device: torch.device) -> torch.Tensor:
        """Where each block ends, int32 [T]."""
        return _ends(self.counts, device)

    def mask(self, width: int, device: torch.device) -> torch.Tensor:
        """[rows, T * width]: True in the columns of the tasks that a row does not belong to."""
        return _foreign(self.counts, width, device)


# The layers of a pass ask for the same few tensors hundreds of times.
@lru_cache(maxsize=32)
def _ends(counts: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return upload(torch.tensor(counts).cumsum(0).to(torch.int32), device)


@lru_cache(maxsize=32)
def _foreign(counts: tuple[int, ...], width: int, device: torch.device) -> torch.Tensor:
    # From the ends, of which there are few: the mask itself would be megabytes to move.
    row = torch.arange(sum(counts), dtype=torch.int32, device=device)
    task = torch.searchsorted(_ends(counts, device), row, right=True)
    column = torch.arange(len(counts) * width, device=device) // width
    return task[:, None] != column[None, :]


def choose_strategy(device: torch.device, dtype: torch.dtype, widths: Sequence[int]) -> str:
    """How to multiply ragged blocks: see :class:`Blocks`. ``widths``: ranks and feature sizes of the adapted layers."""
    if device.type == "cpu":
        return "loop"
    aligned = all(width % 8 == 0 for width in widths)  # grouped GEMM wants rows of 16 bytes
    if dtype == torch.bfloat16 and aligned and _has_grouped_kernel(device):
        return "grouped"
    return "masked"


def _has_grouped_kernel(device: torch.device) -> bool:
    """Whether torch multiplies groups in one kernel here.

    It has one for compute capabilities 9 and 10 (Hopper, B200); anywhere else ``grouped_mm`` brings the ends to the
    host, at every call, and loops over the groups (``_grouped_mm_cuda`` of ATen's GroupedBlas.cpp, torch 2.10 to 2.13).
    """
    if device.type != "cuda" or torch.version.hip or not hasattr(torch.nn.functional, "grouped_mm"):
        return False
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def rows_times(x: torch.Tensor, weight: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """X_t @ weight_t for every task: [rows, i] and [T, i, j] -> [rows, j]."""
    tasks = weight.shape[0]
    if tasks == 1:
        return x @ weight[0]
    if blocks.equal:
        return torch.bmm(x.view(tasks, -1, x.shape[1]), weight).view(x.shape[0], -1)
    if blocks.strategy == "grouped":
        return torch.nn.functional.grouped_mm(x, weight, offs=blocks.ends(x.device))
    if blocks.strategy == "masked":
        i, j = weight.shape[1:]
        if i <= j:  # the rank comes in: spread each row over its task's columns
            spread = x.repeat(1, tasks).masked_fill_(blocks.mask(i, x.device), 0)
            return spread @ weight.reshape(tasks * i, j)
        every = (x @ weight.permute(1, 0, 2).reshape(i, tasks * j)).masked_fill_(blocks.mask(j, x.device), 0)
        return every.view(-1, tasks, j).sum(dim=1)
    out = x.new_empty(x.shape[0], weight.shape[2])
    for task, rows in blocks.slices():
        torch.mm(x[rows], weight[task], out=out[rows])
    return out


def differentiable_rows_times(x: torch.Tensor, weight: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """:func:`rows_times` by torch's own products, which autograd differentiates as often as asked."""
    if blocks.equal:
        return torch.bmm(x.view(len(weight), -1, x.shape[1]), weight).view(x.shape[0], -1)
    return torch.cat([x[rows] @ weight[task] for task, rows in blocks.slices()])


def add_rows_times(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, alpha: float, blocks: Blocks) -> None:
    """out_t += alpha * X_t @ weight_t, in place: [rows, j], [rows, i], [T, i, j]."""
    tasks = weight.shape[0]
    if tasks == 1:
        out.addmm_(x, weight[0], alpha=alpha)
    elif blocks.equal:
        each = x.shape[0] // tasks
        out.view(tasks, each, -1).baddbmm_(x.view(tasks, each, -1), weight, alpha=alpha)
    elif blocks.strategy == "loop":
        for task, rows in blocks.slices():
            out[rows].addmm_(x[rows], weight[task], alpha=alpha)
    else:
        out.add_(rows_times(x, weight, blocks), alpha=alpha)


def add_block_products(
    out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, alpha: float, blocks: Blocks
) -> None:
    """out_t += alpha * left_t' @ right_t, in place: [T, i, j] (fp32), [rows, i], [rows, j]."""
    tasks, i, j = out.shape
    same = out.dtype == left.dtype
    if tasks == 1:
        if same:
            out[0].addmm_(left.t(), right, alpha=alpha)
        else:
            out[0].add_(left.t() @ right, alpha=alpha)
    elif blocks.equal:
        left, right = left.view(tasks, -1, i), right.view(tasks, -1, j)
        if same:
            out.baddbmm_(left.mT, right, alpha=alpha)
        else:
            out.add_(torch.bmm(left.mT, right), alpha=alpha)
    elif blocks.strategy == "grouped":
        out.add_(torch.nn.functional.grouped_mm(left.t(), right, offs=blocks.ends(left.device)), alpha=alpha)
    elif blocks.strategy == "masked":
        spread = left.repeat(1, tasks).masked_fill_(blocks.mask(i, left.device), 0)
        out.add_((spread.t() @ right).view(tasks, i, j), alpha=alpha)
    else:
        for task, rows in blocks.slices():
            if same:
                out[task].addmm_(left[rows].t(), right[rows], alpha=alpha)
            else:
                out[task].add_(left[rows].t() @ right[rows], alpha=alpha)


# ------------------------------------------------------------------------------------------------- one layer


@dataclass
class _Stack:
    """Views of one layer's adapters and gradients in the flat buffers: A [T, r, in], B [T, r, out].

    Attributes:
        a, b: what products read, in their precision.
        theta_a, theta_b: the adapters, fp32; the same tensors where products are fp32.
        grad_a, grad_b: their gradients, fp32.
    """

    a: torch.Tensor
    b: torch.Tensor
    theta_a: torch.Tensor
    theta_b: torch.Tensor
    grad_a: torch.Tensor
    grad_b: torch.Tensor
    scaling: float


class _StackedLinear(torch.autograd.Function):
    """A frozen linear layer plus the stacked adapters. Gradients of the adapters go into the stack, not to autograd.

    ``anchor`` is an empty tensor that requires a gradient: without it autograd would skip layers whose input needs
    none.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, anchor, stack, blocks):
        result = torch.nn.functional.linear(x, weight, bias)
        hidden = rows_times(x, stack.a.mT, blocks)
        add_rows_times(result, hidden, stack.b, stack.scaling, blocks)
        ctx.save_for_backward(x, weight, hidden)
        ctx.stack, ctx.blocks = stack, blocks
        return result

    @staticmethod
    def backward(ctx, grad):
        x, weight, hidden = ctx.saved_tensors
        stack, blocks = ctx.stack, ctx.blocks
        grad = grad.contiguous()
        grad_hidden = rows_times(grad, stack.b.mT, blocks)
        add_block_products(stack.grad_b, hidden, grad, stack.scaling, blocks)
        add_block_products(stack.grad_a, grad_hidden, x, stack.scaling, blocks)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
            add_rows_times(grad_x, grad_hidden, stack.a, stack.scaling, blocks)
        return grad_x, None, None, None, None, None


class _StackedDelta(torch.autograd.Function):
    """The adapters' part alone, for base layers that are more than a frozen matrix (quantised ones, for instance)."""

    @staticmethod
    def forward(ctx, x, anchor, stack, blocks):
        hidden = rows_times(x, stack.a.mT, blocks)
        result = rows_times(hidden, stack.b, blocks).mul_(stack.scaling)
        ctx.save_for_backward(x, hidden)
        ctx.stack, ctx.blocks = stack, blocks
        return result

    @staticmethod
    def backward(ctx, grad):
        x, hidden = ctx.saved_tensors
        stack, blocks = ctx.stack, ctx.blocks
        grad = grad.contiguous()
        grad_hidden = rows_times(grad, stack.b.mT, blocks)
        add_block_products(stack.grad_b, hidden, grad, stack.scaling, blocks)
        add_block_products(stack.grad_a, grad_hidden, x, stack.scaling, blocks)
        grad_x = rows_times(grad_hidden, stack.a, blocks).mul_(stack.scaling) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None


class _Layer:
    """One PEFT LoRA layer under task batching: replaces its ``forward`` while stacked adapters are active."""

    def __init__(self, name: str, module: Any, adapter: str) -> None:
        self.name, self.module = name, module
        self.scaling: float = module.scaling[adapter]
        self.a: torch.nn.Parameter = module.lora_A[adapter].weight  # [r, in]
        self.b: torch.nn.Parameter = module.lora_B[adapter].weight  # [out, r]
        self.base = module.get_base_layer()
        # A plain frozen matrix can share its products with the adapters; what else a base layer does is its own.
        self.fused = isinstance(self.base, torch.nn.Linear) and not getattr(self.base, "quant_state", None)
        self.stack: _Stack  # while stacked adapters are active
        self.leaves: tuple[torch.Tensor, torch.Tensor] | None = None  # A and B, while passes are differentiated twice


# ------------------------------------------------------------------------------------------------- all layers


class TaskBatchedLoRA:
    """Task adaptation of T copies of a model's LoRA adapter at once: an ``Adaptation`` of several tasks.

    The model's own adapter is theta and is never touched. Inside :meth:`adapting` every LoRA layer computes with the
    stacked adapters, and ``ForwardPass.counts`` says which rows of a batch belong to which task::

        with task_batch.adapting(num_tasks) as adaptation:
            for batch in support_batches:                     # examples of all tasks, those of one task side by side
                with running(ForwardPass(counts=counts)):
                    loss_of_all_tasks.backward()               # the sum of the tasks' mean losses
                adaptation.step()
            with running(ForwardPass(counts=counts)):
                query_loss_of_all_tasks.backward()
        # .grad of the model's own adapter now holds the sum of the tasks' query gradients

    Gradients of different tasks never mix: no row of one task takes part in a product with another task's adapter.

    Args:
        model: a PEFT model with one active LoRA adapter on linear layers.
        lr: inner learning rate.
        optimizer: ``sgd`` or ``adamw``; its state starts fresh in every episode.
        clip_grad: largest gradient norm of one inner step of one task; None = no clipping.
        dtype: of the adapters' products; the adapters themselves, their gradients and their steps are fp32.

    Raises:
        ValueError: the adapter is not a plain LoRA of linear layers (DoRA, dropout, embeddings, trained base weights),
            naming the module and the remedy.
    """

    def __init__(
        self,
        model: Any,
        *,
        lr: float,
        optimizer: str,
        clip_grad: float | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._layers = find_lora_layers(model)
        self._dtype = dtype
        self.lr, self._optimizer_name, self._clip_grad = lr, optimizer, clip_grad
        self._output_layer = model.get_output_embeddings()
        self._theta = torch.nn.Parameter(torch.empty(0))
        self._compute = self._theta.data
        self.num_tasks = 0
        self.trained_parameters = sum(layer.a.numel() + layer.b.numel() for layer in self._layers)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """As of :class:`~metasft.model.inner_loop.Adaptation`: the model's own adapter."""
        return [parameter for layer in self._layers for parameter in (layer.a, layer.b)]

    @property
    def active(self) -> bool:
        """Whether the model currently computes with stacked adapters."""
        return self.num_tasks > 0

    # ---- life of an adaptation --------------------------------------------------------------------------------------

    @contextmanager
    def adapting(self, num_tasks: int, rates: Rates | None = None) -> Iterator[TaskBatchedLoRA]:
        """Give ``num_tasks`` tasks a copy of theta each, and let the model compute with the copies.

        On leaving, the gradients since the last step (the query gradients), summed over the tasks, are in ``.grad`` of
        the model's own adapter.

        Args:
            num_tasks: T.
            rates: in place of the one rate, in the order of :attr:`parameters`; the same for all tasks.
        """
        assert num_tasks > 0 and not self.active, (num_tasks, self.num_tasks)
        self._allocate(num_tasks, self._dtype)
        self._optimizer: torch.optim.Optimizer | RatedSteps
        if rates is None:
            self._optimizer = make_inner_optimizer([self._theta], self._optimizer_name, self.lr)
        else:
            self._optimizer = RatedSteps(self._views(), self._optimizer_name, rates)
        self.num_tasks = num_tasks
        try:
            for layer in self._layers:
                layer.module.forward = _forward_with_stack(self, layer)
            yield self
            self._add_up()
        finally:
            for layer in self._layers:
                del layer.module.forward  # the class's own again
                del layer.stack
            self.num_tasks = 0
            del self._optimizer
            self._has_gradient = False

    @torch.no_grad()
    def _allocate(self, num_tasks: int, dtype: torch.dtype) -> None:
        device = self._layers[0].a.device
        size = num_tasks * self.trained_parameters
        if self._theta.numel() != size:
            self._theta = torch.nn.Parameter(torch.empty(size, dtype=torch.float32, device=device))
            self._gradient = torch.zeros(size, dtype=torch.float32, device=device)
        self._gradient.zero_()
        self._theta.grad = self._gradient
        self._has_gradient = False
        self._compute = self._theta.data if dtype == torch.float32 else torch.empty_like(self._theta, dtype=dtype)
        start = 0
        for layer in self._layers:
            (rank, fan_in), fan_out = layer.a.shape, layer.b.shape[0]
            views = []
            for width in (fan_in, fan_out):
                stop = start + num_tasks * rank * width
                shape = (num_tasks, rank, width)
                views.append(
                    [flat[start:stop].view(shape) for flat in (self._theta.data, self._compute, self._gradient)]
                )
                start = stop
            (a, compute_a, grad_a), (b, compute_b, grad_b) = views
            a.copy_(layer.a)
            b.copy_(layer.b.t())
            layer.stack = _Stack(compute_a, compute_b, a, b, grad_a, grad_b, layer.scaling)
        self.refresh()
        widths = [w for layer in self._layers for w in (*layer.a.shape, layer.b.shape[0])]
        self._strategy = choose_strategy(device, dtype, widths)

    def _views(self) -> list[torch.nn.Parameter]:
        """:meth:`tensors` as parameters that share the flat buffers."""
        views = [torch.nn.Parameter(tensor) for tensor in self.tensors()]
        for view, gradient in zip(views, self._stacked_gradients(), strict=True):
            view.grad = gradient
        return views

    def _stacked_gradients(self) -> list[torch.Tensor]:
        return [part for layer in self._layers for part in (layer.stack.grad_a, layer.stack.grad_b)]

    def refresh(self) -> None:
        """As of :class:`~metasft.model.inner_loop.Adaptation`: products that are not in fp32 read a copy."""
        if self._compute.dtype != torch.float32:
            self._compute.copy_(self._theta.data)

    # ---- differentiating through steps ------------------------------------------------------------------------------

    def tensors(self) -> list[torch.Tensor]:
        """As of :class:`~metasft.model.inner_loop.Adaptation`: A [T, r, in] and B [T, r, out] of every layer."""
        return [part for layer in self._layers for part in (layer.stack.theta_a, layer.stack.theta_b)]

    def of_task(self, task: int) -> list[torch.Tensor]:
        """The adapter of one task, in the form and order of :attr:`parameters`: A [r, in] and B [out, r]."""
        pairs = [(layer.stack.theta_a[task], layer.stack.theta_b[task].t()) for layer in self._layers]
        return [tensor for pair in pairs for tensor in pair]

    def task_gradients(self) -> list[torch.Tensor]:
        """As of :class:`~metasft.model.inner_loop.Adaptation`."""
        self._has_gradient = True
        return self._stacked_gradients()

    @torch.no_grad()
    def load(self, tensors: Sequence[torch.Tensor]) -> None:
        """As of :class:`~metasft.model.inner_loop.Adaptation`."""
        torch._foreach_copy_(self.tensors(), list(tensors))
        self.refresh()

    def step_rates(self) -> list[float]:
        """As of :class:`~metasft.model.inner_loop.Adaptation`."""
        return step_rates(self._optimizer, 2 * len(self._layers))

    def moment_scale(self) -> list[torch.Tensor] | None:
        """As of :class:`~metasft.model.inner_loop.Adaptation`."""
        scale = moment_scale(self._optimizer)
        if scale is None or isinstance(self._optimizer, RatedSteps):
            return scale
        shapes = [tensor.shape for tensor in self.tensors()]
        parts = scale[0].split([shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    @contextmanager
    def leaves(self) -> Iterator[list[torch.Tensor]]:
        """As of :class:`~metasft.model.inner_loop.Adaptation`: the layers compute with plain products meanwhile."""
        found = [tensor.detach().requires_grad_() for tensor in self.tensors()]
        for layer, a, b in zip(self._layers, found[::2], found[1::2], strict=True):
            layer.leaves = a, b
        try:
            yield found
        finally:
            for layer in self._layers:
                layer.leaves = None

    # ---- one batch --------------------------------------------------------------------------------------------------

    def blocks_for(self, module: torch.nn.Module, rows: int) -> Blocks:
        """The blocks of a layer's input with ``rows`` flattened rows, as the pass that is under way says."""
        forward_pass = current()
        counts = forward_pass.counts
        if module is self._output_layer and forward_pass.output_counts is not None:
            counts = forward_pass.output_counts
        if counts is None:
            assert self.num_tasks == 1, "the pass does not say which rows belong to which task"
            counts = (rows,)
        assert len(counts) == self.num_tasks, (len(counts), self.num_tasks)
        unit, rest = divmod(rows, sum(counts))
        assert rest == 0, (rows, counts)
        return Blocks(tuple(count * unit for count in counts), self._strategy)

    def mark_gradient(self) -> None:
        """Say that a backward is going to add to the gradients."""
        self._has_gradient = True

    # ---- updates ----------------------------------------------------------------------------------------------------

    @property
    def gradient(self) -> torch.Tensor:
        """The gradients of all tasks since the last step, one flat fp32 tensor."""
        return self._gradient

    @torch.no_grad()
    def step(self) -> None:
        """As of :class:`~metasft.model.inner_loop.Adaptation`."""
        if isinstance(self._optimizer, RatedSteps):
            self._optimizer.leave_out()
        if self._clip_grad is not None:
            self._clip(self._clip_grad)
        self._optimizer.step()
        self.zero_grad()
        self.refresh()

    def zero_grad(self) -> None:
        """As of :class:`~metasft.model.inner_loop.Adaptation`."""
        self._gradient.zero_()
        self._has_gradient = False

    @torch.no_grad()
    def gradients(self) -> list[torch.Tensor]:
        """As of :class:`~metasft.model.inner_loop.Adaptation`."""
        parts = ((layer.stack.grad_a.sum(dim=0), layer.stack.grad_b.sum(dim=0).t()) for layer in self._layers)
        return [part for pair in parts for part in pair]

    @torch.no_grad()
    def rate_gradients(self) -> torch.Tensor:
        """As of :class:`~metasft.model.inner_loop.Adaptation`."""
        assert isinstance(self._optimizer, RatedSteps), "there are no rates"
        # A product over the stacks of all tasks, before anything is added up: of each task's own gradient and steps.
        theta = [part for layer in self._layers for part in (layer.a, layer.b.t())]
        return self._optimizer.rate_gradients(self._stacked_gradients(), theta)

    @torch.no_grad()
    def gradient_norms(self) -> torch.Tensor:
        """As of :class:`~metasft.model.inner_loop.Adaptation`."""
        squares = torch.zeros(self.num_tasks, device=self._gradient.device)
        for layer in self._layers:
            for part in (layer.stack.grad_a, layer.stack.grad_b):
                squares += part.square().sum(dim=(1, 2))
        return squares.sqrt()

    def _clip(self, max_norm: float) -> None:
        # The same coefficient as torch.nn.utils.clip_grads_with_norm_, per task.
        factor = (max_norm / (self.gradient_norms() + 1e-6)).clamp(max=1.0)[:, None, None]
        for layer in self._layers:
            layer.stack.grad_a.mul_(factor)
            layer.stack.grad_b.mul_(factor)

    @torch.no_grad()
    def difference(self) -> list[torch.Tensor]:
        """As of :class:`~metasft.model.inner_loop.Adaptation`."""
        result = []
        for layer in self._layers:
            result.append((layer.stack.theta_a - layer.a).sum(dim=0))
            result.append((layer.stack.theta_b - layer.b.t()).sum(dim=0).t())
        return result

    @torch.no_grad()
    def _add_up(self) -> None:
        if not self._has_gradient:
            return
        for parameter, gradient in zip(self.parameters, self.gradients(), strict=True):
            parameter.grad = gradient.contiguous()

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> None:
        """Give every task random adapters, far from theta and from each other."""
        noise = torch.randn(self._theta.shape, generator=generator)
        self._theta.data.add_(noise.to(self._theta.device), alpha=0.05)
        self.refresh()

    @torch.no_grad()
    def task_tensors(self, task: int) -> list[torch.Tensor]:
        """theta_i of one task, in the order and shapes of :attr:`parameters`."""
        stacks = [layer.stack for layer in self._layers]
        return [t for stack in stacks for t in (stack.theta_a[task], stack.theta_b[task].t())]


def find_lora_layers(model: torch.nn.Module) -> list[_Layer]:
    """The LoRA layers of a PEFT model that can be batched.

    Raises:
        ValueError: something else than a plain LoRA of a linear layer is trained.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[_Layer] = []
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if not isinstance(module, LoraLayer) or not hasattr(module, "get_base_layer"):
            raise ValueError(f"{name} is a {type(module).__name__}, which task batching does not cover; {REMEDY}")
        active = [adapter for adapter in module.active_adapters if adapter in module.lora_A]
        if len(active) != 1 or module.merged or module.disable_adapters:
            if module.lora_embedding_A or len(active) != 1:
                raise ValueError(
                    f"{name} has {len(active)} active adapters on a linear layer ({type(module).__name__}), task "
                    f"batching needs exactly one; {REMEDY}"
                )
            raise ValueError(f"the adapter of {name} is merged or disabled; unmerge and enable it first")
        (adapter,) = active
        unsupported = {
            "DoRA or another LoRA variant": adapter in module.lora_variant,
            "lora_dropout": not isinstance(module.lora_dropout[adapter], torch.nn.Identity),
            "lora_bias": module.lora_bias.get(adapter, False),
            "a base layer that is not linear": getattr(module.get_base_layer(), "weight", None) is None
            or not (isinstance(module, Linear) or "Linear" in type(module).__name__),
        }
        reasons = [reason for reason, applies in unsupported.items() if applies]
        if reasons:
            raise ValueError(f"{name} uses {reasons[0]}, which task batching does not cover; {REMEDY}")
        layers.append(_Layer(name, module, adapter))
    if not layers:
        raise ValueError(f"the model has no LoRA layer to batch; {REMEDY}")
    ours = {id(parameter) for layer in layers for parameter in (layer.a, layer.b)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in ours:
            raise ValueError(
                f"{name} is trained and is no LoRA matrix of a linear layer, which task batching does not cover; "
                f"{REMEDY}"
            )
    return layers


def _forward_with_stack(owner: TaskBatchedLoRA, layer: _Layer) -> Any:
    """What a LoRA layer's ``forward`` is while stacked adapters are active."""
    stack, base = layer.stack, layer.base
    anchor = torch.empty(0, device=layer.a.device, requires_grad=True)

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows = x.numel() // x.shape[-1]
        blocks = owner.blocks_for(layer.module, rows)
        if torch.is_grad_enabled():
            owner.mark_gradient()
        flat = x.reshape(rows, x.shape[-1])
        compute = stack.a.dtype
        if layer.leaves is not None:
            a, b = (leaf.to(compute) for leaf in layer.leaves)
            result = base(x, *args, **kwargs)
            hidden = differentiable_rows_times(flat.to(compute), a.mT, blocks)
            delta = differentiable_rows_times(hidden, b, blocks) * stack.scaling
            return result + delta.view(result.shape).to(result.dtype)
        if layer.fused and _plain_dtype(x, base) == compute:
            bias = base.bias.to(compute) if base.bias is not None else None
            result = _StackedLinear.apply(flat.to(compute), base.weight.to(compute), bias, anchor, stack, blocks)
            return result.view(*x.shape[:-1], -1)
        result = base(x, *args, **kwargs)
        delta = _StackedDelta.apply(flat.to(compute), anchor, stack, blocks)
        return result + delta.view(result.shape).to(result.dtype)

    return forward


def _plain_dtype(x: torch.Tensor, base: torch.nn.Linear) -> torch.dtype:
    """The dtype in which the base layer multiplies here."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return base.weight.dtype
