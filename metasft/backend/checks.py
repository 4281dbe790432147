"""What can be wrong with a model folder, an adapter or an optimizer, found before hours of work depend on it.

veRL finds most of it too, but after the weights are loaded and in words about its own internals.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from transformers import AutoModelForCausalLM
from verl.utils.device import get_device_id
from verl.utils.py_functional import convert_to_regular_types

from metasft.checkpoint.exports import load_adapter_folder, with_adapter_of
from metasft.checkpoint.model_folder import why_not_loaded
from metasft.files.untrusted import printable, reason


@contextmanager
def reading_model(path: str) -> Iterator[None]:
    """Turn whatever veRL and transformers raise over a model folder, or over a group of settings, into a ValueError.

    What a broken folder, or one that brings code of its own, leads them into is no closed list.
    """
    try:
        yield
    except InstantiationException as error:
        group = re.search(r"full_key: (\w+)", str(error))
        if group is not None and (group[1] != "model" or isinstance(error.__cause__, TypeError)):
            why = reason(error.__cause__ or error)
            raise ValueError(f"the settings of the group {group[1]} cannot be used ({why}); correct them") from error
        raise ValueError(_unreadable_model(path, error.__cause__ or error)) from error
    except Exception as error:
        raise ValueError(_unreadable_model(path, error)) from error


def _unreadable_model(path: str, error: BaseException) -> str:
    return f"model.path={path} cannot be loaded ({why_not_loaded(error)}); mend the folder, or use another model"


def check_optimizer(optimizer_config: Any, device: Any = None) -> None:
    """Take a step with the optimizer, which veRL would look up only after loading the model.

    Args:
        optimizer_config: the group ``optim``.
        device: of what it will step; None = the run's.

    Raises:
        ValueError: there is none, or it cannot be built from the settings or step as the trainers do.
    """
    from verl.workers.config.optimizer import build_optimizer

    module, name = optimizer_config.optimizer_impl, optimizer_config.optimizer
    others = optimizer_config.override_optimizer_config
    parameter = torch.nn.Parameter(torch.zeros(2, 2, device=get_device_id() if device is None else device))
    parameter.grad = torch.ones_like(parameter)
    try:
        getattr(importlib.import_module(module), name)  # veRL's own words list the whole module
        build_optimizer([parameter], optimizer_config).step()
    except Exception as error:  # whatever is in whatever module
        also = f" with optim.override_optimizer_config={others}" if others else ""
        raise ValueError(
            f"optim.optimizer={name} of optim.optimizer_impl={module}{also} cannot be used ({reason(error)}); "
            f"{'correct these, or ' if others else ''}set AdamW and torch.optim"
        ) from error


def check_adapter(model_config: Any) -> None:
    """Put the adapter on a model without weights: whether the two fit is known before the weights are read.

    Raises:
        ValueError: no module has a name among ``model.target_modules``; or ``model.lora_adapter_path`` is no adapter,
            or one of another rank or model.
    """
    from peft import LoraConfig, get_peft_model

    path, rank, model = model_config.lora_adapter_path, model_config.lora_rank, model_config.path
    if path is not None and not Path(path).is_dir():
        if path.count("/") == 1 and not path.startswith((".", "/", "~")):
            return  # of the hub
        raise ValueError(f"model.lora_adapter_path={path} does not exist; give a PEFT adapter folder")
    adapter = None if path is None else load_adapter_folder(Path(path))
    if adapter is not None and adapter.adapter_config["r"] != rank:
        found = adapter.adapter_config["r"]
        raise ValueError(f"model.lora_rank={rank} is not the rank of {path}; set model.lora_rank={found}")
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(model_config.hf_config, trust_remote_code=False)
    except Exception:  # of another kind, or with code of its own: loading tells
        return
    with torch.device("meta"):
        if adapter is not None:
            with_adapter_of(skeleton, adapter, remedy=f"set model.path to that model, or leave out {path}")
            return
        wanted = convert_to_regular_types(model_config.target_modules)
        if wanted is None or model_config.target_parameters is not None:
            return
        others = convert_to_regular_types(model_config.exclude_modules)
        try:
            get_peft_model(skeleton, LoraConfig(r=1, target_modules=wanted, exclude_modules=others))
        except (ValueError, re.error) as error:
            raise ValueError(
                f"model.target_modules={wanted} cannot be found in model.path={model} ({reason(error)}); name modules "
                "of that model, or set all-linear"
            ) from error


def check_shardable(module: Any) -> None:
    """Raise ValueError where FSDP2 cannot wrap what veRL asks it to: an untied output layer under an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    tied = getattr(module.config, "tie_word_embeddings", False)
    if isinstance(module.get_output_embeddings(), BaseTunerLayer) and not tied:
        raise ValueError(
            "model.target_modules adapts the output layer, which veRL cannot shard over a task group; leave it out of "
            "model.target_modules, or set meta.task_group_size=1"
        )


def check_language_model(config: Any, model: str) -> None:
    """Refuse a model that veRL would load without a layer that predicts tokens.

    Args:
        config: its transformers configuration.
        model: what it belongs to, for the message.

    Raises:
        ValueError: its configuration names another kind of model.
    """
    from verl.utils.model import get_hf_auto_model_class

    if not config.architectures or getattr(config, "auto_map", None):  # loading tells
        return
    loaded = get_hf_auto_model_class(config).__name__
    if loaded not in ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForVision2Seq"):
        raise ValueError(
            f"{model} is a {printable(str(config.architectures[0]))} ({config.model_type}), which veRL does not load "
            "as a language model; use one whose config.json names an architecture ...ForCausalLM"
        )
