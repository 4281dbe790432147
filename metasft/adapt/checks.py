"""What can be wrong with a start, found without loading its weights."""

from __future__ import annotations

from typing import Any

import torch

from metasft.adapt.open_model import OpenedModel, load_settings, load_tokenizer
from metasft.adapt.settings import AdaptationSettings
from metasft.checkpoint.exports import with_adapter_of
from metasft.checkpoint.model_folder import check_model_files, check_vocabulary
from metasft.config.prompts import Prompts, check_arguments


def check_start(config: AdaptationSettings, opened: OpenedModel) -> tuple[Any, Prompts, Any]:
    """Check the files of the model, its chat template and the adapter over it.

    Returns:
        (tokenizer, how conversations are rendered, the model's configuration).

    Raises:
        ValueError: naming the file and the remedy.
    """
    check_model_files(opened.load_from, config.PATH_FLAG if opened.adapter is None else "--base-model")
    tokenizer = load_tokenizer(opened.load_from, opened.chat_template, opened.chat_template_kwargs)
    prompts = Prompts.of(tokenizer, opened.data_config)
    if config.chat_template_kwargs is not None:
        check_arguments(prompts.template, opened.chat_template_kwargs, "--chat-template-kwargs")
    settings = load_settings(opened.load_from)
    check_vocabulary(tokenizer, settings, f"the model {opened.load_from}", prompts.keywords)
    if opened.adapter is not None:
        _check_adapter(opened, settings)
    return tokenizer, prompts, settings


def _check_adapter(opened: OpenedModel, settings: Any) -> None:
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
    except Exception:  # loading says what is wrong with it
        return
    with torch.device("meta"):
        skeleton.name_or_path = opened.load_from
        with_adapter_of(skeleton, opened.adapter, remedy="give --base-model the same architecture")
