"""Every touch of veRL's internals: the engine under the episodic trainers, its task groups and its batches.

Written against veRL 0.9.0 (the version pyproject pins). :class:`MetaFSDPEngine` is veRL's FSDP engine with five
differences: the data-parallel group is the task group; a group of one rank is not wrapped by FSDP; LoRA parameters stay
in fp32 and outside the shards; only trained parameters reach the optimizer; logits are computed at response positions
only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.dataset_utils import SFTTensorCollator
from verl.utils.device import get_device_id, get_device_name
from verl.utils.fsdp_utils import apply_fsdp2, fsdp2_load_full_state_dict
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.config import TrainingWorkerConfig
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.losses import sft_loss

from metasft.adaptation import local_tensor

MODEL_TYPE = "meta_language_model"


@EngineRegistry.register(model_type=MODEL_TYPE, backend="fsdp2", device=["cuda", "npu", "cpu"])
class MetaFSDPEngine(FSDPEngineWithLMHead):
    """veRL's FSDP2 engine over a (task groups) x (ranks of a group) mesh.

    ``engine_config.fsdp_size`` is the size of a task group. The ranks of a group hold one model (sharded by FSDP2 when
    there is more than one) and split the examples of an episode; different groups work on different episodes and never
    communicate here. veRL normalises the loss over ``get_data_parallel_group()``, which therefore is the group.
    """

    def __init__(self, model_config: Any, *args: Any, **kwargs: Any) -> None:
        # TrainingWorker stores the registry key here; veRL's model loading expects its own name.
        model_config.model_type = "language_model"
        self.response_only_logits = True
        self._response_index: torch.Tensor | None = None
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

    def _build_lora_module(self, module: torch.nn.Module) -> torch.nn.Module:
        module = super()._build_lora_module(module)
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

    def _build_fsdp_module(self, module: torch.nn.Module) -> torch.nn.Module:
        precision = self.engine_config.mixed_precision or {}
        param_dtype = PrecisionType.to_dtype(precision.get("param_dtype", "bf16"))
        reduce_dtype = PrecisionType.to_dtype(precision.get("reduce_dtype", "fp32"))
        if param_dtype == torch.float16:
            raise ValueError(
                "engine.mixed_precision.param_dtype=fp16 needs loss scaling, which inner steps do not have; use bf16"
            )
        self._autocast_dtype = param_dtype
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
        self._watch_output_embeddings(module)
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
        return module

    def _build_optimizer(self, module: torch.nn.Module) -> torch.optim.Optimizer:
        from verl.workers.config.optimizer import build_optimizer

        # veRL hands over all parameters; the frozen base has no business in an optimizer.
        return build_optimizer([p for p in module.parameters() if p.requires_grad], self.optimizer_config)

    def trained_parameters(self) -> list[torch.nn.Parameter]:
        """theta: the parameters that inner and outer steps change, in a fixed order."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    # ---- gradients --------------------------------------------------------------------------------------------------

    def loss_and_backward(self, batch: Any) -> float:
        """Mean response loss of this group's batch; leaves its gradient in ``.grad`` (averaged over the group)."""
        output = self.forward_backward_batch(batch, _SFT_LOSS)
        if self._is_lora and self.get_data_parallel_size() > 1:
            # FSDP reduces the gradients of its shards; the replicated adapters are ours to reduce.
            gradients = [p.grad for p in self.trained_parameters() if p.grad is not None]
            all_reduce_flat(gradients, self.get_data_parallel_group())
            torch._foreach_mul_(gradients, 1.0 / self.get_data_parallel_size())
        return sum(output["loss"])

    def loss_only(self, batch: Any) -> float:
        """Mean response loss of this group's batch, this rank's part (see :func:`EpisodicSFTTrainer`); no gradient."""
        return sum(self.forward_backward_batch(batch, _SFT_LOSS, forward_only=True)["loss"])

    # ---- response-only logits ---------------------------------------------------------------------------------------

    def _watch_output_embeddings(self, module: torch.nn.Module) -> None:
        """Let the output layer see only the hidden states whose next token is trained on.

        With vocabularies of 50,000 to 150,000 tokens and prompts longer than responses, the output layer over all
        positions costs a large part of a small model's time and most of its activation memory.
        """
        output_layer = module.get_output_embeddings()

        def select(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
            if self._response_index is None:
                return None
            hidden = args[0]
            return (hidden.reshape(-1, hidden.shape[-1]).index_select(0, self._response_index), *args[1:])

        output_layer.register_forward_pre_hook(select)

    def prepare_model_inputs(self, micro_batch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        model_inputs, output_args = super().prepare_model_inputs(micro_batch)
        if not self.response_only_logits:
            return model_inputs, output_args
        offsets = micro_batch["input_ids"].offsets()
        # Position t predicts token t + 1: the shift that sft_loss applies to the mask.
        predicts_response = torch.roll(micro_batch["loss_mask"].values(), shifts=-1, dims=0) != 0
        packed_index = predicts_response.nonzero().squeeze(-1)
        output_args["response_index"] = packed_index
        if tu.get_non_tensor_data(data=micro_batch, key="use_remove_padding", default=True):
            self._response_index = packed_index  # one packed row: positions are the flat ones already
        else:
            row = torch.searchsorted(offsets, packed_index, right=True) - 1
            width = model_inputs["input_ids"].shape[1]
            self._response_index = row * width + (packed_index - offsets[row])
        return model_inputs, output_args

    def prepare_model_outputs(
        self, output: Any, output_args: dict[str, Any], micro_batch: Any, logits_processor_func: Any
    ) -> dict[str, torch.Tensor]:
        if not self.response_only_logits:
            return super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        self._response_index = None
        index = output_args["response_index"]
        input_ids = micro_batch["input_ids"]
        labels = torch.roll(input_ids.values(), shifts=-1, dims=0)[index]
        logits = output.logits.reshape(-1, output.logits.shape[-1])
        log_probs = -torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
        # Back to one value per token, zero where the mask of sft_loss is zero anyway.
        full = log_probs.new_zeros(input_ids.values().shape[0]).index_copy(0, index, log_probs)
        return {"log_probs": torch.nested.nested_tensor_from_jagged(full, input_ids.offsets())}


_SFT_LOSS = partial(sft_loss, config=None)


def build_training_worker(**configs: Any) -> TrainingWorker:
    """veRL's training worker around a :class:`MetaFSDPEngine`; ``configs`` as for veRL's ``TrainingWorkerConfig``."""
    return TrainingWorker(config=TrainingWorkerConfig(model_type=MODEL_TYPE, **configs))


def make_batch(examples: Sequence[Mapping[str, torch.Tensor]], settings: Mapping[str, Any]) -> Any:
    """Tokenised examples -> the batch that veRL's engine takes (jagged tensors plus ``settings``)."""
    collate = SFTTensorCollator(settings["pad_mode"])
    return tu.get_tensordict(tensor_dict=collate(list(examples)), non_tensor_dict=dict(settings))


def all_reduce_flat(tensors: Iterable[torch.Tensor], group: dist.ProcessGroup, *, bucket_elements: int = 2**26) -> None:
    """Sum ``tensors`` (fp32, local shards where distributed) over ``group`` in place, flattened into few collectives.

    One collective as long as everything fits a bucket (256 MiB of fp32), which LoRA adapters practically always do.
    """
    bucket: list[torch.Tensor] = []
    size = 0

    def flush() -> None:
        if not bucket:
            return
        flat = torch.cat([tensor.reshape(-1).to(torch.float32) for tensor in bucket])
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


def full_state_dict_on_rank_0(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The whole model's tensors in host memory on rank 0, gathered tensor by tensor; empty on every other rank."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return state if dist.get_rank() == 0 else {}
