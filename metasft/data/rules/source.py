"""The rules as a source of suites, and what a manifest says about each of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from metasft.data.examples import Example
from metasft.data.rules.rule import ITEMS, OPENING, all_items, all_rules
from metasft.data.sources.column_layouts import prompt_text
from metasft.data.sources.source import Item, Source
from metasft.data.sources.suite import Suite
from metasft.data.trivial import of_task

NAME = "rules"


def _generate(subset: str, count: int, seed: int) -> Iterator[Item]:
    labels = all_rules()[subset].labels
    for number, (text, answer, label) in enumerate(islice(all_items(seed)[subset], count)):
        turns = ({"role": "system", "content": OPENING}, {"role": "user", "content": text})
        yield Item(
            question=text,
            prompt=prompt_text(turns),
            response=answer,
            answer=answer,
            scoring={"scorer": "bare", **({"choices": list(labels)} if labels else {})},
            level=None if label is None else label + 1,
            key=f"{subset}-seed{seed}-{number}",
            turns=turns,
        )


SOURCES = (
    Source.generated(
        _generate,
        name=NAME,
        repository="metasft/rules",
        licence="Apache-2.0",
        scorer="bare",
        subsets=tuple(all_rules()),
        sizes=f"{ITEMS} per rule",
        caveats=(
            "the prompt never says what is asked: only the examples of a task do",
            "every prompt opens with a system turn, which a chat template has to have",
        ),
        package="metasft",
    ),
)


def describe(suite: Suite, files: Mapping[str, Sequence[Example]]) -> dict[str, dict[str, Any]]:
    """What the manifest says about the tasks that are one rule each: kind, group, description, trivial accuracies.

    Args:
        suite: any.
        files: made of it, relative name -> examples.
    """
    described = {}
    for name, task in suite.tasks.items():
        if list(task.sources) == [NAME] and len(task.sources[NAME]) == 1:
            rule = all_rules()[task.sources[NAME][0]]
            described[name] = {
                "kind": rule.kind,
                "group": rule.group,
                "description": rule.description,
                "trivial": of_task(name, files, _pairs),
            }
    return described


def _pairs(examples: Sequence[Example]) -> list[tuple[str, str]]:
    return [
        (example.turns[-1]["content"] if example.turns else example.prompt, example.response) for example in examples
    ]
