"""Families of our own in the form of reasoning-gym: easy calculus and small deductions.

One right answer each, compared up to case and white space.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from reasoning_gym.factory import ProceduralDataset

_NAMES = ("Anna", "Ben", "Carol", "David", "Emma", "Frank", "Grace", "Henry", "Irene", "Jack", "Karen", "Leo")
_VERBS = ("dance", "sing", "cook", "swim", "read", "paint", "laugh", "run", "travel", "sleep", "work", "wait")


@dataclass
class Config:
    """All there is to set: the families have one difficulty."""

    seed: int | None = None
    size: int = 500


def _monomial_derivative(rng: Random) -> tuple[str, str]:
    factor, degree = rng.randint(2, 30), rng.randint(2, 6)
    power = "" if degree == 2 else f"**{degree - 1}"
    return f"Find the derivative of {factor}*x**{degree}.", f"{factor * degree}*x{power}"


def _slope_at_point(rng: Random) -> tuple[str, str]:
    factor, constant, at = rng.randint(1, 9), rng.randint(1, 9), rng.randint(1, 9)
    return f"What is the slope of f(x) = {factor}*x**2 + {constant} at x = {at}?", str(2 * factor * at)


def _slope_sign(rng: Random) -> tuple[str, str]:
    factor, constant = rng.choice((-1, 1)) * rng.randint(2, 30), rng.randint(1, 30)
    text = f"Is f(x) = {factor}*x + {constant} increasing or decreasing?"
    return text, "increasing" if factor > 0 else "decreasing"


def _constant_integral(rng: Random) -> tuple[str, str]:
    height, start, width = rng.randint(2, 9), rng.randint(0, 9), rng.randint(1, 9)
    return f"Integrate f(x) = {height} from x = {start} to x = {start + width}.", str(height * width)


def _statement(rng: Random) -> tuple[str, bool]:
    one, other = rng.sample(range(2, 60), 2)
    return rng.choice(
        (
            (f"{one} is greater than {other}", one > other),
            (f"{one} is less than {other}", one < other),
            (f"{one} is even", one % 2 == 0),
            (f"{one} is odd", one % 2 == 1),
        )
    )


def _number_statements(rng: Random) -> tuple[str, str]:
    (first, one), (second, other) = _statement(rng), _statement(rng)
    word = rng.choice(("and", "or"))
    return f"True or False: {first} {word} {second}.", str(one and other if word == "and" else one or other)


def _if_then(rng: Random) -> tuple[str, str]:
    (first, second), (one, other) = rng.sample(_NAMES, 2), rng.sample(_VERBS, 2)
    rule = f"If {first} {one}s, then {second} {other}s."
    if rng.random() < 0.5:
        return f"{rule} {first} {one}s. What follows?", f"{second} {other}s"
    return f"{rule} {second} does not {other}. What follows?", f"{first} does not {one}"


def _counterexample(rng: Random) -> tuple[str, str]:
    claim, holds = rng.choice(_CLAIMS)
    fitting = rng.sample([number for number in range(2, 100) if holds(number)], 3)
    exception = rng.choice([number for number in range(2, 100) if not holds(number)])
    numbers = [*fitting, exception]
    rng.shuffle(numbers)
    text = f"Claim: the numbers {', '.join(map(str, numbers))} are all {claim}. Which number shows that it is false?"
    return text, str(exception)


_CLAIMS: tuple[tuple[str, Callable[[int], bool]], ...] = (
    ("even", lambda number: number % 2 == 0),
    ("odd", lambda number: number % 2 == 1),
    ("less than 50", lambda number: number < 50),
    ("greater than 50", lambda number: number > 50),
    ("multiples of 5", lambda number: number % 5 == 0),
    ("multiples of 10", lambda number: number % 10 == 0),
)


def _dataset(draw: Callable[[Random], tuple[str, str]]) -> type[ProceduralDataset]:
    class OwnFamily(ProceduralDataset):
        def __init__(self, config: Config) -> None:
            super().__init__(config=config, seed=config.seed, size=config.size)

        def __getitem__(self, idx: int) -> dict[str, Any]:
            question, answer = draw(Random(self.seed + idx))
            return {"question": question, "answer": answer, "metadata": {}}

        def score_answer(self, answer: str | None, entry: dict[str, Any]) -> float:
            return float(_normalised(answer or "") == _normalised(entry["answer"]))

    return OwnFamily


def _normalised(answer: str) -> str:
    return re.sub(r"\s*(\*+)\s*", r"\1", " ".join(answer.lower().split()))


DATASETS = {
    "monomial_derivative": _dataset(_monomial_derivative),
    "slope_at_point": _dataset(_slope_at_point),
    "slope_sign": _dataset(_slope_sign),
    "constant_integral": _dataset(_constant_integral),
    "number_statements": _dataset(_number_statements),
    "if_then": _dataset(_if_then),
    "counterexample": _dataset(_counterexample),
}
