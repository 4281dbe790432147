"""The embedded tasks (reasoning-gym) as a source, so that a suite can mix them with benchmarks and own data."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from metasft.data import embedded_tasks as tasks
from metasft.data.sources.source import Item, Source


def _generate(subset: str, count: int, seed: int) -> Iterator[Item]:
    for example in islice(tasks.stream_examples(subset, seed), count):
        yield Item(
            question=example.prompt.rpartition("\n")[0],  # without the line that asks for the form of the answer
            prompt=example.prompt,
            response=example.response,
            answer=example.answer,
            scoring=example.extra_info,
            key=example.example_id,
        )


def _no_rows(row: object, subset: str) -> None:
    raise AssertionError("there are no files to read")


REASONING_GYM = Source(
    name="reasoning_gym",
    repository="open-thought/reasoning-gym",
    revision="",
    licence="Apache-2.0",
    files={"generated": "{subset}"},
    columns={},
    read=_no_rows,
    scorer="the family's own verifier",
    subsets=tuple(tasks.all_tasks()),
    train_splits=("generated",),
    test_splits=("generated",),
    sizes="as many as asked for",
    caveats=("cut anew: test items of a suite are not those that --source reasoning_gym sets aside",),
    templated=True,
    generate=_generate,
    package="reasoning-gym",
)
