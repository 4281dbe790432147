"""One question with its gold answer: as an object, as a conversation, and as a row of a data file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Example:
    """One question with its gold answer.

    Attributes:
        task: its name (here one of ``all_tasks()``).
        data_source: where it comes from, such as ``reasoning_gym/gcd``; decides how an answer is scored.
        example_id: unique among all examples of all tasks.
        prompt: question and instruction line, the content of the user turn.
        response: the content of the last assistant turn (here ``Answer: <answer>``).
        answer: the gold answer.
        extra_info: what the scorer needs besides the answer, JSON-able.
        turns: what comes before the response, where that is more than ``prompt`` as one user turn: a system turn, or
            earlier turns of a conversation; ``prompt`` is their text then.
    """

    task: str
    data_source: str
    example_id: str
    prompt: str
    response: str
    answer: str
    extra_info: dict[str, Any]
    turns: tuple[Mapping[str, str], ...] = ()


def messages_for(example: Example) -> list[dict[str, str]]:
    """The example as a conversation in veRL's chat format: the prompt's turns, then the response."""
    before = map(dict, example.turns or ({"role": "user", "content": example.prompt},))
    return [*before, {"role": "assistant", "content": example.response}]


def row_for(example: Example) -> dict[str, Any]:
    """The example as one row of a data file.

    ``extra_info`` becomes a JSON string: its keys differ between families, and a parquet column of structs would give
    every row the union of them all.
    """
    return {
        "messages": messages_for(example),
        "prompt": example.prompt,
        "response": example.response,
        "answer": example.answer,
        "task": example.task,
        "data_source": example.data_source,
        "example_id": example.example_id,
        "extra_info": json.dumps(example.extra_info, sort_keys=True, ensure_ascii=False),
    }


def read_column(row: Mapping[str, Any] | Example, column: str) -> Any:
    """A column of a data row: a mapping, a pandas row, or an Example."""
    if isinstance(row, Example):
        return getattr(row, column)
    try:
        return row[column]
    except KeyError:
        raise ValueError(
            f"a data row has no column '{column}': make the files with prepare_math_science_data.py"
        ) from None


def has_column(row: Mapping[str, Any] | Example, column: str) -> bool:
    return isinstance(row, Example) or (column in row and row[column] is not None)


def extra_info_of(row: Mapping[str, Any] | Example) -> dict[str, Any]:
    """What the scorer needs besides the answer: a JSON string in data files, a dict in examples."""
    extra_info = read_column(row, "extra_info")
    if isinstance(extra_info, str):
        try:
            extra_info = json.loads(extra_info)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"extra_info of a data row is no JSON ({error}): make the files with prepare_math_science_data.py"
            ) from error
    if not isinstance(extra_info, Mapping):
        raise ValueError(f"extra_info of a data row is {extra_info!r}: it must be a JSON object")
    return dict(extra_info)
