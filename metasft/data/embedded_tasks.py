"""Where the tasks come from: examples drawn from reasoning-gym, and the scorers that judge an answer.

A task is a set of families: of reasoning-gym (Apache-2.0, procedural, each with its own verifier), and a few of our own
in the same form. ``families`` says how each is used. Every family runs in an easy configuration: questions are short,
and a model of 100 million parameters can learn something from a few of them. Nothing here needs torch.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import random
import re
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from metasft.data.answers import INSTRUCTION, Score, extract_answer, normalised
from metasft.data.families import EXPRESSION_FAMILIES, FAMILIES, OWN_FAMILIES, ROWS_HINT

__all__ = [
    "INSTRUCTION",
    "TEST_TASKS",
    "TRAIN_TASKS",
    "VALID_TASKS",
    "Example",
    "Score",
    "all_tasks",
    "constant_per_form",
    "extract_answer",
    "family_examples",
    "generate_examples",
    "majority_baseline",
    "messages_for",
    "package_version",
    "row_for",
    "score",
    "score_leniently",
    "stream_examples",
]

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
CORRECT_SCORE = 0.99
"""A verifier's score from which an answer counts as correct: they give partial credit below it."""

_STREAM_SIZE = 1_000_000  # some families plan all items from the size, so it has to be one constant for a stable stream
_DRY_AFTER = 1000  # rejected items in a row after which a family counts as exhausted
_MAX_SCORED_CHARS = 300  # five times the longest answer there is: whatever is longer is wrong, and may be slow to judge


@dataclass(frozen=True)
class Example:
    """One question with its gold answer.

    Attributes:
        task: its name (here one of ``all_tasks()``).
        data_source: where it comes from, such as ``reasoning_gym/gcd``; decides how an answer is scored.
        example_id: unique among all examples of all tasks.
        prompt: question and instruction line, the content of the user turn.
        response: the content of the last assistant turn (here ``Answer: <answer>``).
        answer: the gold answer.
        extra_info: what the scorer needs besides the answer, JSON-able.
        turns: what comes before the response, where that is more than ``prompt`` as one user turn: a system turn, or
            earlier turns of a conversation; ``prompt`` is their text then.
    """

    task: str
    data_source: str
    example_id: str
    prompt: str
    response: str
    answer: str
    extra_info: dict[str, Any]
    turns: tuple[Mapping[str, str], ...] = ()


def all_tasks() -> dict[str, tuple[str, ...]]:
    """Every task with its families, the training tasks first."""
    return {**TRAIN_TASKS, **VALID_TASKS, **TEST_TASKS}


def role(task: str) -> str:
    """One of ``train``, ``valid`` and ``unseen``."""
    return "train" if task in TRAIN_TASKS else "valid" if task in VALID_TASKS else "unseen"


def messages_for(example: Example) -> list[dict[str, str]]:
    """The example as a conversation in veRL's chat format: the prompt's turns, then the response."""
    before = map(dict, example.turns or ({"role": "user", "content": example.prompt},))
    return [*before, {"role": "assistant", "content": example.response}]


def row_for(example: Example) -> dict[str, Any]:
    """The example as one row of a data file.

    ``extra_info`` becomes a JSON string: its keys differ between families, and a parquet column of structs would give
    every row the union of them all.
    """
    return {
        "messages": messages_for(example),
        "prompt": example.prompt,
        "response": example.response,
        "answer": example.answer,
        "task": example.task,
        "data_source": example.data_source,
        "example_id": example.example_id,
        "extra_info": json.dumps(example.extra_info, sort_keys=True, ensure_ascii=False),
    }


# ------------------------------------------------------------------------------------------------ generation


def _dataset_class(family: str) -> tuple[type, type]:
    """The family's dataset and config classes, with what is not reproducible in them repaired."""
    if family in OWN_FAMILIES:
        from metasft.data import own_families

        return own_families.DATASETS[family], own_families.Config

    from reasoning_gym.factory import DATASETS

    dataset_class, config_class = DATASETS[family]
    if family == "polynomial_multiplication":

        class OrderedMonomials(dataset_class):
            def _get_monomials(self, rng):
                # They come out of a set, in an order that changes with the process's hash seed, and are drawn by index.
                return sorted(super()._get_monomials(rng), key=str)

        dataset_class = OrderedMonomials
    elif family in ("ransom_note", "isomorphic_strings"):

        class OrderedLetters(dataset_class):
            def __init__(self, config):
                super().__init__(config)
                self.letters = _SortedSet(self.letters)

        dataset_class = OrderedLetters
    elif family == "word_ladder":

        class OrderedNeighbours(dataset_class):
            def _get_neighbors(self, word, word_set):
                return sorted(super()._get_neighbors(word, word_set))

        dataset_class = OrderedNeighbours
    elif family == "list_functions":

        class Seeded(dataset_class):
            def __getitem__(self, idx):
                state = random.getstate()
                random.seed(self.seed + idx)  # it draws some numbers from the global generator
                try:
                    return super().__getitem__(idx)
                finally:
                    random.setstate(state)

        dataset_class = Seeded
    return dataset_class, config_class


class _SortedSet(set[str]):
    """One that is gone through in order, which does not change with the process's hash seed."""

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(super().__iter__()))

    def __sub__(self, other: Set[Any]) -> _SortedSet:
        return _SortedSet(super().__sub__(other))


def _family_stream(family: str, seed: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Endless (index, reasoning-gym entry) pairs of one family.

    reasoning-gym adds the index to the seed, so streams of neighbouring seeds overlap. A hash keeps those of different
    seeds and families apart.
    """
    digest = hashlib.sha256(f"{seed}/{family}".encode()).digest()
    stream_seed = int.from_bytes(digest[:4], "big")
    dataset_class, config_class = _dataset_class(family)
    datasets = [
        dataset_class(config_class(**{"seed": stream_seed, "size": _STREAM_SIZE, **config}))
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


# ------------------------------------------------------------------------------------------------ scoring


_FUNCTIONS = frozenset(("exp", "sin", "cos", "tan", "log", "ln", "sqrt", "asin", "acos", "atan"))
_VARIABLES = frozenset({"x", "X", "C"})
_CONSTANTS = frozenset({"E", "pi"})


def _is_harmless_expression(text: str) -> bool:
    """Whether a text is a formula that sympy may evaluate: known names only, and numbers and powers of sane size.

    ``parse_expr`` runs its input as Python code, so a generated ``9**9**9`` would never return and worse is possible.
    """
    try:
        # Deep nesting overflows the parser's stack with MemoryError or RecursionError.
        tree = ast.parse(text.strip(), mode="eval")
        degree, bits = _expression_size(tree.body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    calls = sum(isinstance(node, ast.Call) for node in ast.walk(tree))
    # Simplifying a product of many functions takes sympy seconds.
    return degree <= 64 and bits <= 10_000 and calls <= 4


def _expression_size(node: ast.AST) -> tuple[float, float]:
    """Bounds on the polynomial degree, and on the bits of the largest number, of what an expression expands to.

    Raises:
        ValueError: the expression contains something other than arithmetic on known names.
    """
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return 0.0, math.log2(abs(node.value) + 2)
    if isinstance(node, ast.Name) and node.id in _VARIABLES:
        return 1.0, 1.0
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return 0.0, 0.0
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        return _expression_size(node.operand)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
        if len(node.args) != 1 or node.keywords:
            raise ValueError("functions take one argument")
        return _expression_size(node.args[0])
    if isinstance(node, ast.BinOp):
        left, right = _expression_size(node.left), _expression_size(node.right)
        if isinstance(node.op, ast.Add | ast.Sub):
            return max(left[0], right[0]), max(left[1], right[1]) + 1
        if isinstance(node.op, ast.Mult | ast.Div):
            return left[0] + right[0], left[1] + right[1]
        if isinstance(node.op, ast.Pow):
            # Even a symbolic exponent may collapse to a number (x - x + 9), so its numbers always count.
            factor = 2.0 ** min(right[1], 32.0)
            return left[0] * factor + right[0], left[1] * factor
    raise ValueError(f"not part of a formula: {type(node).__name__}")


@functools.cache
def _scorer(family: str) -> Callable[[str, dict[str, Any]], float]:
    """The family's own ``score_answer``."""
    dataset_class, config_class = _dataset_class(family)
    return dataset_class(config_class(seed=0, size=1)).score_answer


def _reasoning_gym_correct(answer: str, gold: str, extra_info: Mapping[str, Any]) -> bool:
    family = extra_info["family"]
    if len(answer) > _MAX_SCORED_CHARS:
        return False
    lowered = answer.lower()
    # Verifiers compare distances, and every comparison with nan passes; exact fractions of 1e999999999 take forever.
    if "nan" in lowered or "inf" in lowered or re.search(r"\de[+-]?\d{3}", lowered):
        return False
    settings = FAMILIES[family]
    if settings.whole_answer is not None and not all(re.fullmatch(settings.whole_answer, a) for a in (answer, gold)):
        return False  # the gold answer too: some verifiers evaluate it, and files may be anybody's
    if settings.thousands:
        answer = answer.replace(",", "")
    evaluated = (answer, gold, str(extra_info["metadata"].get("integrand", 0))) if family in EXPRESSION_FAMILIES else ()
    if not all(map(_is_harmless_expression, evaluated)):
        return False
    if settings.rows:
        answer, gold = ("\n".join(text.split(" / ")) for text in (answer, gold))
    entry = {"answer": gold, "metadata": extra_info["metadata"]}
    try:
        return _scorer(family)(answer, entry) >= CORRECT_SCORE and settings.close(answer, gold)
    except (ValueError, ArithmeticError):  # what a verifier raises on text it cannot read as a number
        return False
    except Exception as error:  # and over metadata that its family does not have
        raise ValueError(
            f"the scorer of {family} cannot use the metadata in extra_info ({type(error).__name__}: {error}): make the "
            "files with prepare_math_science_data.py"
        ) from error


def _read(row: Mapping[str, Any] | Example, column: str) -> Any:
    """A column of a data row: a mapping, a pandas row, or an Example."""
    if isinstance(row, Example):
        return getattr(row, column)
    try:
        return row[column]
    except KeyError:
        raise ValueError(
            f"a data row has no column '{column}': make the files with prepare_math_science_data.py"
        ) from None


def _has(row: Mapping[str, Any] | Example, column: str) -> bool:
    return isinstance(row, Example) or (column in row and row[column] is not None)


def _extra_info(row: Mapping[str, Any] | Example) -> dict[str, Any]:
    """What the scorer needs besides the answer: a JSON string in data files, a dict in examples."""
    extra_info = _read(row, "extra_info")
    if isinstance(extra_info, str):
        try:
            extra_info = json.loads(extra_info)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"extra_info of a data row is no JSON ({error}): make the files with prepare_math_science_data.py"
            ) from error
    if not isinstance(extra_info, Mapping):
        raise ValueError(f"extra_info of a data row is {extra_info!r}: it must be a JSON object")
    return dict(extra_info)


def score(text: str, row: Mapping[str, Any] | Example) -> Score:
    r"""Judge a generated text against the row it answers.

    Rows from reasoning-gym are scored by their family's verifier. Rows whose ``extra_info`` names a ``scorer`` are
    scored by that one of ``sources.scoring``. Others are scored by math-verify where the gold answer is LaTeX
    (math-verify misreads reasoning-gym's syntax), else by equality up to case and white space.

    Args:
        text: what the model wrote, whatever it is.
        row: an Example, or a row of a data file: ``data_source``, ``answer``, ``extra_info`` (dict or JSON string).

    Raises:
        ValueError: the row, not the text, is unusable: a column is missing or names an unknown family.
    """
    data_source, gold = _read(row, "data_source"), str(_read(row, "answer"))
    if data_source.startswith("reasoning_gym/"):
        extracted = extract_answer(text)
        extra_info = _extra_info(row)
        family, metadata = extra_info.get("family"), extra_info.get("metadata")
        if not isinstance(family, str) or family not in FAMILIES or not isinstance(metadata, Mapping):
            raise ValueError(
                f"the scorer of data_source '{data_source}' needs 'family' and 'metadata' in extra_info, which is "
                f"{extra_info}: make the files with prepare_math_science_data.py"
            )
        correct = extracted is not None and _reasoning_gym_correct(extracted, gold, extra_info)
        return Score(correct=correct, formatted=extracted is not None, extracted=extracted)

    from metasft.data import scoring

    extra_info = _extra_info(row) if _has(row, "extra_info") else {}
    if "scorer" in extra_info:
        return scoring.judge(text, gold, extra_info)
    extracted = extract_answer(text)
    if extracted is None:
        correct = False
    elif normalised(extracted) == normalised(gold):
        correct = True
    else:
        correct = "\\" in gold and scoring.equal_mathematics(gold, extracted)
    return Score(correct=correct, formatted=extracted is not None, extracted=extracted)


def score_leniently(text: str, row: Mapping[str, Any] | Example) -> bool:
    """Whether the answer is right when its form does not count (:func:`metasft.data.scoring.correct_leniently`).

    Raises:
        ValueError: as :func:`score`.
    """
    from metasft.data.scoring import correct_leniently

    return correct_leniently(text, str(_read(row, "answer")), lambda form: score(form, row).correct)


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
        by_form[_read(example, "data_source")].append(example)
    constants = {form: _most_frequent_answer(examples) for form, examples in by_form.items()}
    rest = _most_frequent_answer(pool)
    answers = [constants.get(_read(row, "data_source"), rest) for row in rows]
    right = [score(_stating(answer, row), row).correct for answer, row in zip(answers, rows, strict=True)]
    return sum(right) / len(right)


def _most_frequent_answer(rows: Iterable[Mapping[str, Any] | Example]) -> str:
    counts = Counter(str(_read(row, "answer")) for row in rows)
    return min(counts, key=lambda answer: (-counts[answer], answer), default="")


def _stating(answer: str, row: Mapping[str, Any] | Example) -> str:
    """A text that gives this answer in the form that the row's scorer reads."""
    from metasft.data.scoring import BARE, EXACT_MATCH

    whole = _has(row, "extra_info") and _extra_info(row).get("scorer") in (BARE, EXACT_MATCH)
    return answer if whole else f"Answer: {answer}"


def package_version() -> str:
    """Installed version of reasoning-gym, for manifests."""
    from importlib.metadata import version

    return version("reasoning-gym")


assert all(family in FAMILIES for families in all_tasks().values() for family in families)
