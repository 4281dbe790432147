"""What can be wrong with a model and the examples for it, found without loading its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from metasft.adapt.open_model import OpenedModel, load_settings, load_tokenizer
from metasft.checkpoint.exports import with_adapter_of
from metasft.checkpoint.model_folder import check_model_files, check_vocabulary
from metasft.config.prompts import Prompts, check_arguments
from metasft.data.task_sets import TokenizedSet
from metasft.evaluation.protocol import EvaluationConfig, TestTask


def check_before_loading(
    config: EvaluationConfig, opened: OpenedModel, tasks: Sequence[TestTask], shots: Mapping[str, Sequence[int]]
) -> Prompts:
    """Check the files of the model, its chat template, the adapter over it, and the length of every example in use.

    Args:
        config: the evaluation.
        opened: its model.
        tasks: all that it reads.
        shots: task -> indices of the examples that are adapted on.

    Returns:
        How conversations are rendered.

    Raises:
        ValueError: naming the file, or the example, and the remedy.
    """
    check_model_files(opened.load_from, "--model-path" if opened.adapter is None else "--base-model")
    tokenizer = load_tokenizer(opened.load_from, opened.chat_template, opened.chat_template_kwargs)
    prompts = Prompts.of(tokenizer, opened.data_config)
    if config.chat_template_kwargs is not None:
        check_arguments(prompts.template, opened.chat_template_kwargs, "--chat-template-kwargs")
    settings = load_settings(opened.load_from)
    check_vocabulary(tokenizer, settings, f"the model {opened.load_from}", prompts.keywords)
    for task in tasks:
        for path, rows, used in (
            (task.pool_path, task.pool, set(shots[task.name])),
            (task.test_path, task.test, range(len(task.test))),
        ):
            examples = TokenizedSet(path, len(rows), tokenizer, opened.data_config)
            for index in examples.possibly_longer(config.max_length):
                if index in used and (length := examples.tokens([index])) > config.max_length:
                    raise ValueError(
                        f"{path} row {index} has {length} tokens, more than --max-length {config.max_length}: raise it"
                    )
            examples.check_template(sorted(used))
    if opened.adapter is not None:
        _check_adapter(opened, settings)
    return prompts


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
