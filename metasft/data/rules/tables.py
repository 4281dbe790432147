"""Rules on small tables: rows with a name and a value, and grids of numbers."""

from __future__ import annotations

import random
from collections.abc import Callable

from metasft.data.rules.inputs import COLOURS, FOODS, NAMES, shuffled
from metasft.data.rules.rule import rule


def table(rng: random.Random, rows: int = 3, values: range = range(1, 100)) -> str:
    """Anna 4, Ben 9, Carol 2."""
    names, numbers = rng.sample(NAMES, rows), rng.sample(values, rows)
    return ", ".join(f"{name} {number}" for name, number in zip(names, numbers, strict=True))


def read(text: str) -> dict[str, int]:
    return {name: int(value) for name, value in (row.split() for row in text.split(", "))}


def write(rows: dict[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in rows.items())


def with_question(rng: random.Random, *, key: bool) -> str:
    text = table(rng)
    name, value = rng.choice(list(read(text).items()))
    return f"{text}; {name if key else value}"


@rule("lookup", lambda rng: with_question(rng, key=True))
def value_of(text: str) -> str:
    """The value of the name after the table."""
    rows, name = text.split("; ")
    return str(read(rows)[name])


@rule("lookup", lambda rng: with_question(rng, key=False))
def name_of(text: str) -> str:
    """The name with the value after the table."""
    rows, value = text.split("; ")
    return next(name for name, one in read(rows).items() if one == int(value))


def with_change(rng: random.Random) -> str:
    text = table(rng)
    return f"{text}; {rng.choice(list(read(text)))} {rng.randrange(1, 100)}"


@rule("lookup", with_change)
def changed_table(text: str) -> str:
    """The table with the value that follows it: ``Anna 4, Ben 9; Ben 5`` as ``Anna 4, Ben 5``."""
    rows, change = text.split("; ")
    return write({**read(rows), **read(change)})


@rule("row_extreme", table)
def highest_row(text: str) -> str:
    """The name with the highest value."""
    rows = read(text)
    return max(rows, key=rows.__getitem__)


@rule("row_extreme", table)
def lowest_row(text: str) -> str:
    """The name with the lowest value."""
    rows = read(text)
    return min(rows, key=rows.__getitem__)


def with_zeros(rng: random.Random) -> str:
    """A table of four rows, one or two of which have a zero."""
    names, numbers = rng.sample(NAMES, 4), rng.sample(range(1, 100), 4)
    for index in rng.sample(range(4), rng.choice((1, 2))):
        numbers[index] = 0
    return write(dict(zip(names, numbers, strict=True)))


@rule("row_filter", with_zeros)
def drop_zero_rows(text: str) -> str:
    """The table without the rows with a zero."""
    return write({name: value for name, value in read(text).items() if value})


@rule("row_filter", with_zeros)
def names_with_zero(text: str) -> str:
    """The names with a zero."""
    return " ".join(name for name, value in read(text).items() if not value)


@rule("row_filter", lambda rng: table(rng, 3, range(1, 20)))
def keep_two_digit_rows(text: str) -> str:
    """The rows with values of two digits, or the word none."""
    return write({name: value for name, value in read(text).items() if value >= 10}) or "none"


@rule("columns", table)
def names_only(text: str) -> str:
    """The names alone."""
    return " ".join(read(text))


@rule("columns", table)
def values_only(text: str) -> str:
    """The values alone."""
    return " ".join(map(str, read(text).values()))


@rule("columns", lambda rng: " ".join(read(text := table(rng))) + " | " + " ".join(map(str, read(text).values())))
def rows_of_columns(text: str) -> str:
    """``Anna Ben Carol | 4 9 2`` as ``Anna 4, Ben 9, Carol 2``."""
    names, values = (part.split() for part in text.split(" | "))
    return ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))


@rule("columns", table)
def last_row(text: str) -> str:
    """The last row alone."""
    return text.rpartition(", ")[2]


def grid(rng: random.Random) -> str:
    """Two rows: 4 9 / 2 7."""
    return "{} {} / {} {}".format(*rng.sample(range(1, 100), 4))


@rule("grid", grid)
def transpose(text: str) -> str:
    """Rows become columns: ``4 9 / 2 7`` as ``4 2 / 9 7``."""
    a, b, _, c, d = text.split()
    return f"{a} {c} / {b} {d}"


@rule("grid", grid)
def flip_rows(text: str) -> str:
    """The two rows change places."""
    return " / ".join(reversed(text.split(" / ")))


def with_twins(pairs: int, singles: int) -> Callable[[random.Random], list[str]]:
    """A list with ``pairs`` words that occur twice and ``singles`` that occur once."""

    def draw(rng: random.Random) -> list[str]:
        words = rng.sample((*COLOURS, *FOODS), pairs + singles)
        return [*words, *words[:pairs]]

    return draw


@rule("frequency", shuffled(with_twins(1, 3)))
def occurs_twice(text: str) -> str:
    """The word that occurs twice."""
    words = text.split()
    return next(word for word in words if words.count(word) == 2)


@rule("frequency", shuffled(with_twins(2, 1)))
def occurs_once(text: str) -> str:
    """The word that occurs only once."""
    words = text.split()
    return next(word for word in words if words.count(word) == 1)


@rule("frequency", shuffled(with_twins(2, 1)))
def without_repeats(text: str) -> str:
    """Every word once, as they first occur."""
    return " ".join(dict.fromkeys(text.split()))
