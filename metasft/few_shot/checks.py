"""What can be wrong with a model and the examples for it, found without loading its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from metasft.checkpoint import with_adapter_of
from metasft.few_shot.open import OpenedModel, load_tokenizer
from metasft.few_shot.protocol import EvaluationConfig, TestTask
from metasft.model_folder import check_model_files
from metasft.task_data import TokenizedSet

# The dataset would cut or refuse long examples in words of the training configuration.
UNLIMITED = {"pad_mode": "no_padding", "truncation": "error", "max_length": 2**31}


def check_before_loading(
    config: EvaluationConfig, opened: OpenedModel, tasks: Sequence[TestTask], shots: Mapping[str, Sequence[int]]
) -> None:
    """Check the files of the model, its chat template, the adapter over it, and the length of every example in use.

    Args:
        config: the evaluation.
        opened: its model.
        tasks: all that it reads.
        shots: task -> indices of the examples that are adapted on.

    Raises:
        ValueError: naming the file, or the example, and the remedy.
    """
    check_model_files(opened.load_from, "--model-path" if opened.adapter is None else "--base-model")
    tokenizer = load_tokenizer(opened.load_from)
    for task in tasks:
        for path, rows, used in (
            (task.pool_path, task.pool, set(shots[task.name])),
            (task.test_path, task.test, range(len(task.test))),
        ):
            examples = TokenizedSet(path, len(rows), tokenizer, UNLIMITED)
            for index in examples.possibly_longer(config.max_length):
                if index in used and (length := examples.tokens([index])) > config.max_length:
                    raise ValueError(
                        f"{path} row {index} has {length} tokens, more than --max-length {config.max_length}: raise it"
                    )
    if opened.adapter is not None:
        _check_adapter(opened)


def _check_adapter(opened: OpenedModel) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            settings = AutoConfig.from_pretrained(opened.load_from, trust_remote_code=False)
            skeleton = AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
    except Exception:  # loading says what is wrong with it
        return
    with torch.device("meta"):
        skeleton.name_or_path = opened.load_from
        with_adapter_of(skeleton, opened.adapter, remedy="give --base-model the same architecture")
