"""Accuracies of solvers that understand nothing: what a task has to be above to show that it was learned."""

from __future__ import annotations

import functools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from metasft.data.answers import shape
from metasft.data.benchmark_scorers import BARE, EXACT_MATCH
from metasft.data.examples import Example, extra_info_of, has_column, read_column
from metasft.data.scoring import score


class Trivial(NamedTuple):
    """Fractions of test items that are answered right.

    Attributes:
        constant: always the most frequent answer of the pool.
        copy: the input itself.
        part: the part of the input at one position, counted from either end; the position that fits the pool best.
        pattern: the most frequent answer to inputs of the same pattern, which is their punctuation and where letters
            and digits stand.
    """

    constant: float
    copy: float
    part: float
    pattern: float


Pair = tuple[str, str]
"""An input and its answer."""


def trivial_accuracies(pool: Sequence[Pair], test: Sequence[Pair]) -> Trivial:
    """What each trivial solver gets right on ``test`` when it has seen all of ``pool``.

    Args:
        pool: of support examples, at least one.
        test: at least one.
    """
    constant = _most_frequent(answer for _, answer in pool)
    by_pattern: dict[str, list[str]] = defaultdict(list)
    for text, answer in pool:
        by_pattern[shape(text)].append(answer)
    of_pattern = {pattern: _most_frequent(answers) for pattern, answers in by_pattern.items()}
    part = max(_PARTS, key=lambda solver: _accuracy(solver, pool))
    return Trivial(
        constant=_accuracy(lambda text: constant, test),
        copy=_accuracy(lambda text: text, test),
        part=_accuracy(part, test),
        pattern=_accuracy(lambda text: of_pattern.get(shape(text), constant), test),
    )


def of_task(
    task: str, files: Mapping[str, Sequence[Example]], pairs: Callable[[Sequence[Example]], Sequence[Pair]]
) -> dict[str, float]:
    """Solver -> accuracy on a task's test items, for solvers that have seen its support set or shot pool.

    Args:
        files: relative name -> examples, as they are prepared.
        pairs: inputs and answers of examples.
    """
    pool, test = (
        pairs(next(members for path, members in files.items() if path.endswith(f"/{task}_{part}.parquet")))
        for part in ("support", "test")
    )
    return trivial_accuracies(pool, test)._asdict()


def _most_frequent(answers: Iterable[str]) -> str:
    """Among equally frequent ones the alphabetically first."""
    counts = Counter(answers)
    return min(counts, key=lambda answer: (-counts[answer], answer))


def _accuracy(solve: Callable[[str], str], pairs: Sequence[Pair]) -> float:
    return round(sum(solve(text) == answer for text, answer in pairs) / len(pairs), 4)


@functools.lru_cache(4096)
def _split(pattern: str, text: str) -> list[str]:
    return re.findall(pattern, text)


def _part(pattern: str, position: int) -> Callable[[str], str]:
    def solve(text: str) -> str:
        parts = _split(pattern, text)
        return parts[position] if -len(parts) <= position < len(parts) else ""

    return solve


_PARTS = [_part(pattern, position) for pattern in (r"\S+", r"\w+", r"\w") for position in range(-6, 6)]
"""Words with and without punctuation, and single characters."""


def majority_baseline(rows: Iterable[Mapping[str, Any] | Example]) -> float:
    """Accuracy (a fraction) of always giving the most frequent gold answer, in the form asked for.

    Among equally frequent answers the alphabetically first counts.

    Raises:
        ValueError: no rows.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("the majority baseline needs at least one row: the test set is empty")
    constant = _most_frequent_answer(rows)
    return sum(score(_stating(constant, row), row).correct for row in rows) / len(rows)


def constant_per_form(
    pool: Sequence[Mapping[str, Any] | Example], rows: Sequence[Mapping[str, Any] | Example]
) -> float:
    """Accuracy (a fraction) on ``rows`` of a policy that sees which form of answer is asked for, and nothing else.

    It gives the most frequent answer of ``pool`` among examples of the same ``data_source``, which all ask for one
    form (a family of problems, a benchmark); the most frequent of all where the pool has none of that.

    Args:
        pool: may be empty, which gets nothing right.
        rows: at least one.
    """
    by_form: dict[str, list[Mapping[str, Any] | Example]] = defaultdict(list)
    for example in pool:
        by_form[read_column(example, "data_source")].append(example)
    constants = {form: _most_frequent_answer(examples) for form, examples in by_form.items()}
    rest = _most_frequent_answer(pool)
    answers = [constants.get(read_column(row, "data_source"), rest) for row in rows]
    right = [score(_stating(answer, row), row).correct for answer, row in zip(answers, rows, strict=True)]
    return sum(right) / len(right)


def _most_frequent_answer(rows: Iterable[Mapping[str, Any] | Example]) -> str:
    counts = Counter(str(read_column(row, "answer")) for row in rows)
    return min(counts, key=lambda answer: (-counts[answer], answer), default="")


def _stating(answer: str, row: Mapping[str, Any] | Example) -> str:
    """A text that gives this answer in the form that the row's scorer reads."""
    whole = has_column(row, "extra_info") and extra_info_of(row).get("scorer") in (BARE, EXACT_MATCH)
    return answer if whole else f"Answer: {answer}"
