"""Where the tasks come from: examples drawn from reasoning-gym.

A task is a set of families: of reasoning-gym (Apache-2.0, procedural, each with its own verifier), and a few of our own
in the same form. ``families`` says how each is used. Every family runs in an easy configuration: questions are short,
and a model of 100 million parameters can learn something from a few of them. Nothing here needs torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from metasft.data.answers import INSTRUCTION
from metasft.data.examples import Example
from metasft.data.families import FAMILIES, ROWS_HINT
from metasft.data.scoring import score
from metasft.data.verifiers import dataset_class

TRAIN_TASKS: dict[str, tuple[str, ...]] = {
    "algebra": ("simple_equations", "polynomial_equations", "polynomial_multiplication", "complex_arithmetic"),
    "geometry": ("simple_geometry", "advanced_geometry"),
    "number_theory": (
        "gcd",
        "lcm",
        "prime_factorization",
        "fraction_simplification",
        "base_conversion",
        "count_primes",
    ),
    "probability": ("coin_flip", "dice"),
    "word_problems": ("gsm_symbolic", "leg_counting", "chain_sum"),
}
"""Task -> families, for meta-training."""

VALID_TASKS: dict[str, tuple[str, ...]] = {
    "number_lists": ("number_sequence", "number_sorting", "number_filtering"),
    "calendar": ("calendar_arithmetic", "time_intervals"),
}
"""Task -> families, to choose settings on; their families are in no other task."""

TEST_TASKS: dict[str, tuple[str, ...]] = {
    "calculus": (
        "simple_integration",
        "intermediate_integration",
        "monomial_derivative",
        "slope_at_point",
        "slope_sign",
        "constant_integral",
    ),
    "theorem_proving": (
        "knights_knaves",
        "syllogism",
        "circuit_logic",
        "number_statements",
        "if_then",
        "counterexample",
    ),
}
"""Task -> families, never seen in meta-training. ``theorem_proving`` means small deductions, not proofs."""

MAX_PROMPT_CHARS = 400
MAX_ANSWER_CHARS = 60
FAMILY_TASK_CHARS = (760, 120)
"""Most characters of prompt and answer in tasks of a single family, where a grid may stand: a token or less each."""

_STREAM_SIZE = 1_000_000  # some families plan all items from the size, so it has to be one constant for a stable stream
_DRY_AFTER = 1000  # rejected items in a row after which a family counts as exhausted


def all_tasks() -> dict[str, tuple[str, ...]]:
    """Every task with its families, the training tasks first."""
    return {**TRAIN_TASKS, **VALID_TASKS, **TEST_TASKS}


def role(task: str) -> str:
    """One of ``train``, ``valid`` and ``unseen``."""
    return "train" if task in TRAIN_TASKS else "valid" if task in VALID_TASKS else "unseen"


# ------------------------------------------------------------------------------------------------ generation


def _family_stream(family: str, seed: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Endless (index, reasoning-gym entry) pairs of one family.

    reasoning-gym adds the index to the seed, so streams of neighbouring seeds overlap. A hash keeps those of different
    seeds and families apart.
    """
    digest = hashlib.sha256(f"{seed}/{family}".encode()).digest()
    stream_seed = int.from_bytes(digest[:4], "big")
    of_family, config_class = dataset_class(family)
    datasets = [
        of_family(config_class(**{"seed": stream_seed, "size": _STREAM_SIZE, **config}))
        for config in FAMILIES[family].configs
    ]
    for index in range(min(dataset.size for dataset in datasets)):
        with contextlib.redirect_stdout(io.StringIO()):  # bf prints a dot for every item
            entry = datasets[index % len(datasets)][index]
        yield index, entry


def _plain(value: Any) -> Any:
    """Reduce numpy scalars, tuples and the like to what JSON gives back, so that a round trip changes nothing."""
    if isinstance(value, str):
        return str(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    return _plain(value.item())  # a numpy scalar; anything else is a family we have not met, and fails loudly


def _problem_key(family: str, question: str, metadata: Mapping[str, Any]) -> str:
    """What two questions share exactly if they are the same problem."""
    identity = FAMILIES[family].identity
    if not identity:
        return f"{family}: {' '.join(question.lower().split())}"
    values = [_plain(metadata.get(key)) for key in identity]
    if identity == ("numbers",):  # of gcd and lcm, which do not depend on the order
        values = [sorted(values[0])]
    return f"{family}: {values}"


def _fresh_examples(
    task: str,
    family: str,
    seed: int,
    seen: set[str],
    most_chars: tuple[int, int] = (MAX_PROMPT_CHARS, MAX_ANSWER_CHARS),
) -> Iterator[Example]:
    """Sound, short examples of one family that are not in ``seen`` (which is updated), until none turn up any more.

    Those of a family with ``labels`` have them in turns.
    """
    drawn = _drawn_examples(task, family, seed, seen, most_chars)
    labels = FAMILIES[family].labels
    if not labels:
        yield from drawn
        return
    waiting: dict[str, deque[Example]] = {label: deque() for label in labels}
    for label in itertools.cycle(labels):
        while not waiting[label]:
            example = next(drawn, None)
            if example is None:
                return
            waiting[example.answer].append(example)
        yield waiting[label].popleft()


def _drawn_examples(
    task: str, family: str, seed: int, seen: set[str], most_chars: tuple[int, int]
) -> Iterator[Example]:
    settings = FAMILIES[family]
    rejected = 0
    for index, entry in _family_stream(family, seed):
        question, answer, metadata = entry["question"], str(entry["answer"]), entry["metadata"]
        if settings.rows:
            answer = " / ".join(answer.split("\n"))
        if settings.strip:
            question = re.sub(settings.strip, "", question, flags=re.DOTALL)
        question = question.strip()
        question = question[0].upper() + question[1:]
        hint = f"{settings.hint} {ROWS_HINT}".strip() if settings.rows else settings.hint
        prompt = f"{question}\n{hint} {INSTRUCTION}" if hint else f"{question}\n{INSTRUCTION}"
        key = _problem_key(family, question, metadata)
        example = Example(
            task=task,
            data_source=f"reasoning_gym/{family}",
            example_id=f"{family}-seed{seed}-{index}",
            prompt=prompt,
            response=f"Answer: {answer}",
            answer=answer,
            extra_info={
                "family": family,
                "metadata": {k: _plain(metadata[k]) for k in settings.scorer_metadata if k in metadata},
            },
        )
        usable = (
            key not in seen
            and prompt not in seen
            and 0 < len(answer) <= most_chars[1]
            and len(prompt) <= most_chars[0]
            and settings.accept(entry)
            and score(example.response, example).correct
        )
        if usable:
            rejected = 0
            seen.update((key, prompt))
            yield example
        else:
            rejected += 1
            if rejected == _DRY_AFTER:
                return


def stream_examples(task: str, seed: int) -> Iterator[Example]:
    """Distinct examples of one task, its families taking turns; a family that runs dry leaves its turns to the others.

    A prefix of the stream does not depend on how much of it is taken: asking for more examples only appends.

    Raises:
        ValueError: unknown task.
    """
    tasks = all_tasks()
    if task not in tasks:
        raise ValueError(f"unknown task '{task}': choose from {', '.join(tasks)}")
    seen: set[str] = set()
    turns = [_fresh_examples(task, family, seed, seen) for family in tasks[task]]
    while turns:
        for stream in list(turns):
            example = next(stream, None)
            if example is None:
                turns.remove(stream)
            else:
                yield example


def family_examples(family: str, seed: int) -> Iterator[Example]:
    """Distinct examples of a task that is one family, whose name it has."""
    return _fresh_examples(family, family, seed, set(), FAMILY_TASK_CHARS)


def generate_examples(
    task: str, count: int, seed: int, *, progress: Callable[[int], Any] | None = None
) -> list[Example]:
    """The first ``count`` examples of ``stream_examples(task, seed)``.

    The same arguments give the same examples in every process.

    Args:
        task: one of ``all_tasks()``.
        count: how many, at least 1.
        seed: of the streams; different seeds give different streams that may share single problems.
        progress: called with 1 for each example, for a progress bar.

    Raises:
        ValueError: unknown task, ``count`` under 1, or fewer distinct questions than asked for.
    """
    if count < 1:
        raise ValueError(f"count is {count}: ask for at least 1 example of task '{task}'")
    examples = []
    for example in itertools.islice(stream_examples(task, seed), count):
        examples.append(example)
        if progress is not None:
            progress(1)
    if len(examples) < count:
        raise ValueError(
            f"task '{task}' has {len(examples)} distinct questions, {count} are needed: "
            "ask for fewer samples, or leave the task out with --tasks"
        )
    return examples


def package_version() -> str:
    """Installed version of reasoning-gym, for manifests."""
    from importlib.metadata import version

    return version("reasoning-gym")


assert all(family in FAMILIES for families in all_tasks().values() for family in families)
