"""Bounds of the settings in veRL's own groups: what veRL would only find, in words of its own, once a model is loaded.

Imports neither torch nor veRL.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from metasft.files.atomic import check_place
from metasft.files.paths import user_path

LARGEST_RATE = 1e4
"""A learning rate above it is a typing error."""
LARGEST_RANK = 2**16
LARGEST_SEED = 2**63 - 1
PRECISIONS = ("fp32", "bf16", "float32", "bfloat16")
TRUNCATIONS = ("error", "right")
LARGEST_STEPS = 10**9
LOGGERS = {
    "console": None,
    "file": None,
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "swanlab": "swanlab",
    "vemlp_wandb": "volcengine_ml_platform",
    "clearml": "clearml",
    "trackio": "trackio",
}
"""And the packages that they need."""
RESUME_MODES = ("auto", "disable", "resume_path")

GROUPS = ("meta", "model", "engine", "optim", "data", "trainer", "checkpoint", "profiler")
_BUILT = ("model", "engine", "optim", "checkpoint", "profiler")
"""Of these veRL makes the dataclass that `_target_` names."""
_START = "leave the group as it is, or start from one of data/math_science_meta/config_*.yaml"
# Of these groups veRL makes no dataclass, which would refuse other keys.
KEYS = {
    "trainer": (
        *("default_local_dir", "default_hdfs_dir", "project_name", "experiment_name", "total_epochs"),
        *("total_training_steps", "logger", "seed", "save_freq", "test_freq", "max_ckpt_to_keep", "balance_batch"),
        *("resume_mode", "resume_from_path", "device", "nnodes", "n_gpus_per_node", "profile_interval"),
    ),
    "data": (
        *("train_batch_size", "micro_batch_size_per_gpu", "max_token_len_per_gpu", "use_dynamic_bsz", "train_files"),
        *("val_files", "train_max_samples", "val_max_samples", "messages_key", "tools_key", "image_key", "video_key"),
        *("image_patch_size", "enable_thinking_key", "enable_thinking_default", "pad_mode", "max_length", "truncation"),
        *("balance_dp_token", "custom_cls", "use_shm", "apply_chat_template_kwargs", "num_workers", "shuffle", "seed"),
        "ignore_input_ids_mismatch",
    ),
}


class Rule(NamedTuple):
    """What a setting may be, and the words for it behind `must be`."""

    accepts: Callable[[Any], bool]
    words: str


def _one_of(choices: tuple[str, ...]) -> Rule:
    return Rule(lambda value: value in choices, f"one of {', '.join(choices)}")


def _number(value: Any, least: float, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _whole(value: Any, least: int, most: float = float("inf")) -> bool:
    return isinstance(value, int) and _number(value, least, most)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) and item for item in value)


_FLAG = Rule(lambda value: isinstance(value, bool), "true or false")
_TEXT = Rule(lambda value: isinstance(value, str) and bool(value), "text")
_SHARE = Rule(lambda value: value is None or _number(value, 0, 1), "a number between 0 and 1")
_COUNT = Rule(lambda value: _whole(value, 1), "a whole number, at least 1")
_SEED = Rule(lambda value: _whole(value, 0, LARGEST_SEED), f"a whole number, at least 0 and at most {LARGEST_SEED}")

FLAGS = {
    "model": (
        *("enable_activation_offload", "enable_gradient_checkpointing", "trust_remote_code", "use_liger"),
        *("use_remove_padding", "use_shm"),
    ),
    "engine": (
        *("entropy_checkpointing", "entropy_from_logits_with_chunking", "forward_prefetch", "full_determinism"),
        *("offload_policy", "optimizer_offload", "pad_to_length", "param_offload", "reshard_after_forward"),
        *("use_orig_params", "use_torch_compile"),
    ),
    "data": ("balance_dp_token", "ignore_input_ids_mismatch", "use_dynamic_bsz", "use_shm"),
    "trainer": ("balance_batch",),
    "profiler": ("all_ranks", "enable"),
}
TEMPLATE_ARGUMENTS = (
    *("conversation", "messages", "processor", "tokenizer", "tools", "add_generation_prompt", "tokenize"),
    *("return_dict", "return_tensors", "chat_template", "strftime_now"),
)
"""What a chat template gets from elsewhere: veRL, ``model.custom_chat_template``, and the date of its arguments."""

RULES: dict[str, Rule] = {
    **{f"{group}.{key}": _FLAG for group, keys in FLAGS.items() for key in keys},
    "model.lora_rank": Rule(lambda value: _whole(value, 0, LARGEST_RANK), f"a whole number, at most {LARGEST_RANK}"),
    "model.target_modules": Rule(
        lambda value: value is None or (isinstance(value, str) and bool(value)) or _texts(value),
        "all-linear, or a list of names of modules such as [q_proj,v_proj]",
    ),
    "model.custom_chat_template": Rule(lambda value: value is None or isinstance(value, str), "a Jinja text, or null"),
    "model.override_config": Rule(
        lambda value: value is None or isinstance(value, Mapping), "a mapping that changes what config.json says"
    ),
    "model.external_lib": Rule(
        lambda value: value is None or all(map(_is_installed, [value] if isinstance(value, str) else value)),
        "null, or the name of a module that can be imported",
    ),
    "engine.seed": _SEED,
    "engine.entropy_from_logits_chunk_size": _COUNT,
    "engine.pad_to_length_bucket": _COUNT,
    "engine.mixed_precision": Rule(
        lambda value: value is None or isinstance(value, Mapping), "a mapping with param_dtype and reduce_dtype"
    ),
    "engine.model_dtype": _one_of(PRECISIONS),
    "engine.mixed_precision.param_dtype": Rule(
        lambda value: value in PRECISIONS, "fp32 or bf16; fp16 would need loss scaling, which inner steps do not have"
    ),
    "engine.mixed_precision.reduce_dtype": _one_of(PRECISIONS),
    "optim.lr": Rule(lambda value: _number(value, 0, LARGEST_RATE), f"a number, at most {LARGEST_RATE:g}"),
    "optim.weight_decay": Rule(lambda value: _number(value, 0, 1e4), "a number, at least 0"),
    "optim.betas": Rule(
        lambda value: isinstance(value, list) and len(value) == 2 and all(_number(b, 0, 1) and b < 1 for b in value),
        "two numbers from 0 to below 1, such as [0.9,0.999]",
    ),
    "optim.lr_scheduler_type": _one_of(("constant", "cosine")),
    "optim.lr_warmup_steps_ratio": _SHARE,
    "optim.min_lr_ratio": _SHARE,
    "optim.lr_warmup_steps": Rule(
        lambda value: value is None or _whole(value, -1), "a whole number of meta-steps, or -1 for the ratio"
    ),
    "optim.num_cycles": Rule(lambda value: _number(value, 0, 1e6), "a number of cosine cycles"),
    "optim.optimizer": _TEXT,
    "optim.optimizer_impl": _TEXT,
    "data.truncation": Rule(
        # veRL cuts packed examples at their end whatever it is told.
        lambda value: value in TRUNCATIONS,
        f"one of {', '.join(TRUNCATIONS)}: packed examples can only be cut at their end",
    ),
    "data.max_token_len_per_gpu": Rule(lambda value: _whole(value, 1), "a whole number of tokens, at least 1"),
    "data.micro_batch_size_per_gpu": Rule(
        lambda value: value is None or _whole(value, 1), "a whole number of examples, at least 1"
    ),
    "data.num_workers": Rule(lambda value: _whole(value, 0), "a whole number, at least 0"),
    "data.apply_chat_template_kwargs": Rule(
        lambda value: isinstance(value, Mapping) and not set(value) & set(TEMPLATE_ARGUMENTS),
        f"a mapping of variables of the chat template, none of which is {', '.join(TEMPLATE_ARGUMENTS)}",
    ),
    "data.enable_thinking_default": Rule(
        lambda value: value in (None, "none") or isinstance(value, bool), "true, false, or null for the template's own"
    ),
    "data.tools_key": _TEXT,
    "data.enable_thinking_key": _TEXT,
    "data.messages_key": Rule(lambda value: isinstance(value, str) and bool(value), "the name of a column"),
    "trainer.total_epochs": Rule(
        lambda value: _whole(value, 1, LARGEST_STEPS), f"a whole number, at least 1 and at most {LARGEST_STEPS}"
    ),
    "trainer.total_training_steps": Rule(
        lambda value: value is None or _whole(value, 1, LARGEST_STEPS),
        f"a whole number of meta-steps, at least 1 and at most {LARGEST_STEPS}",
    ),
    "trainer.save_freq": Rule(
        lambda value: value in (-1, "after_each_epoch") or _whole(value, 1),
        "a whole number of meta-steps, at least 1, -1 for only at the end",
    ),
    "trainer.profile_interval": Rule(
        lambda value: isinstance(value, list) and len(value) == 2 and all(_whole(step, -1) for step in value),
        "two whole numbers, [-1,-1] for no profile",
    ),
    "trainer.nnodes": _COUNT,
    "trainer.n_gpus_per_node": _COUNT,
    "trainer.seed": _SEED,
    "trainer.max_ckpt_to_keep": Rule(
        lambda value: value is None or _whole(value, -1), "a whole number of checkpoints, or null for all"
    ),
    "trainer.logger": Rule(
        lambda value: all(name in LOGGERS for name in ([value] if isinstance(value, str) else value)),
        f"a list with some of {', '.join(LOGGERS)}",
    ),
    "trainer.default_hdfs_dir": Rule(
        lambda value: value is None or (isinstance(value, str) and bool(value)), "the path of a folder, or null"
    ),
    "trainer.default_local_dir": Rule(lambda value: isinstance(value, str) and bool(value), "the path of a folder"),
    "trainer.resume_mode": _one_of(RESUME_MODES),
    "trainer.resume_from_path": Rule(
        lambda value: value is None or (isinstance(value, str) and bool(value)), "the path of a global_step_<N> folder"
    ),
    "trainer.project_name": _TEXT,
    "trainer.experiment_name": _TEXT,
}


def check_verl_settings(config: Mapping[str, Any]) -> None:
    """Check the groups of a composed configuration (plain, resolved) beside ``meta``.

    Raises:
        ValueError: an unknown group or key, or a value of another kind or out of bounds.
    """
    _check_known(config, GROUPS, "")
    for group, keys in KEYS.items():
        _check_known(config[group], keys, f"{group}.")
    for key, rule in RULES.items():
        found, value = _find(config, key)
        if not found and key.count(".") == 1:  # deleted: in what veRL composes, every one is there
            raise ValueError(f"{key} is not set; give {rule.words}")
        if found and not _accepted(rule, value):
            raise ValueError(f"{key}={value!r} must be {rule.words}")
    _check_loggers(config["trainer"]["logger"])
    check_place(user_path(config["trainer"]["default_local_dir"]), "trainer.default_local_dir")
    resumed = config["trainer"]["resume_from_path"]
    if resumed is not None and not user_path(resumed).is_dir():
        raise ValueError(f"trainer.resume_from_path={resumed} is no folder; choose another, a global_step_<N> folder")
    if resumed is None and config["trainer"]["resume_mode"] == "resume_path":
        raise ValueError("trainer.resume_from_path is not set; give a global_step_<N> folder, or set resume_mode=auto")


def check_groups(config: Mapping[str, Any]) -> None:
    """Raise ValueError where a group is gone, or what veRL itself puts into it, such as the class that it becomes."""
    for group in GROUPS:
        values = config.get(group)
        if not isinstance(values, Mapping):
            raise ValueError(f"{group}={values!r} is no group of settings; {_START}")
        if group in _BUILT and "_target_" not in values:
            raise ValueError(f"{group}._target_ is not set, so veRL cannot tell what {group} is; {_START}")


def _check_loggers(names: str | list[str]) -> None:
    for name in [names] if isinstance(names, str) else names:
        if (package := LOGGERS[name]) is not None and not _is_installed(package):
            raise ValueError(
                f"trainer.logger={names} needs the package {package}, which is not installed; run `pip install "
                f"{package}`, or leave {name} out"
            )


def _is_installed(module: str) -> bool:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):  # of what it is a part of; or no name at all
        return False
    return spec is not None and spec.origin is not None  # a folder of that name, such as wandb leaves, has no origin


def _check_known(values: Mapping[str, Any], known: tuple[str, ...], prefix: str) -> None:
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(known)}"
            raise ValueError(f"{prefix}{key} is not a setting of {prefix[:-1] or 'the configuration'}; {hint}")


def _find(config: Mapping[str, Any], key: str) -> tuple[bool, Any]:
    value: Any = config
    for name in key.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return False, None
        value = value[name]
    return True, value


def _accepted(rule: Rule, value: Any) -> bool:
    try:
        return rule.accepts(value)
    except TypeError:  # a list or mapping in the place of a text
        return False
