"""The embedded tasks, and families of reasoning-gym, as a source: a suite can mix them with benchmarks and own data."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from metasft.data import embedded_tasks as tasks
from metasft.data.families import FAMILIES
from metasft.data.reasoning.groups import GROUPS
from metasft.data.sources.source import Item, Source


def _generate(subset: str, count: int, seed: int) -> Iterator[Item]:
    single = subset in GROUPS
    stream = tasks.family_examples(subset, seed) if single else tasks.stream_examples(subset, seed)
    for example in islice(stream, count):
        labels = FAMILIES[subset].labels if single else ()
        yield Item(
            question=example.prompt.rpartition("\n")[0],  # without the line that asks for the form of the answer
            prompt=example.prompt,
            response=example.response,
            answer=example.answer,
            scoring=example.extra_info,
            level=labels.index(example.answer) + 1 if labels else None,
            key=example.example_id,
        )


REASONING_GYM = Source.generated(
    _generate,
    name="reasoning_gym",
    repository="open-thought/reasoning-gym",
    licence="Apache-2.0",
    scorer="the family's own verifier",
    subsets=(*tasks.all_tasks(), *GROUPS),
    sizes="as many as asked for, of some families a few hundred",
    caveats=("cut anew: test items of a suite are not those that --source reasoning_gym sets aside",),
    package="reasoning-gym",
)
