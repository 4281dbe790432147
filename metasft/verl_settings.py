"""Bounds of the settings in veRL's own groups: what veRL would only find, in words of its own, once a model is loaded.

Imports neither torch nor veRL.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from metasft.durable import check_place

LARGEST_RATE = 1e4
"""A learning rate above it is a typing error."""
LARGEST_RANK = 2**16
LARGEST_SEED = 2**63 - 1
PRECISIONS = ("fp32", "bf16", "float32", "bfloat16")
TRUNCATIONS = ("error", "right")
LOGGERS = ("console", "file", "tensorboard", "wandb", "mlflow", "swanlab", "vemlp_wandb", "clearml", "trackio")
RESUME_MODES = ("auto", "disable", "resume_path")

GROUPS = ("meta", "model", "engine", "optim", "data", "trainer", "checkpoint", "profiler")
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

RULES: dict[str, Rule] = {
    "model.lora_rank": Rule(lambda value: _whole(value, 0, LARGEST_RANK), f"a whole number, at most {LARGEST_RANK}"),
    "model.target_modules": Rule(
        lambda value: value is None or (isinstance(value, str) and bool(value)) or _texts(value),
        "all-linear, or a list of names of modules such as [q_proj,v_proj]",
    ),
    "model.enable_gradient_checkpointing": _FLAG,
    "model.use_remove_padding": _FLAG,
    "model.trust_remote_code": _FLAG,
    "model.custom_chat_template": Rule(lambda value: value is None or isinstance(value, str), "a Jinja text, or null"),
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
    "data.use_dynamic_bsz": _FLAG,
    "data.max_token_len_per_gpu": Rule(lambda value: _whole(value, 1), "a whole number of tokens, at least 1"),
    "data.messages_key": Rule(lambda value: isinstance(value, str) and bool(value), "the name of a column"),
    "trainer.total_epochs": Rule(lambda value: _whole(value, 1), "a whole number, at least 1"),
    "trainer.seed": Rule(lambda value: _whole(value, 0, LARGEST_SEED), f"a whole number, at most {LARGEST_SEED}"),
    "trainer.max_ckpt_to_keep": Rule(
        lambda value: value is None or _whole(value, -1), "a whole number of checkpoints, or null for all"
    ),
    "trainer.logger": Rule(
        lambda value: all(name in LOGGERS for name in ([value] if isinstance(value, str) else value)),
        f"a list with some of {', '.join(LOGGERS)}",
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
        if found and not _accepted(rule, value):
            raise ValueError(f"{key}={value!r} must be {rule.words}")
    check_place(Path(config["trainer"]["default_local_dir"]).expanduser(), "trainer.default_local_dir")
    if config["trainer"]["resume_mode"] == "resume_path" and config["trainer"]["resume_from_path"] is None:
        raise ValueError("trainer.resume_from_path is not set; give a global_step_<N> folder, or set resume_mode=auto")


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
