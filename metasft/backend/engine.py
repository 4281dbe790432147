"""The engine under the episodic trainers: veRL's, with task groups and a loss for each task of a pass.

Written against veRL 0.9.0 (the version pyproject pins). :class:`MetaFSDPEngine` is veRL's FSDP engine with these
differences: the data-parallel group is the task group; a group of one rank is not wrapped by FSDP; LoRA parameters stay
in fp32 and outside the shards; only trained parameters reach the optimizer; one pass can carry the examples of several
tasks, each with a loss of its own; the output layer runs at response positions only; and packed sequences attend each
to itself without a mask over the whole row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_device_name
from verl.utils.fsdp_utils import apply_fsdp2, fsdp2_load_full_state_dict
from verl.utils.model import _architecture_to_auto_class
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.config import TrainingWorkerConfig
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.engine.utils import prepare_micro_batches
from verl.workers.engine_workers import TrainingWorker

from metasft.backend.batches import make_batch
from metasft.backend.checks import check_shardable, reading_model
from metasft.checkpoint.exports import load_adapter_folder
from metasft.model import packed_attention
from metasft.model.forward_pass import ForwardPass, LowerLayers, Output, ResponseTokens, running
from metasft.model.inner_loop import Adaptation, local_tensor, upload
from metasft.model.layouts import Layout, Probe
from metasft.model.lower_layers import base_model, in_rows
from metasft.model.packed_attention import PackedSequences
from metasft.model.response_loss import losses, watch_output_layer
from metasft.model.stacked_lora import TaskBatchedLoRA

MODEL_TYPE = "meta_language_model"


@EngineRegistry.register(model_type=MODEL_TYPE, backend="fsdp2", device=["cuda", "npu", "cpu"])
class MetaFSDPEngine(FSDPEngineWithLMHead):
    """veRL's FSDP2 engine over a (task groups) x (ranks of a group) mesh.

    :attr:`lowest_layer` is the number of the first decoder layer in which inner steps adapt something, where the layers
    below are computed once per example (:mod:`metasft.model.lower_layers`); 0 where passes are whole.

    ``engine_config.fsdp_size`` is the size of a task group. The ranks of a group hold one model (sharded by FSDP2 when
    there is more than one) and split the examples of an episode; different groups work on different episodes and never
    communicate here. veRL normalises the loss over ``get_data_parallel_group()``, which therefore is the group.
    """

    def __init__(self, model_config: Any, *args: Any, **kwargs: Any) -> None:
        # TrainingWorker stores the registry key here; veRL's model loading expects its own name.
        model_config.model_type = "language_model"
        self.task_batch: TaskBatchedLoRA | None = None
        # The model's own forward, example by example, until metasft.backend.layout_proof has proven something better.
        self.layout = Layout("padded", "own")
        self.output: Output = "logits"
        self.lowest_layer = 0
        super().__init__(model_config, *args, **kwargs)

    # ---- task groups ------------------------------------------------------------------------------------------------

    def _init_device_mesh(self) -> None:
        world_size, group_size = dist.get_world_size(), self.engine_config.fsdp_size
        assert group_size >= 1 and world_size % group_size == 0, (world_size, group_size)
        self.mesh = init_device_mesh(
            get_device_name(), (world_size // group_size, group_size), mesh_dim_names=("task", "shard")
        )
        self.device_mesh = self.mesh["shard"]
        self.ulysses_device_mesh = None
        self.ulysses_parallel_group = None
        self.ulysses_sequence_parallel_size = 1
        self.use_ulysses_sp = False

    def get_data_parallel_rank(self) -> int:
        return self.mesh["shard"].get_local_rank()

    def get_data_parallel_size(self) -> int:
        return self.mesh["shard"].size()

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.mesh["shard"].get_group()

    @property
    def task_group_index(self) -> int:
        return self.mesh["task"].get_local_rank()

    @property
    def num_task_groups(self) -> int:
        return self.mesh["task"].size()

    # ---- model and optimizer ----------------------------------------------------------------------------------------

    def use_configured_optimizer(self) -> None:
        """Put the settings of the command in the place of those that loading a resume state brings back.

        The state holds the optimizer's settings and the learning rate of the schedule it was saved under: a changed
        ``optim.lr`` would be ignored, and the first step after extending a schedule would be taken at its old end.
        """
        optimizer, schedule = self.optimizer, self.lr_scheduler
        for group, share in zip(optimizer.param_groups, schedule.lr_lambdas, strict=True):
            group.update({key: value for key, value in optimizer.defaults.items() if key in group})
            group["initial_lr"] = optimizer.defaults["lr"]
            group["lr"] = group["initial_lr"] * share(schedule.last_epoch)
        schedule.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        schedule._last_lr = [group["lr"] for group in optimizer.param_groups]

    def _build_module(self) -> torch.nn.Module:
        with reading_model(self.model_config.path), _as_verl_reads(self.model_config.hf_config):
            return super()._build_module()

    def _build_lora_module(self, module: Any) -> Any:
        path = self.model_config.lora_adapter_path
        if path is not None and Path(path).is_dir():
            load_adapter_folder(Path(path))  # peft would read pickled weights, and settings of any kind
        module = super()._build_lora_module(module)
        # veRL makes the embeddings' output require a gradient, for reentrant checkpointing; the checkpointing used here
        # is not reentrant, and nothing below the first adapter needs a backward.
        module.disable_input_require_grads()
        # veRL casts the adapter to the dtype of the base, because FSDP1 flattens both together. Here adapters are not
        # sharded: they stay in fp32 over a bf16 base. An existing adapter is read again, unrounded.
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.float32)
        if self.model_config.lora_adapter_path is not None:
            from peft import load_peft_weights, set_peft_model_state_dict
            from verl.utils.fs import copy_to_local

            path = copy_to_local(self.model_config.lora_adapter_path, use_shm=self.model_config.use_shm)
            set_peft_model_state_dict(module, load_peft_weights(path, device="cpu"))
        return module

    def _build_fsdp_module(self, module: Any) -> Any:
        precision = self.engine_config.mixed_precision or {}
        param_dtype = PrecisionType.to_dtype(precision.get("param_dtype", "bf16"))
        reduce_dtype = PrecisionType.to_dtype(precision.get("reduce_dtype", "fp32"))
        if param_dtype == torch.float16:
            raise ValueError(
                "engine.mixed_precision.param_dtype=fp16 needs loss scaling, which inner steps do not have; use bf16"
            )
        self._autocast_dtype = param_dtype
        self._model_dtype = module.get_input_embeddings().weight.dtype
        self.scaler = None
        if self.get_data_parallel_size() == 1:
            module = self._place_whole(module)
        else:
            module = self._shard(module, param_dtype, reduce_dtype)
        if self.model_config.enable_activation_offload:
            from verl.utils.activation_offload import enable_activation_offloading

            enable_activation_offloading(
                module, self.engine_config.strategy, self.model_config.enable_gradient_checkpointing
            )
        self.drops_out = _drops_out(module)
        self.own_attention = base_model(module).config._attn_implementation
        if (output_layer := module.get_output_embeddings()) is not None:
            watch_output_layer(output_layer)
        return module

    def _place_whole(self, module: torch.nn.Module) -> torch.nn.Module:
        """A task group of one rank: FSDP over one rank would only copy all weights at every forward."""
        if self.engine_config.offload_policy:
            raise ValueError(
                "engine.offload_policy=true needs FSDP2, and a task group of one rank is not sharded; use "
                "engine.param_offload, or meta.task_group_size above 1"
            )
        module = module.to(get_device_id())
        # Every rank drew its own initial adapter; rank 0's is the run's.
        for tensor in [p.data for p in module.parameters() if p.requires_grad]:
            dist.broadcast(tensor, src=0)
        return module

    def _shard(self, module: torch.nn.Module, param_dtype: torch.dtype, reduce_dtype: torch.dtype) -> torch.nn.Module:
        check_shardable(module)
        offload_policy = None
        if self.engine_config.offload_policy:
            offload_policy = CPUOffloadPolicy(pin_memory=get_device_name() != "cpu")
            self._is_offload_param = self._is_offload_optimizer = False
            self._uses_fsdp2_cpu_offload_policy = True
        kwargs: dict[str, Any] = {
            "mesh": self.device_mesh,
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=True
            ),
            "offload_policy": offload_policy,
            "reshard_after_forward": self.engine_config.reshard_after_forward,
        }
        if self._is_lora:
            # The adapters stay whole on every rank: they are small, and inner steps on them need no gather.
            kwargs["ignored_params"] = {p for p in module.parameters() if p.requires_grad}
        full_state = module.state_dict()
        apply_fsdp2(module, kwargs, self.engine_config)
        fsdp2_load_full_state_dict(module, full_state, self.device_mesh, offload_policy)
        if self._is_lora and offload_policy is not None:
            # veRL has moved everything to the host; FSDP brings back what it shards, when it is needed, and no adapter.
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(get_device_id())
        return module

    def _build_optimizer(self, module: torch.nn.Module) -> torch.optim.Optimizer:
        from verl.workers.config.optimizer import build_optimizer

        # veRL passes all parameters; the frozen base has no business in an optimizer.
        return build_optimizer([p for p in module.parameters() if p.requires_grad], self.optimizer_config)

    def optimizer_without_decay(self, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """An optimizer of the class and settings of theta's, without weight decay; its caller sets the rate."""
        from verl.workers.config.optimizer import build_optimizer

        settings = {**(self.optimizer_config.override_optimizer_config or {}), "weight_decay": 0.0}
        return build_optimizer(parameters, replace(self.optimizer_config, override_optimizer_config=settings))

    @property
    def schedule_share(self) -> float:
        """The current learning rate of theta over ``optim.lr``."""
        return self.lr_scheduler.lr_lambdas[0](self.lr_scheduler.last_epoch)

    def trained_parameters(self) -> list[torch.nn.Parameter]:
        """theta: the parameters that inner and outer steps change, in a fixed order."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model."""
        return getattr(base_model(self.module).config.get_text_config(), "num_hidden_layers", 0)

    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        try:
            super().save_checkpoint(local_path, *args, **kwargs)
        except Exception:
            # veRL waits for all ranks once before the files and twice after them. A rank that cannot write has to
            # arrive there, too: the others would wait for ever, and nobody could agree on what has happened.
            dist.barrier()
            dist.barrier()
            raise

    def batch_tasks(self, *, lr: float, optimizer: str, clip_grad: float | None) -> TaskBatchedLoRA:
        """Let passes carry several tasks, each with a copy of the adapter; the settings are those of an inner step.

        Raises:
            ValueError: the adapter is of a kind that cannot be stacked.
        """
        self.task_batch = TaskBatchedLoRA(
            self.module, lr=lr, optimizer=optimizer, clip_grad=clip_grad, dtype=self._autocast_dtype
        )
        return self.task_batch

    # ---- losses and gradients ---------------------------------------------------------------------------------------

    def loss_and_backward(self, batch: Any, num_tasks: int = 1) -> torch.Tensor:
        """Mean response loss of each task of this group's batch; leaves the gradient of their sum.

        The gradient is in ``.grad``, or in the stacked adapters while :attr:`task_batch` is adapting, averaged over the
        ranks of the group.

        Args:
            batch: from :func:`make_batch`.
            num_tasks: T; the batch's task numbers are below it.

        Returns:
            [T] on the device, this rank's part: their mean over the group is the tasks' loss.
        """
        means = self._run(batch, num_tasks, torch.Tensor.backward)
        if self._is_lora and self.get_data_parallel_size() > 1:
            # FSDP reduces the gradients of its shards; the replicated adapters are ours to reduce.
            if (stacked := self._stacked) is not None:
                gradients = [stacked.gradient]
            else:
                gradients = [p.grad for p in self.trained_parameters() if p.grad is not None]
            all_reduce_flat(gradients, self.get_data_parallel_group())
            torch._foreach_mul_(gradients, 1.0 / self.get_data_parallel_size())
        return means

    def loss_only(self, batch: Any, num_tasks: int = 1) -> torch.Tensor:
        """As :meth:`loss_and_backward`, without gradient."""
        return self._run(batch, num_tasks, None)

    @torch.no_grad()
    def features(self, batch: Any) -> list[torch.Tensor]:
        """What the decoder layers below :attr:`lowest_layer` make of each example of a batch, [tokens, hidden size].

        Args:
            batch: from :func:`make_batch`; its tasks and weights are of no account.
        """
        found: dict[int, torch.Tensor] = {}
        for micro_batch in self._micro_batches(batch):
            self._forward(micro_batch, None, features=found)
        return [found[number] for number in range(len(found))]

    def hessian_vector(
        self, batch: Any, num_tasks: int, adaptation: Adaptation, vector: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """The Hessian of the sum of the tasks' losses, with respect to ``adaptation.tensors()``, times a vector.

        Args:
            batch, num_tasks: as of :meth:`loss_and_backward`.
            vector: in the shapes of ``adaptation.tensors()``.
        """
        assert self.get_data_parallel_size() == 1
        with adaptation.leaves() as leaves, sdpa_kernel(SDPBackend.MATH):
            total = [torch.zeros_like(leaf) for leaf in leaves]

            def twice(loss: torch.Tensor) -> None:
                gradients = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
                products = torch.autograd.grad(gradients, leaves, list(vector), materialize_grads=True)
                torch._foreach_add_(total, list(products))

            self._run(batch, num_tasks, twice, output="logits" if self.output == "logits" else "selected")
        return total

    @property
    def _stacked(self) -> TaskBatchedLoRA | None:
        """The stacked adapters, where the model currently computes with them."""
        return self.task_batch if self.task_batch is not None and self.task_batch.active else None

    def _run(
        self, batch: Any, num_tasks: int, backward: Callable[[torch.Tensor], Any] | None, output: Output | None = None
    ) -> torch.Tensor:
        """veRL's ``forward_backward_batch`` with one loss per task, and without its waits for the device.

        veRL divides a batch by the token count over the data-parallel group; the weights of :func:`make_batch` do that
        for each task by itself. It also asks the ranks of the group which needs most micro-batches, so that all run as
        many; here the batch says so (:func:`count_micro_batches`).
        """
        micro_batches = self._micro_batches(batch)
        means = torch.zeros(num_tasks, dtype=torch.float32, device=get_device_id())
        for number, micro_batch in enumerate(micro_batches, start=1):
            if backward is not None:
                with self._gradient_sync_context(is_last_micro_batch=number == len(micro_batches)):
                    response, nll = self._forward(micro_batch, backward, output)
            else:
                with torch.no_grad():
                    response, nll = self._forward(micro_batch, None)
            means.index_add_(0, response.tasks, nll * response.weights * self.get_data_parallel_size())
        return means

    def _micro_batches(self, batch: Any) -> list[Any]:
        tu.assign_non_tensor(batch, sp_size=1)
        least = tu.get_non_tensor_data(data=batch, key="least_micro_batches", default=None)
        return prepare_micro_batches(batch, same_micro_num_in_dp=False, min_num_micro_batch=least)[0]

    def _forward(
        self,
        micro_batch: Any,
        backward: Callable[[torch.Tensor], Any] | None,
        output: Output | None = None,
        features: dict[int, torch.Tensor] | None = None,
    ) -> tuple[ResponseTokens, torch.Tensor]:
        """Forward, and what ``backward`` does with the loss, of one micro-batch; its response tokens and the loss of
        each, [n].

        With ``features`` the lower layers alone, without response tokens; it takes in what they make of each example.
        """
        device = torch.device(get_device_id())
        packed = self.layout.rows != "padded"
        tu.assign_non_tensor(micro_batch, use_remove_padding=packed)
        micro_batch = self._grouped_by_task(micro_batch)
        # All index arithmetic happens on the host, where the batch still is: nothing waits for the device.
        lengths = micro_batch["input_ids"].offsets().diff()
        response = self._response_of(micro_batch, lengths, packed, output or self.output, features is not None)
        rows = self._packed_rows(micro_batch, response, device) if self.layout.rows == "shared" else None
        counts = outputs = None
        if self._stacked is not None:
            per_example = lengths if packed else torch.ones_like(lengths)
            counts = rows.counts if rows is not None else self._per_task(micro_batch["task"], per_example)
            if response.output != "logits":  # the output layer sees response positions alone
                outputs = self._per_task(response.tasks, torch.ones_like(response.tasks))
        for name in ("index", "labels", "weights", "tasks"):
            setattr(response, name, upload(getattr(response, name), device))

        if rows is None:
            model_inputs, _ = super().prepare_model_inputs(micro_batch)
            model_inputs = {
                name: upload(value, device) if isinstance(value, torch.Tensor) else value
                for name, value in model_inputs.items()
            }
        else:
            model_inputs = {"input_ids": rows.input_ids, "position_ids": rows.position_ids, "attention_mask": None}
        lower, given = None, tu.get_non_tensor_data(data=micro_batch, key="features", default=None)
        if features is not None or given is not None:
            examples, places = micro_batch["example"].tolist(), self._places(rows, lengths, packed)
            lower = LowerLayers(self.lowest_layer)
            if given is not None:
                shape = model_inputs["input_ids"].shape
                lower.given = in_rows([given[example] for example in examples], places, shape.numel()).view(*shape, -1)
        autocast = self._autocast_dtype != torch.float32
        with running(ForwardPass(rows, counts, outputs, response, lower)):
            with torch.autocast(get_device_name(), self._autocast_dtype) if autocast else nullcontext():
                loss, nll = losses(self.module(**model_inputs, use_cache=False).logits, response)
            if backward is not None:
                # FSDP averages over the ranks of the group, each of which holds a part of the sum.
                backward(loss * self.get_data_parallel_size())
        if features is not None:
            assert lower is not None and lower.found is not None
            flat = lower.found.reshape(-1, lower.found.shape[-1])
            for example, place in zip(examples, places, strict=True):
                features[example] = flat.index_select(0, upload(torch.tensor(place), device))
        if backward is None:
            # Without a backward FSDP2 keeps gathered weights where reshard_after_forward=false, and would go on
            # computing with them when the shards have changed.
            for part in self.module.modules():
                if isinstance(part, FSDPModule):
                    part.reshard()
        return response, nll

    def _places(self, rows: PackedSequences | None, lengths: torch.Tensor, packed: bool) -> list[Sequence[int]]:
        """Of each example, where its tokens are in the flattened batch."""
        if rows is not None:
            return [path.nodes for path in rows.paths]
        sizes, width = lengths.tolist(), int(lengths.max())
        starts = (lengths.cumsum(0) - lengths).tolist() if packed else range(0, len(sizes) * width, width)
        return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]

    def _grouped_by_task(self, micro_batch: Any) -> Any:
        """The examples of a task side by side, as stacked adapters need them; veRL may have reordered them."""
        task = micro_batch["task"]
        if self._stacked is None or bool((task.diff() >= 0).all()):
            return micro_batch
        return tu.index_select_tensor_dict(micro_batch, task.argsort(stable=True))

    def _response_of(
        self, micro_batch: Any, lengths: torch.Tensor, packed: bool, output: Output, empty: bool
    ) -> ResponseTokens:
        # Position t predicts token t + 1.
        is_response = torch.roll(micro_batch["loss_mask"].values(), shifts=-1, dims=0) != 0
        flat = is_response.nonzero().squeeze(-1)[: 0 if empty else None]
        offsets = micro_batch["input_ids"].offsets()
        row = torch.searchsorted(offsets, flat, right=True) - 1
        return ResponseTokens(
            index=flat if packed else row * int(lengths.max()) + (flat - offsets[row]),
            labels=torch.roll(micro_batch["input_ids"].values(), shifts=-1, dims=0)[flat],
            weights=micro_batch["loss_weight"][row],
            tasks=micro_batch["task"][row],
            output=output,
        )

    def _packed_rows(self, micro_batch: Any, response: ResponseTokens, device: torch.device) -> PackedSequences:
        """All sequences in one row; moves the index of ``response`` to it."""
        stacked = self._stacked
        # Without stacked adapters all examples meet the same parameters, whatever their task.
        slots = [0] * len(micro_batch["task"]) if stacked is None else micro_batch["task"].tolist()
        sequences = [ids.tolist() for ids in micro_batch["input_ids"].unbind()]
        rows = PackedSequences(
            list(zip(slots, sequences, strict=True)),
            1 if stacked is None else stacked.num_tasks,
            device,
            share=not self.drops_out,  # sequences that share states would share random masks, too
        )
        entry = torch.tensor([node for path in rows.paths for node in path.nodes])
        response.index = entry[response.index]
        return rows

    def _per_task(self, task: torch.Tensor, rows: torch.Tensor) -> list[int]:
        """``rows`` summed by the task each belongs to."""
        assert self._stacked is not None
        return torch.zeros(self._stacked.num_tasks, dtype=torch.long).index_add_(0, task, rows).tolist()

    # ---- what metasft.backend.layout_proof compares -----------------------------------------------------------------

    @property
    def product_dtype(self) -> torch.dtype:
        """In which precision the model multiplies: fp32 only where neither weights nor autocast are narrower."""
        return torch.float32 if {self._autocast_dtype, self._model_dtype} == {torch.float32} else torch.bfloat16

    def use_layout(self, layout: Layout) -> None:
        """Lay the next batches out like this."""
        base, self.layout = base_model(self.module), layout
        if layout.attention == "packed":
            packed_attention.use_packed_attention(base)
        elif base.config._attn_implementation != self.own_attention:
            base.set_attn_implementation(self.own_attention)

    @torch.no_grad()
    def token_losses(
        self, examples: Sequence[Probe], settings: Mapping[str, Any], *, in_two_parts: bool = False
    ) -> list[torch.Tensor]:
        """The loss of each response token of each example, computed together; fp32 on the device.

        Args:
            in_two_parts: the lower layers first, then those from :attr:`lowest_layer` on.
        """
        inputs = [example.tensors for example in examples], [e.task for e in examples], [1.0] * len(examples), settings
        features = self.features(make_batch(*inputs)) if in_two_parts else None
        _, nll = self._forward(make_batch(*inputs, features), None)
        lengths = [int((example.tensors["loss_mask"] != 0).sum()) for example in examples]
        return list(nll.float().split(lengths))


def _drops_out(module: Any) -> bool:
    """Whether training draws random masks: sequences that share states would share them, too."""
    config = module.config.get_text_config()
    return bool(getattr(config, "attention_dropout", 0)) or any(
        isinstance(part, torch.nn.Dropout) and part.p > 0 for part in module.modules()
    )


def build_training_worker(**configs: Any) -> TrainingWorker:
    """veRL's training worker around a :class:`MetaFSDPEngine`; ``configs`` as for veRL's ``TrainingWorkerConfig``."""
    return TrainingWorker(config=TrainingWorkerConfig(model_type=MODEL_TYPE, **configs))


def all_reduce_flat(tensors: Iterable[torch.Tensor], group: dist.ProcessGroup, *, bucket_elements: int = 2**26) -> None:
    """Sum ``tensors`` (fp32, local shards where distributed) over ``group`` in place, flattened into few collectives.

    One collective as long as everything fits a bucket (256 MiB of fp32), which LoRA adapters practically always do. It
    takes place on the accelerator, also for tensors that lie on the host.
    """
    device = torch.device(get_device_id())
    bucket: list[torch.Tensor] = []
    size = 0

    def flush() -> None:
        if not bucket:
            return
        flat = torch.cat([tensor.reshape(-1).to(device, torch.float32) for tensor in bucket])
        dist.all_reduce(flat, op=dist.ReduceOp.SUM, group=group)
        for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))
        bucket.clear()

    for tensor in map(local_tensor, tensors):
        if size + tensor.numel() > bucket_elements:
            flush()
            size = 0
        bucket.append(tensor)
        size += tensor.numel()
    flush()


def copy_to_hdfs(folder: Path, destination: str) -> None:
    """Copy a saved folder to ``trainer.default_hdfs_dir``."""
    from verl.utils import hdfs_io

    hdfs_io.makedirs(destination, exist_ok=True)
    hdfs_io.copy(src=str(folder), dst=destination, dirs_exist_ok=True)


def full_state_dict_on_rank_0(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The whole model's tensors in host memory on rank 0, gathered tensor by tensor; empty on every other rank."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state: Any = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return state if dist.get_rank() == 0 else {}


# veRL would load GPT-2 and its relatives, whose classes are called ...LMHeadModel, without their output layer.
_architecture_to_auto_class.setdefault("LMHeadModel", AutoModelForCausalLM)


@contextmanager
def _as_verl_reads(config: Any) -> Iterator[None]:
    """What veRL's loader asks of every configuration, and older models do not have.

    Numbers of heads are lent while the model is loaded; models without ``sdpa`` get transformers' ``eager``.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", 1)
    lent = [name for name in ("num_attention_heads", "num_key_value_heads") if not hasattr(text, name)]
    for name in lent:
        setattr(text, name, heads)
    model_class = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if config._attn_implementation == "sdpa" and not getattr(model_class, "_supports_sdpa", True):
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        for name in lent:
            delattr(text, name)
