"""What JSON values must be: checks made of checks, for files that are read back after they may have been edited.

A :data:`Check` takes a value and the words for where it is, and raises ``ValueError`` where the value is not as it must
be. Nothing is converted: a text that reads like a number is no number. Neither torch nor pyarrow is imported here.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from metasft.files.untrusted import read_json, reason

Check = Callable[[Any, str], None]

LARGEST = 1e300
"""Of numbers; what is larger would leave the finite range in the first sum."""


def read_checked(path: Path, check: Check, *, writer: str, remedy: str) -> dict[str, Any]:
    """The object in a JSON file, checked.

    Args:
        path: the file.
        check: of the object.
        writer: the script that writes such files.
        remedy: ends the message, without a full stop.

    Raises:
        ValueError: it cannot be read, or is not what ``writer`` writes.
    """
    content = read_json(path, remedy)
    try:
        check(content, "")
    except ValueError as error:
        raise ValueError(f"{path} is not what {writer} writes ({error}): {remedy}") from None
    return content


def read_checked_lines(path: Path, check: Check) -> list[dict[str, Any]]:
    """The objects in the lines of a JSON Lines file, checked; empty lines are left out.

    Raises:
        ValueError: a line cannot be read or is not as ``check`` has it, by its number.
        OSError: the file cannot be read.
    """
    lines = []
    # Not splitlines(), which also splits at characters that generated text may contain.
    for number, text in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if text.strip():
            try:
                lines.append(json.loads(text))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number} of {path.name} is no JSON: {reason(error)}") from error
            check(lines[-1], f"line {number} of {path.name}")
    return lines


# ---- single values --------------------------------------------------------------------------------------------------


def expect(holds: bool, value: Any, where: str, what: str) -> None:
    """Raise ValueError unless the value is ``what``."""
    if not holds:
        raise ValueError(f"{where} is {reprlib.repr(value)}, not {what}")


def anything(value: Any, where: str) -> None:
    """No check."""


def text(value: Any, where: str) -> None:
    expect(isinstance(value, str), value, where, "a text")


def line(value: Any, where: str) -> None:
    expect(isinstance(value, str) and value.isprintable(), value, where, "a text of one line")


def flag(value: Any, where: str) -> None:
    expect(isinstance(value, bool), value, where, "true or false")


def count(value: Any, where: str) -> None:
    expect(type(value) is int and value >= 0, value, where, "a whole number, at least 0")


def number(value: Any, where: str) -> None:
    expect(is_number(value) and 0 <= value < LARGEST, value, where, "a finite number, at least 0")


def any_number(value: Any, where: str) -> None:
    expect(is_number(value), value, where, "a number")


def proportion(value: Any, where: str) -> None:
    expect(is_number(value) and 0 <= value <= 1, value, where, "a number between 0 and 1")


def is_number(value: Any) -> bool:
    """Whether it is a number of JSON, which true and false are not; not every one is finite."""
    return type(value) in (int, float)


# ---- values made of values ------------------------------------------------------------------------------------------


def list_of(check: Check) -> Check:
    """A list, every item of which passes ``check``."""

    def check_list(value: Any, where: str) -> None:
        expect(isinstance(value, list), value, where, "a list")
        for index, item in enumerate(value):
            check(item, f"{where}[{index}]")

    return check_list


def mapping_of(check: Check, key: Check = text) -> Check:
    """A mapping, every value of which passes ``check``, and every key ``key``."""

    def check_mapping(value: Any, where: str) -> None:
        expect(isinstance(value, dict), value, where, "a mapping")
        for name, item in value.items():
            key(name, f"a key of {where}" if where else "a key")
            check(item, f"{where}.{name}" if where else name)

    return check_mapping


def fields(checks: Mapping[str, Check], needed: Sequence[str] = ()) -> Check:
    """A mapping with the keys of ``checks``, where it has them, and any further ones.

    Args:
        checks: key -> check of its value; null passes for a key that is not there.
        needed: keys that must be there.
    """

    def check_fields(value: Any, where: str) -> None:
        expect(isinstance(value, dict), value, where, "a mapping")
        for key, check in checks.items():
            place = f"{where}.{key}" if where else key
            if value.get(key) is not None:
                check(value[key], place)
            elif key in needed:
                raise ValueError(f"{place} is missing")

    return check_fields
