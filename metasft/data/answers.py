"""The answer that a generated text ends with, and the verdict on it."""

from __future__ import annotations

import re
from dataclasses import dataclass

INSTRUCTION = 'End with "Answer: <answer>".'


@dataclass(frozen=True)
class Score:
    """Verdict on one generated text.

    Attributes:
        correct: the extracted answer is right.
        formatted: there was an answer in the form asked for.
        extracted: that answer, None when there was none.
    """

    correct: bool
    formatted: bool
    extracted: str | None


def last_boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}`` with balanced braces, None if there is none."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    start += len(r"\boxed{")
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position].strip()
    return None


def extract_answer(text: str) -> str | None:
    r"""The answer a text ends with: what follows the last ``Answer:`` on its line, else the last ``\boxed{...}``.

    Markdown emphasis, quotes, dollar signs and a full stop around the answer are removed.

    Returns:
        The answer, or None when the format is absent or nothing follows it.
    """
    _, marker, after = text.rpartition("Answer:")
    if marker:
        # By hand rather than splitlines(), which also splits at characters that may be part of an answer.
        line = after.strip(" \t").split("\n", 1)[0].split("\r", 1)[0]
        boxed = last_boxed(line)
        answer = boxed if boxed is not None else unwrap(line)
    else:
        boxed = last_boxed(text)
        answer = "" if boxed is None else boxed
    return answer or None


def unwrap(answer: str) -> str:
    """Remove whatever surrounds an answer without being part of it: ``**13**.`` and ``"13"`` both become ``13``."""
    previous = None
    while answer != previous:
        previous = answer
        answer = answer.strip()
        if answer.endswith(".") and not answer.endswith(".."):
            answer = answer[:-1]
        for wrap in ("**", "*", "`", "$", '"'):
            if answer.startswith(wrap) and answer.endswith(wrap) and len(answer) >= 2 * len(wrap):
                answer = answer[len(wrap) : -len(wrap)]
        # One half of the emphasis in "**Answer:** 13" and "**Answer: 13**"; powers stand between their operands.
        answer = answer.removeprefix("**").removesuffix("**")
    return answer


def normalised(answer: str) -> str:
    """Lower case, with single spaces."""
    return " ".join(answer.casefold().split())


def shape(text: str) -> str:
    """A text's form: ``a`` for every word and ``0`` for every number, with punctuation and spaces as they are."""
    return re.sub(r"[^\W\d_]+", "a", re.sub(r"\d+", "0", " ".join(text.split())))
