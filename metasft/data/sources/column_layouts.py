"""Conversations out of the rows of own files, in the layouts that fine-tuning data commonly have.

    messages                                turns with role and content
    conversations, system                   ShareGPT: turns with from and value
    instruction, input, output, system      Alpaca
    prompt, response, system                a question and its response

``system`` and ``input`` may be missing. Turns may also be their JSON text, as in CSV. No text is changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from metasft.data.sources.source import Row
from metasft.data.task_sets import ROLES
from metasft.files.untrusted import printable

COLUMNS = ("messages", "conversations", "instruction", "input", "output", "system", "prompt", "response", "answer")
"""Columns that are looked for where a mapping names no others."""

SHARE_GPT_ROLES = {"human": "user", "gpt": "assistant"}

Turn = dict[str, str]


class _Layout(NamedTuple):
    """Columns of a layout.

    Attributes:
        opening: holds turns, or the text of a question.
        closing: holds the response; None: the turns do, or the answer is one.
        more: what follows the question, in a line of its own.
        turns_only: whether ``opening`` holds turns, and a text in it is a mistake.
    """

    opening: str
    closing: str | None = None
    more: str | None = None
    turns_only: bool = False

    @property
    def needed(self) -> set[str]:
        return {self.opening, self.closing or self.opening}


_LAYOUTS = (
    _Layout("messages", turns_only=True),
    _Layout("conversations", turns_only=True),
    _Layout("instruction", "output", "input"),
    _Layout("prompt", "response"),
)


def text_of(value: Any) -> str:
    """A cell as text, word for word; empty where there is none."""
    return "" if value is None or value != value else str(value)  # NaN: a gap in a parquet file


def read_conversation(
    row: Row, fields: Mapping[str, str], where: str, remedy: str = "say under fields which column is what"
) -> list[Turn] | None:
    """The turns of a row, the last one the assistant's response; what follows that one is left out.

    Args:
        row: of a file.
        fields: ``messages``, ``prompt``, ``response``, ``answer`` and ``system`` -> columns, as far as a mapping names
            them. Without the first two the layout is recognised by the columns. Where there is no response the answer
            is one.
        where: the mapping, for messages.
        remedy: ends the message about columns of no layout.

    Returns:
        None where the row has no question or no response.

    Raises:
        ValueError: the columns are of no layout, or one holds something else than text or turns.
    """
    layout = _layout(row, fields, where, remedy)
    turns = _turns(row.get(layout.opening), layout, where)

    def cell(column: str | None) -> str:
        return "" if column is None else _text(row.get(column), column, where)

    if (more := cell(layout.more)).strip():
        turns[-1]["content"] += f"\n{more}"
    system = cell(fields.get("system", "system" if layout in _LAYOUTS else None))
    if system.strip() and not (turns and turns[0]["role"] == "system"):
        turns.insert(0, {"role": "system", "content": system})

    responses = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    last = responses[-1] if responses else None
    response = cell(layout.closing)
    if not response.strip() and last is None:
        response = cell(fields.get("answer", "answer"))
    if response.strip() and last != len(turns) - 1:
        turns.append({"role": "assistant", "content": response})
    elif last is None:
        return None
    elif response.strip() and turns[last]["content"] != response:
        raise ValueError(
            f"{where} maps response to {layout.closing}, but the turns in {layout.opening} end with another response: "
            "leave one of the two out"
        )
    else:
        del turns[last + 1 :]
    asked = any(turn["role"] == "user" and turn["content"].strip() for turn in turns)
    return turns if asked and turns[-1]["content"].strip() else None


def prompt_text(turns: Sequence[Mapping[str, str]]) -> str:
    """What comes before a response as one text: a single user turn alone, else every turn after its role."""
    if [turn["role"] for turn in turns] == ["user"]:
        return turns[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def _layout(row: Row, fields: Mapping[str, str], where: str, remedy: str) -> _Layout:
    if "messages" in fields:
        return _Layout(fields["messages"], fields.get("response"), turns_only=True)
    if "prompt" in fields:
        return _Layout(fields["prompt"], fields.get("response"))
    for layout in _LAYOUTS:
        if layout.needed <= set(row):
            return layout
    if "prompt" in row and fields.get("answer", "answer") in row:
        return _Layout("prompt")
    raise ValueError(
        f"the data of {where} have the columns {', '.join(map(printable, row))}, which are of no known layout "
        f"(messages; conversations; instruction and output; prompt and response): {remedy}"
    )


def _turns(value: Any, layout: _Layout, where: str) -> list[Turn]:
    """A cell with turns, or with the text of a question."""
    column = layout.opening
    if isinstance(value, str) and (parsed := _parsed(value)) is not None:
        value = parsed
    if isinstance(value, list):
        return [_turn(turn, value, column, where) for turn in value]
    text = _text(value, column, where)
    if layout.turns_only and text.strip():
        _complain(value, column, where)
    return [{"role": "user", "content": text}]


def _parsed(text: str) -> list[Any] | None:
    """The turns whose JSON text this is, None for any other text."""
    if not text.lstrip().startswith("["):
        return None
    try:
        turns = json.loads(text)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(turns, list) and all(isinstance(turn, dict) and _names(turn) for turn in turns)
    return turns if whole else None


def _names(turn: Mapping[str, Any]) -> tuple[str, str] | None:
    """What a turn calls its role and its text."""
    return next((names for names in (("role", "content"), ("from", "value")) if set(names) <= set(turn)), None)


def _turn(turn: Any, turns: list[Any], column: str, where: str) -> Turn:
    names = _names(turn) if isinstance(turn, Mapping) else None
    if names is None:
        _complain(turns, column, where)
    role, content = turn[names[0]], turn[names[1]]
    role = SHARE_GPT_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES or not isinstance(content, str) or turn.get("tool_calls") or turn.get("function_call"):
        _complain(turn, column, where)
    return {"role": role, "content": content}


def _text(value: Any, column: str, where: str) -> str:
    if isinstance(value, list | Mapping):
        _complain(value, column, where)
    return text_of(value)


def _complain(value: Any, column: str, where: str) -> NoReturn:
    raise ValueError(
        f"the column {column} in the data of {where} holds {printable(str(value))[:80]}: give text, or a list of turns "
        f"with a role ({', '.join((*ROLES, *SHARE_GPT_ROLES))}) and text each"
    )
