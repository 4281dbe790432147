"""What a rule is, the registry of all rules, and the items made from them."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import NamedTuple

from metasft.data.rules.inputs import Draw
from metasft.data.sources.duplicates import normalised_question

OPENING = "Apply the hidden rule to the input."
"""The system turn of every prompt, the same for all rules."""
KINDS = ("numbers", "words", "dates", "units", "labels", "formats", "tables")
"""Modules with rules; a rule's kind is the module that it is in."""
ITEMS = 300
"""Items of one rule, which bound what can be asked for with --samples-per-task and the like."""

Solve = Callable[[str], str | int]

_MOST_TRIES = 20_000


@dataclass(frozen=True)
class Rule:
    """One rule, which is one task.

    Attributes:
        name: of the task and of the function.
        kind: the module that it is in.
        group: of rules that share an idea.
        description: for people, never shown to a model.
        draw: makes a random input.
        solve: input -> answer, or the index of a label.
        labels: words for the classes that ``solve`` tells apart; empty: its result is the answer.
    """

    name: str
    kind: str
    group: str
    description: str
    draw: Draw
    solve: Solve
    labels: tuple[str, ...] = ()

    def answer(self, text: str) -> str:
        """The one answer to an input."""
        found = self.solve(text)
        return self.labels[int(found)] if self.labels else str(found)


class RuleItem(NamedTuple):
    """An input with its answer, and the class of the answer where the rule has labels."""

    text: str
    answer: str
    label: int | None


_RULES: dict[str, Rule] = {}


def rule(group: str, draw: Draw, labels: str = "") -> Callable[[Solve], Solve]:
    """Register the decorated function as a rule; its docstring is the description.

    Args:
        group: what its idea is called.
        draw: makes inputs.
        labels: of a function that returns a bool or an index, the words for False and True, or 0, 1, ...
    """

    def register(solve: Solve) -> Solve:
        name, kind = solve.__name__, solve.__module__.rpartition(".")[2]
        assert name not in _RULES, f"two rules are called {name}"
        _RULES[name] = Rule(name, kind, group, solve.__doc__ or "", draw, solve, tuple(labels.split()))
        return solve

    return register


@functools.cache
def all_rules() -> dict[str, Rule]:
    """Every rule by its name, in the order of the kinds and of their modules."""
    for kind in KINDS:
        import_module(f"metasft.data.rules.{kind}")
    return {name: one for kind in KINDS for name, one in _RULES.items() if one.kind == kind}


@functools.cache
def all_items(seed: int) -> dict[str, tuple[RuleItem, ...]]:
    """``ITEMS`` items of every rule; no input occurs twice, under any two rules either.

    With labels the classes alternate, so that every prefix is balanced.

    Args:
        seed: of the inputs.
    """
    seen: set[str] = set()
    return {name: tuple(_items(one, seed, seen)) for name, one in all_rules().items()}


def _items(one: Rule, seed: int, seen: set[str]) -> list[RuleItem]:
    rng = random.Random(f"{seed}/{one.name}")
    items: list[RuleItem] = []
    tries = 0
    while len(items) < ITEMS:
        tries += 1
        assert tries < _MOST_TRIES, f"{one.name} has no more than {len(items)} inputs of its own"
        text = one.draw(rng)
        key = normalised_question(text)
        if key in seen:
            continue
        label = int(one.solve(text)) if one.labels else None
        if label is not None and label != len(items) % len(one.labels):
            continue
        seen.add(key)
        items.append(RuleItem(text, one.answer(text), label))
    return items
