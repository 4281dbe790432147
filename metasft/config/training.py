"""The settings of a training: the ``meta`` group with units and bounds, and the rules over groups.

A wrong setting is reported before a model is loaded, in a second: neither torch nor veRL is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, model_validator

from metasft.config.schema import Positive, Schema, Share, Text, Tuple, Unique, dotted, validated
from metasft.config.verl_groups import (
    LARGEST_RATE,
    START,
    Checkpoint,
    Data,
    Engine,
    Model,
    Optim,
    Profiler,
    Trainer,
)
from metasft.files.paths import user_path

Method = Literal["meta_lora", "fomaml", "reptile", "lora_ml"]
METHODS: tuple[Method, ...] = ("meta_lora", "fomaml", "reptile", "lora_ml")
WITH_INNER_LOOP: tuple[Method, ...] = ("meta_lora", "fomaml", "reptile")
METHOD_TITLES: dict[Method, str] = {
    "meta_lora": "META-LORA",
    "fomaml": "FOMAML-SFT",
    "reptile": "Reptile-SFT",
    "lora_ml": "LoRA-ML",
}
INNER_OPTIMIZERS = ("sgd", "adamw")
_DEFAULTS: dict[Method, dict[str, Any]] = {
    "meta_lora": {},
    "fomaml": {"support_samples": 300, "num_inner_steps": 5},
    "reptile": {"support_samples": 300, "num_inner_steps": 5},
    "lora_ml": {},
}
"""Where they differ from those of the fields."""


def key(doc: str, default: Any = ..., *, methods: tuple[Method, ...] = METHODS, **bounds: Any) -> Any:
    """A key of the ``meta`` group: its meaning, its default, and the methods that read it; an error in the others."""
    return Field(default, description=doc, json_schema_extra={"methods": list(methods)}, **bounds)


class MetaConfig(Schema):
    """The validated ``meta`` group. Build it with :meth:`from_mapping`, which applies the method's defaults."""

    task_dir: Text = key("folder with <task>_support.parquet and <task>_query.parquet")
    inner_lr: float = key("inner learning rate", gt=0, le=LARGEST_RATE)
    tasks: Annotated[tuple[str, ...], Tuple, Unique] | None = key(
        "list of task names; null = every task found", None, min_length=1
    )
    support_samples: int = key(
        "support examples per task; with query_from_support those of the query set too", 100, ge=1
    )
    query_samples: int | None = key(
        "query examples per task; null = all, with query_from_support a quarter of support_samples", None, ge=1
    )
    query_from_support: bool = key(
        "true = the query set is the last query_samples of the support_samples examples; no query file is read", False
    )
    num_inner_steps: int = key("K, inner steps per episode", 10, ge=0, le=100_000)
    inner_optimizer: Literal["sgd", "adamw"] = key("inner optimizer", "sgd")
    inner_scope: Literal["all", "lora_b", "top_layers"] = key(
        "what inner steps adapt: all that is trained, the B matrices of a LoRA alone, or what lies inside the last "
        "inner_top_layers decoder layers",
        "all",
        methods=("meta_lora", "fomaml"),
    )
    inner_top_layers: int | None = key(
        "decoder layers that inner_scope=top_layers adapts", None, ge=1, methods=("meta_lora", "fomaml")
    )
    inner_batch_size: int = key("support examples per inner step", 4, ge=1)
    episode_shots: Positive | Annotated[tuple[Positive, Positive], Tuple] | None = key(
        "support examples of one episode, cycled by its inner steps, a number or [least, most] to draw it from, "
        "at most the whole support set; null = other examples of the support set for every inner step",
        None,
    )
    inner_clip_grad: float | None = key(
        "largest gradient norm of an inner step; null = no clipping", None, gt=0, methods=WITH_INNER_LOOP
    )
    query_batch_size: int = key("query examples per episode; 0 = no query set (Reptile only)", 4, ge=0)
    meta_batch_size: int = key("tasks per meta-step", 4, ge=1, le=100_000)
    trajectory_weight: Share | Annotated[tuple[Share, Share], Tuple] | None = key(
        "share of the inner loop's support gradients in the meta-gradient, from 0 to 1, or [start, end], linear over "
        "the run; null = K / (K + 1), all gradients alike",
        0.0,
        methods=("meta_lora", "fomaml"),
    )
    order: Literal[1, 2] = key(
        "2 = the meta-gradient is differentiated through the inner steps, exactly", 1, methods=("meta_lora",)
    )
    second_order_steps: int | None = key(
        "with order 2: through the last so many inner steps; null = all", None, ge=1, methods=("meta_lora",)
    )
    learned_inner_lr: Literal["none", "per_tensor", "per_tensor_per_step"] = key(
        "inner learning rates that meta-training learns, started at inner_lr: of each trained tensor, or of each at "
        "every inner step",
        "none",
        methods=("meta_lora", "fomaml"),
    )
    inner_lr_meta_lr: float | None = key(
        "learning rate of the logarithms of learned inner rates, for example 0.01",
        None,
        gt=0,
        le=LARGEST_RATE,
        methods=("meta_lora", "fomaml"),
    )
    aggregation: Literal["mean", "sum"] = key("how tasks combine", "mean", methods=("meta_lora", "fomaml"))
    update_shared: bool = key(
        "false = tasks adapt, the shared parameters are never updated", True, methods=WITH_INNER_LOOP
    )
    task_group_size: int | None = key(
        "ranks that share one episode; null = 1 with LoRA, all ranks otherwise", None, ge=1
    )
    task_batching: bool | None = key(
        "with LoRA: all of a rank's tasks in one pass over the frozen base; null = true with LoRA",
        None,
        methods=("meta_lora", "reptile", "lora_ml"),
    )
    task_batch_limit: int | None = key(
        "tasks per pass at most; null = as many as fit the token budget of a pass",
        None,
        ge=1,
        methods=("meta_lora", "reptile", "lora_ml"),
    )
    adaptation_gain_freq: int = key(
        "meta-steps between measurements of the query loss before adaptation; 0 = never", 1, ge=0
    )
    max_skipped_steps: int = key(
        "meta-steps that may be skipped because a loss or gradient was not finite; one more ends the run", 10, ge=0
    )
    theta_check_freq: int = key(
        "meta-steps between comparisons of theta over the ranks, which every save makes too; 0 = never", 100, ge=0
    )
    reptile_step_size: float | None = key(
        "eps in (0, 1], annealed linearly to 0 over training, for example 0.5", None, gt=0, le=1, methods=("reptile",)
    )
    reptile_update: Literal["interpolate", "pseudo_gradient"] = key(
        "interpolate: theta + eps * mean(theta_i - theta); pseudo_gradient: veRL's optimizer on mean(theta - theta_i)",
        "interpolate",
        methods=("reptile",),
    )
    task_lora_rank: int = key(
        "ranks, of model.lora_rank, of the LoRA that each training task has alone", 8, ge=1, methods=("lora_ml",)
    )
    task_lora_lr: float | None = key(
        "learning rate of the tasks' own LoRAs; null = optim.lr", None, gt=0, le=LARGEST_RATE, methods=("lora_ml",)
    )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], method: Method) -> MetaConfig:
        """Validate the plain (resolved) ``meta`` mapping of a run of ``method``.

        Raises:
            ValueError: an unknown key, a key that this method would ignore, a missing key, a wrong type or a value out
                of bounds. The message names key, value and remedy.
        """
        return validated(cls, values, name=lambda loc: dotted(("meta", *loc)), context=method)

    @model_validator(mode="before")
    @classmethod
    def _of_the_method(cls, values: Any, info: ValidationInfo) -> Any:
        if not isinstance(values, Mapping):
            return values
        method: Any = info.context
        for name, field in cls.model_fields.items():
            extra: Any = field.json_schema_extra
            if name in values and method not in extra["methods"]:
                raise ValueError(
                    f"meta.{name}={values[name]!r} has no effect in {METHOD_TITLES[method]}; remove it "
                    f"(it belongs to {', '.join(METHOD_TITLES[reader] for reader in extra['methods'])})"
                )
        return {**_DEFAULTS[method], **values}

    @model_validator(mode="after")
    def _combinations(self, info: ValidationInfo) -> MetaConfig:
        method: Any = info.context
        if self.query_from_support and not self.query_batch_size:
            raise ValueError(
                "meta.query_from_support=true has no effect with meta.query_batch_size=0, which is without a query "
                "set; remove one of them"
            )
        for batch, samples in (("inner_batch_size", "support_samples"), ("query_batch_size", "query_samples")):
            size, there = getattr(self, batch), getattr(self, samples)
            if there is not None and size > there:
                raise ValueError(
                    f"meta.{batch}={size} is larger than meta.{samples}={there}; lower the batch or use more examples"
                )
        if self.query_from_support and (left := self.set_sizes()[0]) < self.inner_batch_size:
            raise ValueError(
                f"meta.inner_batch_size={self.inner_batch_size} is larger than the {max(left, 0)} support examples "
                f"that meta.query_from_support=true leaves of meta.support_samples={self.support_samples}; lower the "
                "batch or meta.query_samples, or use more examples"
            )
        if self.num_inner_steps == 0:
            offs = {"episode_shots": None, "trajectory_weight": 0.0, "learned_inner_lr": "none", "inner_scope": "all"}
            for name, off in offs.items():
                if (value := getattr(self, name)) != off:
                    raise ValueError(
                        f"meta.{name}={_written(value)} has no effect with meta.num_inner_steps=0; remove one of them"
                    )
        self._check_scope(method)
        self._check_order()
        if (self.learned_inner_lr == "none") != (self.inner_lr_meta_lr is None):
            raise ValueError(
                f"meta.inner_lr_meta_lr={self.inner_lr_meta_lr} has no effect with meta.learned_inner_lr=none; remove "
                "it, or set meta.learned_inner_lr=per_tensor"
                if self.learned_inner_lr == "none"
                else f"meta.inner_lr_meta_lr is not set, which meta.learned_inner_lr={self.learned_inner_lr} needs; "
                "give a learning rate of the logarithms of the rates, for example 0.01"
            )
        least, most = self.shots_of_an_episode
        if least > most:
            raise ValueError(
                f"meta.episode_shots={_written(self.episode_shots)} must be at most the {self.set_sizes()[0]} examples "
                "of a support set, or [least, most] in this order; lower it, or use more examples"
            )
        if method != "reptile" and self.query_batch_size < 1:
            raise ValueError(
                f"meta.query_batch_size={self.query_batch_size}: {METHOD_TITLES[method]} computes its "
                "meta-gradient on query examples; use at least 1"
            )
        if self.task_batching is False and self.task_batch_limit is not None:
            raise ValueError(
                f"meta.task_batch_limit={self.task_batch_limit} has no effect with meta.task_batching=false; remove "
                "one of them"
            )
        if method == "reptile" and self.num_inner_steps < 1:
            raise ValueError(
                f"meta.num_inner_steps={self.num_inner_steps}: Reptile moves towards the adapted parameters, so it "
                "needs at least 1 inner step"
            )
        if method == "reptile" and self.reptile_step_size is None:
            raise ValueError("meta.reptile_step_size is not set; give eps in (0, 1], for example 0.5")
        return self

    def _check_scope(self, method: Method) -> None:
        if self.inner_scope == "lora_b" and method != "meta_lora":
            raise ValueError(
                f"meta.inner_scope=lora_b has no effect in {METHOD_TITLES[method]}, which adapts no LoRA; use "
                "top_layers, or remove it"
            )
        if self.inner_scope != "top_layers":
            if self.inner_top_layers is not None:
                raise ValueError(
                    f"meta.inner_top_layers={self.inner_top_layers} has no effect with "
                    f"meta.inner_scope={self.inner_scope}; set meta.inner_scope=top_layers, or remove it"
                )
            return
        if self.inner_top_layers is None:
            raise ValueError(
                "meta.inner_top_layers is not set, which meta.inner_scope=top_layers needs; give a number of decoder "
                "layers, for example a third of the model's"
            )
        if self.order == 2:
            raise ValueError(
                "meta.inner_scope=top_layers: meta.order=2 needs gradients through all layers; set meta.order=1, or "
                "meta.inner_scope=all"
            )

    def _check_order(self) -> None:
        if self.order == 1:
            if self.second_order_steps is not None:
                raise ValueError(
                    f"meta.second_order_steps={self.second_order_steps} has no effect with meta.order=1; set "
                    "meta.order=2, or remove it"
                )
            return
        if self.inner_clip_grad is not None:
            raise ValueError(
                f"meta.inner_clip_grad={self.inner_clip_grad}: meta.order=2 does not go through clipped steps; remove "
                "it, or set meta.order=1"
            )
        if not self.num_inner_steps or (self.second_order_steps or 1) > self.num_inner_steps:
            raise ValueError(
                f"meta.order=2 with meta.second_order_steps={self.second_order_steps}: there are "
                f"meta.num_inner_steps={self.num_inner_steps} to go through; lower the one or raise the other"
            )

    @property
    def exact_steps(self) -> int:
        """The last inner steps that the meta-gradient is differentiated through; 0 where it is first order."""
        return min(self.second_order_steps or self.num_inner_steps, self.num_inner_steps) if self.order == 2 else 0

    @property
    def shots_of_an_episode(self) -> tuple[int, int]:
        """(least, most) of ``episode_shots``, at most the support set; (0, 0) without it."""
        shots = self.episode_shots or 0
        least, most = (shots, shots) if isinstance(shots, int) else shots
        return least, min(most, self.set_sizes()[0])

    @property
    def inner_batch_sizes(self) -> range:
        """The sizes that the batches of inner steps can have: fewer than ``inner_batch_size`` with fewer shots."""
        least, most = (min(shots or self.inner_batch_size, self.inner_batch_size) for shots in self.shots_of_an_episode)
        return range(least, most + 1)

    @property
    def inner_rate_columns(self) -> int:
        """Learned rates of a tensor: K, or 1 where they are the same for every inner step; 0 without them."""
        return {"none": 0, "per_tensor": 1, "per_tensor_per_step": self.num_inner_steps}[self.learned_inner_lr]

    def trajectory_share(self, progress: float) -> float:
        """w of the support gradients.

        Args:
            progress: share of the run's meta-steps that are done, from 0 at the first to 1 at the last.
        """
        weight = self.trajectory_weight
        if weight is None:
            return self.num_inner_steps / (self.num_inner_steps + 1)
        start, end = weight if isinstance(weight, tuple) else (weight, weight)
        return start + (end - start) * progress

    def set_sizes(self, in_query_file: int = 0) -> tuple[int, int]:
        """Examples of a task's support set and of its query set; their sum is what the task has labelled.

        Args:
            in_query_file: examples in the task's query file, which counts where it is read.
        """
        if not self.query_batch_size:
            return self.support_samples, 0
        if not self.query_from_support:
            return self.support_samples, in_query_file if self.query_samples is None else self.query_samples
        quarter = max((self.support_samples + 2) // 4, self.query_batch_size)
        query = quarter if self.query_samples is None else self.query_samples
        return self.support_samples - query, query


class TrainingConfig(Schema):
    """A whole composed configuration of an episodic trainer."""

    meta: MetaConfig = Field(description=START)
    model: Model = Field(description=START)
    engine: Engine = Field(description=START)
    optim: Optim = Field(description=START)
    data: Data = Field(description=START)
    trainer: Trainer = Field(description=START)
    checkpoint: Checkpoint = Field(description=START)
    profiler: Profiler = Field(description=START)

    @model_validator(mode="after")
    def _lora_or_all_parameters(self, info: ValidationInfo) -> TrainingConfig:
        method: Any = info.context
        rank, title = self.model.lora_rank, METHOD_TITLES[method]
        if method in ("meta_lora", "lora_ml") and rank == 0:
            raise ValueError(f"model.lora_rank=0: {title} trains LoRA parameters only; use a rank such as 16")
        if method == "lora_ml" and rank <= self.meta.task_lora_rank:
            raise ValueError(
                f"meta.task_lora_rank={self.meta.task_lora_rank} leaves none of model.lora_rank={rank} to the shared "
                "LoRA; lower it or raise model.lora_rank"
            )
        for name, value, off in (
            ("optim.weight_decay", self.optim.weight_decay, 0.0),
            ("model.lora_adapter_path", self.model.lora_adapter_path, None),
        ):
            if method == "lora_ml" and value != off:
                raise ValueError(
                    f"{name}={value!r}: LoRA-ML leaves room for a new task in the last ranks, which start without "
                    "effect and stay as they are; remove it"
                )
        if method == "fomaml" and rank > 0:
            raise ValueError(
                f"model.lora_rank={rank}: FOMAML-SFT trains all parameters; set 0, or use meta_lora_trainer.py for LoRA"
            )
        if rank > 0:
            return self
        for name in ("task_batching", "task_batch_limit"):
            if (value := getattr(self.meta, name)) not in (None, False):
                raise ValueError(
                    f"meta.{name}={value!r} has no effect when all parameters are trained (model.lora_rank=0): tasks "
                    "share a pass only over a frozen base; remove it, or set model.lora_rank"
                )
        if (dtype := self.engine.model_dtype) in ("bf16", "bfloat16"):
            raise ValueError(
                f"engine.model_dtype={dtype}: {title} trains all parameters, and in bf16 most of an update of 1e-5 is "
                "rounded away; set engine.model_dtype=fp32, with engine.mixed_precision.param_dtype=bf16 to compute in "
                "bf16"
            )
        return self


GROUPS = tuple(TrainingConfig.model_fields)


def check_training_config(config: Mapping[str, Any], method: Method) -> MetaConfig:
    """Check a whole composed configuration (plain, resolved) before anything heavy is imported or loaded.

    Args:
        config: the composed Hydra configuration as a plain mapping with the groups ``meta``, ``model``, ``engine``,
            ``optim``, ``data``, ``trainer``, ``checkpoint``, ``profiler``.
        method: which trainer runs it.

    Returns:
        The validated ``meta`` group.

    Raises:
        ValueError: naming the key, its value and the remedy.
    """
    checked = validated(TrainingConfig, config, context=method)
    check_model_path(checked.model.path)
    return checked.meta


def check_model_path(path: Any) -> None:
    """Raise ValueError when ``model.path`` is a local folder that is not there or not a model.

    A bare name such as ``owner/model`` that does not exist locally is taken for a model of the hub and not checked.
    """
    if not isinstance(path, str) or not path:
        raise ValueError(f"model.path={path!r} must name a Hugging Face model folder or a model of the hub")
    local = user_path(path)
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise ValueError(f"model.path={path!r} holds no config.json; give a Hugging Face model folder")
        return
    if local.exists():
        raise ValueError(f"model.path={path!r} is a file; give a Hugging Face model folder")
    looks_local = path.startswith((".", "/", "~", "models/", "checkpoints/")) or path.count("/") != 1
    if looks_local:
        raise ValueError(
            f"model.path={path!r} does not exist; `python -m metasft.embedded_model --output {path}` makes the "
            "embedded model, any other Hugging Face folder works too"
        )


def resolve_task_group(meta: MetaConfig, *, world_size: int, lora: bool) -> int:
    """The number of ranks that share one episode, checked against the world size and the batch sizes.

    Raises:
        ValueError: the group does not divide the world, the meta-batch does not divide over the groups (the message
            gives the two nearest valid sizes), or a batch of examples does not divide over the ranks of a group.
    """
    group = meta.task_group_size if meta.task_group_size is not None else (1 if lora else world_size)
    if world_size % group:
        divisors = [d for d in range(1, world_size + 1) if world_size % d == 0]
        raise ValueError(
            f"meta.task_group_size={group} does not divide the {world_size} processes; use one of "
            f"{', '.join(map(str, divisors))}"
        )
    if meta.order == 2 and group > 1:
        raise ValueError(f"meta.task_group_size={group}: meta.order=2 needs the whole model on every rank; set it to 1")
    groups = world_size // group
    if meta.meta_batch_size % groups:
        below = meta.meta_batch_size // groups * groups
        valid = [str(size) for size in (below, below + groups) if size > 0]
        raise ValueError(
            f"meta.meta_batch_size={meta.meta_batch_size} does not divide over the {groups} task groups "
            f"({world_size} processes, meta.task_group_size={group}); the nearest valid values are "
            f"{' and '.join(valid)}"
        )
    for key, sizes in _batch_sizes(meta):
        if any(size % group for size in sizes):
            raise ValueError(f"{key} does not divide over the {group} ranks of a task group; use a multiple of {group}")
    return group


def _batch_sizes(meta: MetaConfig) -> list[tuple[str, Sequence[int]]]:
    """(setting, the sizes of batches that it leads to)."""
    inner = "inner_batch_size" if meta.inner_batch_size in meta.inner_batch_sizes else "episode_shots"
    if len(meta.inner_batch_sizes) > 1:
        inner = "episode_shots"
    return [
        (f"meta.{inner}={_written(getattr(meta, inner))}", meta.inner_batch_sizes),
        (f"meta.query_batch_size={meta.query_batch_size}", [meta.query_batch_size]),
    ]


def _written(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def check_micro_batches(config: Mapping[str, Any], meta: MetaConfig, group_size: int) -> None:
    """Without dynamic batches, veRL cuts a rank's share of a batch into equal micro-batches.

    Raises:
        ValueError: the share is not a multiple of ``data.micro_batch_size_per_gpu``.
    """
    data = config["data"]
    if data["use_dynamic_bsz"]:
        return
    micro = data["micro_batch_size_per_gpu"]
    if micro is None:
        raise ValueError("data.micro_batch_size_per_gpu is not set; give at least 1, or data.use_dynamic_bsz=true")
    for key, sizes in _batch_sizes(meta):
        for share in (size // group_size for size in sizes):
            if share % micro:
                raise ValueError(
                    f"data.micro_batch_size_per_gpu={micro} does not divide the {share} examples that each rank works "
                    f"on with {key}; use a divisor, or data.use_dynamic_bsz=true"
                )
