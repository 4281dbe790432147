"""The ``meta`` group of a training configuration: keys, units, bounds, and every check that needs no model.

Imports neither torch nor veRL, so that a wrong setting is reported in a second.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from metasft.config.verl_groups import LARGEST_RATE, check_groups, check_verl_settings
from metasft.files.paths import user_path
from metasft.files.untrusted import printable

Method = Literal["meta_lora", "fomaml", "reptile"]
METHODS: tuple[Method, ...] = ("meta_lora", "fomaml", "reptile")
METHOD_TITLES: dict[Method, str] = {"meta_lora": "META-LORA", "fomaml": "FOMAML-SFT", "reptile": "Reptile-SFT"}

INNER_OPTIMIZERS = ("sgd", "adamw")
AGGREGATIONS = ("mean", "sum")
REPTILE_UPDATES = ("interpolate", "pseudo_gradient")


def _key(doc: str, *, methods: tuple[Method, ...] = METHODS, **bounds: Any) -> dict[str, Any]:
    """Field metadata: what the key means, which methods read it, and its bounds."""
    return {"doc": doc, "methods": methods, **bounds}


@dataclass(frozen=True)
class MetaConfig:
    """The validated ``meta`` group. Build it with :meth:`from_mapping`, which applies the method's defaults."""

    task_dir: str = field(metadata=_key("folder with <task>_support.parquet and <task>_query.parquet"))
    inner_lr: float = field(metadata=_key("inner learning rate", above=0.0, most=LARGEST_RATE))
    tasks: tuple[str, ...] | None = field(default=None, metadata=_key("task names; null = every task found"))
    support_samples: int = field(default=100, metadata=_key("support examples per task", least=1))
    query_samples: int | None = field(default=None, metadata=_key("query examples per task; null = all", least=1))
    num_inner_steps: int = field(default=10, metadata=_key("K, inner steps per episode", least=0, most=100_000))
    inner_optimizer: str = field(default="sgd", metadata=_key("inner optimizer", choices=INNER_OPTIMIZERS))
    inner_batch_size: int = field(default=4, metadata=_key("support examples per inner step", least=1))
    inner_clip_grad: float | None = field(
        default=None, metadata=_key("largest gradient norm of an inner step; null = no clipping", above=0.0)
    )
    query_batch_size: int = field(
        default=4,
        metadata=_key("query examples per episode; 0 = no query set (Reptile only)", least=0),
    )
    meta_batch_size: int = field(default=4, metadata=_key("tasks per meta-step", least=1, most=100_000))
    aggregation: str = field(
        default="mean",
        metadata=_key("how tasks combine", choices=AGGREGATIONS, methods=("meta_lora", "fomaml")),
    )
    update_shared: bool = field(
        default=True, metadata=_key("false = tasks adapt, the shared parameters are never updated")
    )
    task_group_size: int | None = field(
        default=None, metadata=_key("ranks that share one episode; null = 1 with LoRA, all ranks otherwise", least=1)
    )
    task_batching: bool | None = field(
        default=None,
        metadata=_key(
            "with LoRA: all of a rank's tasks in one pass over the frozen base; null = true with LoRA",
            methods=("meta_lora", "reptile"),
        ),
    )
    task_batch_limit: int | None = field(
        default=None,
        metadata=_key(
            "tasks per pass at most; null = as many as fit the token budget of a pass",
            least=1,
            methods=("meta_lora", "reptile"),
        ),
    )
    adaptation_gain_freq: int = field(
        default=1,
        metadata=_key("meta-steps between measurements of the query loss before adaptation; 0 = never", least=0),
    )
    max_skipped_steps: int = field(
        default=10,
        metadata=_key(
            "meta-steps that may be skipped because a loss or gradient was not finite; one more ends the run", least=0
        ),
    )
    theta_check_freq: int = field(
        default=100,
        metadata=_key(
            "meta-steps between comparisons of theta over the ranks, which every save makes too; 0 = never",
            least=0,
        ),
    )
    reptile_step_size: float | None = field(
        default=None,
        metadata=_key("eps, annealed linearly to 0 over training", above=0.0, most=1.0, methods=("reptile",)),
    )
    reptile_update: str = field(
        default="interpolate",
        metadata=_key(
            "interpolate: theta + eps * mean(theta_i - theta); pseudo_gradient: hand the negative mean difference to "
            "veRL's optimizer",
            choices=REPTILE_UPDATES,
            methods=("reptile",),
        ),
    )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], method: Method) -> MetaConfig:
        """Validate the plain (resolved) ``meta`` mapping of a run of ``method``.

        Raises:
            ValueError: an unknown key, a key that this method would ignore, a missing key, a wrong type or a value out
                of bounds. The message names key, value and remedy.
        """
        known = {f.name: f for f in fields(cls)}
        for name, value in values.items():
            if name not in known:
                name = printable(str(name))  # YAML's keys may be anything
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean meta.{close[0]}?" if close else f"known keys: {', '.join(sorted(known))}"
                raise ValueError(f"meta.{name}={value!r} is not a setting of the meta group; {hint}")
            if method not in known[name].metadata["methods"]:
                raise ValueError(
                    f"meta.{name}={value!r} has no effect in {METHOD_TITLES[method]}; remove it "
                    f"(it belongs to {', '.join(METHOD_TITLES[m] for m in known[name].metadata['methods'])})"
                )
        merged = {**_method_defaults(method), **values}
        for name in ("task_dir", "inner_lr"):
            if merged.get(name) is None:
                raise ValueError(f"meta.{name} is not set; give {known[name].metadata['doc']} (meta.{name}=...)")
        if method == "reptile" and merged.get("reptile_step_size") is None:
            raise ValueError("meta.reptile_step_size is not set; give eps in (0, 1], for example 0.5")
        checked = {name: _check(f"meta.{name}", value, known[name]) for name, value in merged.items()}
        config = cls(**checked)
        config._check_combinations(method)
        return config

    def _check_combinations(self, method: Method) -> None:
        if self.inner_batch_size > self.support_samples:
            raise ValueError(
                f"meta.inner_batch_size={self.inner_batch_size} is larger than meta.support_samples="
                f"{self.support_samples}; lower the batch or use more support examples"
            )
        if method != "reptile" and self.query_batch_size < 1:
            raise ValueError(
                f"meta.query_batch_size={self.query_batch_size}: {METHOD_TITLES[method]} takes its meta-gradient on "
                "query examples; use at least 1"
            )
        if self.query_samples is not None and self.query_batch_size > self.query_samples:
            raise ValueError(
                f"meta.query_batch_size={self.query_batch_size} is larger than meta.query_samples="
                f"{self.query_samples}; lower the batch or use more query examples"
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


def _method_defaults(method: Method) -> dict[str, Any]:
    if method == "meta_lora":
        return {}
    return {"support_samples": 300, "num_inner_steps": 5}


_LARGEST = sys.float_info.max


def _check(name: str, value: Any, spec: Any) -> Any:
    """Return ``value`` converted to the declared type of field ``spec``, or raise ValueError naming ``name``."""
    annotation, meta = spec.type, spec.metadata
    if value is None:
        if "None" in annotation:
            return None
        raise ValueError(f"{name} must not be null; give {meta['doc']}")
    if "tuple" in annotation:
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{name}={value!r} must be a list of names, for example {name}=[algebra,geometry]")
        if not value:
            raise ValueError(f"{name}=[] names no task; use null for every task found")
        duplicates = sorted({item for item in value if list(value).count(item) > 1})
        if duplicates:
            raise ValueError(f"{name}={value!r} names {', '.join(duplicates)} more than once; list every task once")
        return tuple(value)
    if "bool" in annotation:
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} must be true or false")
        return value
    if "int" in annotation or "float" in annotation:
        whole = "int" in annotation
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise ValueError(f"{name}={value!r} must be a {'whole ' if whole else ''}number ({meta['doc']})")
        if not -_LARGEST <= value <= _LARGEST:  # nan is in no range
            raise ValueError(f"{name}={value!r} must be finite ({meta['doc']})")
        if "least" in meta and value < meta["least"]:
            raise ValueError(f"{name}={value!r} is too small; use at least {meta['least']} ({meta['doc']})")
        if "above" in meta and value <= meta["above"]:
            raise ValueError(f"{name}={value!r} must be above {meta['above']:g} ({meta['doc']})")
        if "most" in meta and value > meta["most"]:
            raise ValueError(f"{name}={value!r} is too large; use at most {meta['most']:g} ({meta['doc']})")
        return value if whole else float(value)
    if not isinstance(value, str):
        raise ValueError(f"{name}={value!r} must be text ({meta['doc']})")
    if "choices" in meta and value not in meta["choices"]:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(meta['choices'])}")
    return value


# Settings of veRL's own groups that the episodic trainers replace, with the values that mean "not set".
_REPLACED_KEYS: dict[tuple[str, str], tuple[tuple[Any, ...], str]] = {
    ("data", "train_files"): ((None,), "episodes are read from meta.task_dir"),
    ("data", "val_files"): ((None,), "use evaluate_few_shot.py on the unseen tasks"),
    ("data", "train_batch_size"): ((None,), "use meta.meta_batch_size and meta.inner_batch_size"),
    ("data", "train_max_samples"): ((None, -1), "use meta.support_samples and meta.query_samples"),
    ("data", "custom_cls"): ((None, {"path": None, "name": None}), "veRL's own class reads the examples"),
    ("data", "val_max_samples"): ((None, -1), "use evaluate_few_shot.py --limit"),
    ("engine", "fsdp_size"): ((None, -1), "use meta.task_group_size"),
    ("engine", "ulysses_sequence_parallel_size"): ((1,), "sequence parallelism inside an episode is not supported"),
    ("engine", "forward_only"): ((False,), "a trainer needs gradients"),
    ("trainer", "test_freq"): ((None, -1), "use evaluate_few_shot.py on the unseen tasks"),
    ("model", "use_fused_kernels"): ((False,), "the response-only loss replaces veRL's fused loss kernels"),
}


def check_training_config(config: Mapping[str, Any], method: Method) -> MetaConfig:
    """Check a whole composed configuration (plain, resolved) before anything heavy is imported or loaded.

    Args:
        config: the composed Hydra configuration as a plain mapping with the groups ``meta``, ``model``, ``engine``,
            ``optim``, ``data``, ``trainer``, ``checkpoint``.
        method: which trainer runs it.

    Returns:
        The validated ``meta`` group.

    Raises:
        ValueError: naming the key, its value and the remedy.
    """
    check_groups(config)
    meta = MetaConfig.from_mapping(config["meta"], method)

    for (group, key), (neutral, remedy) in _REPLACED_KEYS.items():
        value = config[group].get(key)
        if key in config[group] and value not in neutral:
            raise ValueError(f"{group}.{key}={value!r} has no effect in {METHOD_TITLES[method]}; {remedy}")

    strategy = config["engine"].get("strategy")
    if strategy != "fsdp2":
        raise ValueError(f"engine.strategy={strategy!r} cannot be used; the inner loop steps FSDP2 shards: set fsdp2")

    rank = config["model"].get("lora_rank", 0)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
        raise ValueError(f"model.lora_rank={rank!r} must be a whole number, 0 for full-parameter training")
    if method == "meta_lora" and rank == 0:
        raise ValueError("model.lora_rank=0: META-LORA trains LoRA parameters only; use a rank such as 16")
    if method == "fomaml" and rank > 0:
        raise ValueError(
            f"model.lora_rank={rank}: FOMAML-SFT trains all parameters; set 0, or use meta_lora_trainer.py for LoRA"
        )
    if rank > 0 and not _is_number(config["model"].get("lora_alpha")):
        raise ValueError(f"model.lora_alpha={config['model'].get('lora_alpha')!r} must be a number above 0")
    if rank == 0 and config["model"].get("lora_adapter_path") is not None:
        raise ValueError(
            f"model.lora_adapter_path={config['model']['lora_adapter_path']!r} has no effect with model.lora_rank=0; "
            "set the rank of that adapter"
        )

    if rank == 0:
        for key in ("task_batching", "task_batch_limit"):
            if config["meta"].get(key) not in (None, False):
                raise ValueError(
                    f"meta.{key}={config['meta'][key]!r} has no effect when all parameters are trained "
                    "(model.lora_rank=0): tasks share a pass only over a frozen base; remove it, or set model.lora_rank"
                )
        if (dtype := config["engine"].get("model_dtype")) in ("bf16", "bfloat16"):
            raise ValueError(
                f"engine.model_dtype={dtype}: {METHOD_TITLES[method]} trains all parameters, and in bf16 most of an "
                "update of 1e-5 is rounded away; set engine.model_dtype=fp32, with "
                "engine.mixed_precision.param_dtype=bf16 to compute in bf16"
            )

    if not _is_number(config["optim"].get("lr")):
        raise ValueError(f"optim.lr={config['optim'].get('lr')!r} must be a number above 0 (the meta learning rate)")
    if not _is_number(config["optim"].get("clip_grad")):
        raise ValueError(f"optim.clip_grad={config['optim'].get('clip_grad')!r} must be a number above 0")

    for key in ("save_contents", "load_contents"):
        contents = config["checkpoint"].get(key)
        if not isinstance(contents, list | tuple) or {*map(str, contents)} != {"model", "optimizer", "extra"}:
            raise ValueError(
                f"checkpoint.{key}={contents!r}: a run resumes exactly from model, optimizer and extra together, and "
                "exports are written beside them; set [model,optimizer,extra]"
            )

    max_length = config["data"].get("max_length")
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2:
        raise ValueError(f"data.max_length={max_length!r} must be a whole number of tokens, at least 2")
    if config["data"].get("pad_mode") != "no_padding":
        raise ValueError(
            f"data.pad_mode={config['data'].get('pad_mode')!r}: batches are packed or padded by the engine "
            "(model.use_remove_padding); set no_padding"
        )
    check_verl_settings(config)
    check_model_path(config["model"].get("path"))
    return meta


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


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= _LARGEST


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
    groups = world_size // group
    if meta.meta_batch_size % groups:
        below = meta.meta_batch_size // groups * groups
        valid = [str(size) for size in (below, below + groups) if size > 0]
        raise ValueError(
            f"meta.meta_batch_size={meta.meta_batch_size} does not divide over the {groups} task groups "
            f"({world_size} processes, meta.task_group_size={group}); the nearest valid values are "
            f"{' and '.join(valid)}"
        )
    for key in ("inner_batch_size", "query_batch_size"):
        size = getattr(meta, key)
        if size % group:
            raise ValueError(
                f"meta.{key}={size} does not divide over the {group} ranks of a task group; use a multiple of {group}"
            )
    return group


def check_micro_batches(config: Mapping[str, Any], meta: MetaConfig, group_size: int) -> None:
    """Without dynamic batches, veRL cuts a rank's share of a batch into equal micro-batches.

    Raises:
        ValueError: the share is not a multiple of ``data.micro_batch_size_per_gpu``.
    """
    data = config["data"]
    if data["use_dynamic_bsz"]:
        return
    micro = data["micro_batch_size_per_gpu"]
    if isinstance(micro, bool) or not isinstance(micro, int) or micro < 1:
        raise ValueError(f"data.micro_batch_size_per_gpu={micro!r} must be a whole number, at least 1")
    for key in ("inner_batch_size", "query_batch_size"):
        share = getattr(meta, key) // group_size
        if share % micro:
            raise ValueError(
                f"data.micro_batch_size_per_gpu={micro} does not divide the {share} examples of meta.{key} that each "
                "rank works on; use a divisor, or data.use_dynamic_bsz=true"
            )
