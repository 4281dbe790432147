"""Schemas of the settings in veRL's own groups: what veRL would only find, in words of its own, once a model is loaded.

Every field is required where veRL composes one: a setting that was deleted is an error. Of ``model``, ``engine``,
``optim``, ``checkpoint`` and ``profiler`` veRL builds dataclasses, which know their other keys themselves; of ``data``
and ``trainer`` it does not, so that their keys are all here. Imports neither torch nor veRL.
"""

from __future__ import annotations

import importlib.util
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from metasft.config.schema import Positive, Record, Schema, Share, Text, Tuple, rule
from metasft.files.atomic import check_place
from metasft.files.paths import user_path

LARGEST_RATE = 1e4
"""A learning rate above it is a typing error."""
LARGEST_RANK = 2**16
LARGEST_SEED = 2**63 - 1
LARGEST_STEPS = 10**9
LOGGERS = {
    **dict.fromkeys(("console", "file")),
    **{name: name for name in ("tensorboard", "wandb", "mlflow", "swanlab", "clearml", "trackio")},
    "vemlp_wandb": "volcengine_ml_platform",
}
"""And the packages that they need."""
TEMPLATE_ARGUMENTS = (
    *("conversation", "messages", "processor", "tokenizer", "tools", "add_generation_prompt", "tokenize"),
    *("return_dict", "return_tensors", "chat_template", "strftime_now"),
)
"""What a chat template gets from elsewhere: veRL, ``model.custom_chat_template``, and the date of its arguments."""
START = "start from one of data/math_science_meta/config_*.yaml"


def _is_installed(module: str) -> bool:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):  # of what it is a part of; or no name at all
        return False
    return spec is not None and spec.origin is not None  # a folder of that name, such as wandb leaves, has no origin


Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
Steps = Annotated[int, Field(ge=1, le=LARGEST_STEPS)]
Precision = Literal["fp32", "bf16", "float32", "bfloat16"]
Library = Annotated[Text, rule(_is_installed, "a module that can be imported")]
Logger = Annotated[str, rule(LOGGERS.__contains__, f"one of {', '.join(LOGGERS)}")]
TemplateArguments = Annotated[
    dict[str, Any],
    rule(
        lambda value: not set(value) & set(TEMPLATE_ARGUMENTS),
        f"a mapping of variables of the chat template, none of which is {', '.join(TEMPLATE_ARGUMENTS)}",
    ),
]
Contents = Annotated[
    list[str],
    rule(
        lambda value: set(value) == {"model", "optimizer", "extra"},
        "[model,optimizer,extra]: a run resumes exactly from these together, and exports are written beside them",
    ),
]


def replaced(*neutral: Any, by: str) -> AfterValidator:
    """A setting of veRL that the episodic trainers replace: values that mean "not set", and what to use instead."""

    def check(value: Any) -> Any:
        if not any(value == one and type(value) is type(one) for one in neutral):
            raise ValueError(f"has no effect here; {by}")
        return value

    return AfterValidator(check)


class Built(Record):
    """A group of which veRL makes the dataclass that ``_target_`` names."""

    target: Text = Field(alias="_target_", description=f"the class of the group, or {START}")


class _ModelFlags(Built):
    enable_activation_offload: bool
    enable_gradient_checkpointing: bool
    trust_remote_code: bool
    use_liger: bool
    use_remove_padding: bool
    use_shm: bool


class Model(_ModelFlags):
    path: Text = Field(description="a Hugging Face model folder or a model of the hub")
    lora_rank: int = Field(ge=0, le=LARGEST_RANK, description="rank of the adapters; 0 = full-parameter training")
    lora_alpha: Any = None
    lora_adapter_path: str | None = None
    target_modules: Text | Annotated[list[Text], Field(min_length=1)] | None = Field(
        description="all-linear, or a list of names of modules such as [q_proj,v_proj]"
    )
    custom_chat_template: str | None = Field(description="a Jinja template, or null")
    override_config: dict[str, Any] | None = Field(description="a mapping that changes what config.json says")
    external_lib: Library | list[Library] | None = Field(
        description="null, or the name of a module that can be imported"
    )
    use_fused_kernels: Annotated[
        Any, replaced(False, by="the response-only loss replaces veRL's fused loss kernels")
    ] = None

    @model_validator(mode="after")
    def _rules(self) -> Model:
        alpha = self.lora_alpha
        if self.lora_rank and not (type(alpha) in (int, float) and 0 < alpha < float("inf")):
            raise ValueError(f"model.lora_alpha={alpha!r} must be a number above 0")
        if not self.lora_rank and self.lora_adapter_path is not None:
            raise ValueError(
                f"model.lora_adapter_path={self.lora_adapter_path!r} has no effect with model.lora_rank=0; "
                "set the rank of that adapter"
            )
        return self


class MixedPrecision(Record):
    param_dtype: Precision = Field("bf16", description="fp16 would need loss scaling, which inner steps do not have")
    reduce_dtype: Precision = "fp32"


class _EngineFlags(Built):
    entropy_checkpointing: bool
    entropy_from_logits_with_chunking: bool
    forward_prefetch: bool
    full_determinism: bool
    offload_policy: bool
    optimizer_offload: bool
    pad_to_length: bool
    param_offload: bool
    reshard_after_forward: bool
    use_orig_params: bool
    use_torch_compile: bool


class Engine(_EngineFlags):
    strategy: Literal["fsdp2"] = Field(description="the inner loop steps FSDP2 shards: set fsdp2")
    seed: Seed
    model_dtype: Precision
    mixed_precision: MixedPrecision | None = Field(description="param_dtype and reduce_dtype")
    entropy_from_logits_chunk_size: Positive
    pad_to_length_bucket: Positive
    fsdp_size: Annotated[Any, replaced(-1, None, by="use meta.task_group_size")] = None
    ulysses_sequence_parallel_size: Annotated[
        Any, replaced(1, by="sequence parallelism inside an episode is not supported")
    ] = None
    forward_only: Annotated[Any, replaced(False, by="a trainer needs gradients")] = None


class Optim(Built):
    lr: float = Field(gt=0, le=LARGEST_RATE, description="the meta learning rate")
    clip_grad: float = Field(gt=0, description="the largest norm of the meta-gradient, above 0")
    weight_decay: float = Field(ge=0, le=1e4)
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        min_length=2, max_length=2, description="two numbers from 0 to below 1, such as [0.9,0.999]"
    )
    lr_scheduler_type: Literal["constant", "cosine"]
    lr_warmup_steps: int | None = Field(ge=-1, description="a whole number of meta-steps; -1 = by the ratio")
    lr_warmup_steps_ratio: Share | None
    min_lr_ratio: Share | None
    num_cycles: float = Field(ge=0, le=1e6, description="cosine cycles")
    optimizer: Text
    optimizer_impl: Text


class _DataFlags(Schema):
    image_key: Any = None
    video_key: Any = None
    image_patch_size: Any = None
    shuffle: Any = None
    seed: Any = None
    use_dynamic_bsz: bool
    balance_dp_token: bool
    ignore_input_ids_mismatch: bool
    use_shm: bool


class Data(_DataFlags):
    max_length: int = Field(ge=2, description="tokens of the longest example")
    max_token_len_per_gpu: int = Field(ge=1, description="tokens of a micro-batch")
    micro_batch_size_per_gpu: Positive | None = Field(description="examples of a micro-batch, or null")
    pad_mode: Literal["no_padding"] = Field(
        description="the engine packs or pads batches (model.use_remove_padding): set no_padding"
    )
    truncation: Literal["error", "right"] = Field(description="packed examples can only be cut at their end")
    messages_key: Text = Field(description="the name of a column")
    tools_key: Text
    enable_thinking_key: Text
    enable_thinking_default: bool | Literal["none"] | None = Field(
        description="true, false, or null for the template's own"
    )
    apply_chat_template_kwargs: TemplateArguments
    num_workers: int = Field(ge=0)
    train_files: Annotated[Any, replaced(None, by="episodes are read from meta.task_dir")] = None
    val_files: Annotated[Any, replaced(None, by="use trainer.test_freq, which reads meta_valid")] = None
    train_batch_size: Annotated[Any, replaced(None, by="use meta.meta_batch_size and meta.inner_batch_size")] = None
    train_max_samples: Annotated[Any, replaced(-1, None, by="use meta.support_samples and meta.query_samples")] = None
    val_max_samples: Annotated[Any, replaced(-1, None, by="use evaluate_few_shot.py --limit")] = None
    custom_cls: Annotated[
        Any, replaced(None, {"path": None, "name": None}, by="veRL's own class reads the examples")
    ] = None


class Trainer(Schema):
    default_local_dir: Text = Field(description="the folder of checkpoints and metrics")
    default_hdfs_dir: Text | None = Field(description="the path of a folder, or null")
    project_name: Text
    experiment_name: Text
    total_epochs: Steps
    total_training_steps: Steps | None = Field(description="a whole number of meta-steps, or null")
    logger: Logger | list[Logger] = Field(description=f"a list with some of {', '.join(LOGGERS)}")
    seed: Seed
    save_freq: Literal[-1, "after_each_epoch"] | Positive = Field(
        description="a whole number of meta-steps, at least 1, -1 for only at the end"
    )
    test_freq: Literal[-1, "after_each_epoch"] | Positive = Field(
        description="a whole number of meta-steps between measurements on the validation tasks, at least 1, -1 for none"
    )
    max_ckpt_to_keep: int | None = Field(ge=-1, description="a whole number of checkpoints, or null for all")
    resume_mode: Literal["auto", "disable", "resume_path"] = Field(description="auto, disable or resume_path")
    resume_from_path: Text | None = Field(description="the path of a global_step_<N> folder, or null")
    nnodes: Positive
    n_gpus_per_node: Positive
    profile_interval: Annotated[tuple[int, int], Tuple] = Field(description="two meta-steps, [-1,-1] for no profile")
    balance_batch: bool
    device: Any = None

    @model_validator(mode="after")
    def _rules(self) -> Trainer:
        for name in [self.logger] if isinstance(self.logger, str) else self.logger:
            if (package := LOGGERS[name]) is not None and not _is_installed(package):
                raise ValueError(
                    f"trainer.logger={self.logger} needs the package {package}, which is not installed; run "
                    f"`pip install {package}`, or leave {name} out"
                )
        check_place(user_path(self.default_local_dir), "trainer.default_local_dir")
        resumed = self.resume_from_path
        if resumed is not None and not user_path(resumed).is_dir():
            raise ValueError(f"trainer.resume_from_path={resumed} is no folder; choose another global_step_<N> folder")
        if resumed is None and self.resume_mode == "resume_path":
            raise ValueError("trainer.resume_from_path is not set; give a global_step_<N> folder, or resume_mode=auto")
        return self


class Checkpoint(Built):
    save_contents: Contents
    load_contents: Contents


class Profiler(Built):
    all_ranks: bool
    enable: bool
