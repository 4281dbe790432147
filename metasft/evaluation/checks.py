"""What can be wrong with a model and the examples for it, found without loading its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from metasft.adapt.checks import check_start
from metasft.adapt.open_model import OpenedModel
from metasft.config.prompts import Prompts
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
    tokenizer, prompts, _ = check_start(config, opened)
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
    return prompts
