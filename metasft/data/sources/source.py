"""What a source is: a dataset repository or local files, the columns it is expected to have, and how a row is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from metasft.data.answers import INSTRUCTION

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Item:
    """One question of a source, before it belongs to a task.

    Attributes:
        question: what makes it this question, options included; compared to find duplicates.
        prompt: content of the user turn.
        response: content of the assistant turn, with the reasoning where the source has it.
        answer: the gold answer, as the scorer reads it.
        scoring: ``scorer``, one of ``scoring.SCORERS``, and what it needs.
        level: difficulty, 1 is easiest, or the class of a label, so that files are stratified; None: neither is known.
        group: items with the same group are one problem (in several languages, say) and never lie on both sides of
            training and test; empty: the item is its own group.
        key: unique within the source at one revision; ``reading`` fills it in for items of files.
        turns: what comes before the response, where that is more than ``prompt`` as one user turn; ``prompt`` is their
            text then.
    """

    question: str
    prompt: str
    response: str
    answer: str
    scoring: Mapping[str, Any]
    level: int | None = None
    group: str = ""
    key: str = ""
    turns: tuple[Mapping[str, str], ...] = ()


@dataclass(frozen=True)
class Source:
    """A dataset and how it is used.

    Attributes:
        name: in suites, in ``data_source`` and on the command line.
        repository: on the hub, ``owner/name``; of local files, what the manifest shall call them.
        revision: commit, tag or branch; ``main`` where no commit is known to fit.
        licence: as the dataset's page or paper states it.
        files: split -> pattern of its files in the repository; ``{subset}`` stands for the subset.
        columns: column -> type as ``reading.type_name`` words it; what ``read`` relies on.
        read: makes an item of a row and its subset; None where the row cannot be used (with a picture, say).
        scorer: for the documentation, the scorers that its items name.
        subsets: names for suites; empty: the source has none.
        train_splits, test_splits: where training examples, and test items, come from; the same splits on both sides
            mean that the source has no split of its own, and is cut by a hash of the items.
        sizes: for the documentation and --dry-run, number of rows as published.
        caveats: what to know before use; goes into manifest and documentation.
        fallback: name of the source to use where this one has been taken down.
        streamed: it is large, and read over the network from the front until each subset has ``scan`` usable items.
        scan: see ``streamed``.
        aligned: row i is the same problem in every subset.
        templated: questions are made from a template, so that near-duplicates are the rule: only exact ones count.
        opt_in: why it is only used with --accept-licence; empty: no consent needed.
        local_files: split -> paths, for own data; the hub is not asked.
        subset_column: of own data, the column whose value is a row's subset; empty: every row belongs to every subset.
        task_per_file: of own data, whether a file's rows belong to the subset that it is named after.
        optional_columns: read where a file has them.
        generate: makes items where there are no files: (subset, number of items, seed) -> items, the same ones each
            time, and fewer only where there are no more.
        package: that ``generate`` relies on; its installed version takes the place of ``revision``.
    """

    name: str
    repository: str
    revision: str
    licence: str
    files: Mapping[str, str]
    columns: Mapping[str, str]
    read: Callable[[Row, str], Item | None]
    scorer: str
    subsets: tuple[str, ...] = ()
    train_splits: tuple[str, ...] = ("train",)
    test_splits: tuple[str, ...] = ("test",)
    sizes: str = ""
    caveats: tuple[str, ...] = ()
    fallback: str | None = None
    streamed: bool = False
    scan: int = 4000
    aligned: bool = False
    templated: bool = False
    opt_in: str = ""
    local_files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    subset_column: str = ""
    task_per_file: bool = False
    optional_columns: tuple[str, ...] = ()
    generate: Callable[[str, int, int], Iterable[Item]] | None = None
    package: str = ""

    @classmethod
    def generated(cls, generate: Callable[[str, int, int], Iterable[Item]], **described: Any) -> Source:
        """A source without files, whose items ``generate`` makes; ``described``: further attributes."""

        def no_rows(row: Row, subset: str) -> None:
            raise AssertionError("there are no files to read")

        return cls(
            revision="",
            files={"generated": "{subset}"},
            columns={},
            read=no_rows,
            train_splits=("generated",),
            test_splits=("generated",),
            templated=True,
            generate=generate,
            **described,
        )

    def own_files(self, split: str, subset: str) -> list[str]:
        """Paths of own data that hold rows of a subset."""
        paths = self.local_files[split]
        return [path for path in paths if not self.task_per_file or Path(path).stem == subset]

    @property
    def pooled(self) -> bool:
        """Whether training examples and test items come from the same splits."""
        return self.train_splits == self.test_splits


class Form(NamedTuple):
    """How an answer is asked for, and the line that states it, with ``%s`` for the answer."""

    instruction: str
    ending: str


ANSWER_LINE = Form(INSTRUCTION, "Answer: %s")
BOXED = Form(r"Reason step by step, and put the final answer in \boxed{}.", r"\boxed{%s}")
GSM8K = Form('Reason step by step, and end with "#### <number>".', "#### %s")


def parquet(*splits: str, folder: str = "data") -> dict[str, str]:
    """``Source.files`` of splits in the hub's usual layout."""
    return {split: f"{folder}/{split}-*.parquet" for split in splits}


def columns(names: str) -> dict[str, str]:
    """``Source.columns`` of columns that hold text."""
    return dict.fromkeys(names.split(), "string")


def short_answer(
    question: str,
    answer: str,
    scoring: Mapping[str, Any],
    *,
    hint: str = "",
    response: str = "",
    level: int | None = None,
    form: Form = ANSWER_LINE,
) -> Item:
    """An item whose answer stands in a last line, after the reasoning in ``response`` where there is one."""
    return Item(
        question=question,
        prompt=f"{question}\n{f'{hint} {form.instruction}'.strip()}",
        response=f"{response}\n{form.ending % answer}".strip(),
        answer=answer,
        scoring=scoring,
        level=level,
    )


def multiple_choice(
    question: str, options: list[str], letter: str, *, hint: str = "", response: str = "", level: int | None = None
) -> Item:
    """An item whose answer is the letter of one of its options."""
    question, options = question.strip(), [option.strip() for option in options]
    text = "\n".join([question, *(f"{chr(ord('A') + i)}. {option}" for i, option in enumerate(options))])
    item = short_answer(
        text,
        letter,
        {"scorer": "choice", "choices": options},
        hint=f"{hint} Answer with the letter of the right option.".strip(),
        response=response.strip(),
        level=level,
    )
    return replace(item, question="\n".join([question, *sorted(options)]))  # in any order it is the same question
