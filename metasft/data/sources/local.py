"""Own data: JSONL, CSV or parquet files, and a YAML file that says what they are.

    title: Exercises of our course
    licence: internal
    files: {train: [train.jsonl], test: [test.jsonl]}   # or a list: one pool, cut by a hash; relative to this file
    fields: {prompt: question, answer: result, response: solution, task: chapter, level: difficulty}
    scorer: number                                      # boxed, gsm8k, choice, number, boolean, text; or none
    instruction: Give the result in metres.             # optional; a scorer's form is asked for anyway
    relative_tolerance: 0.01                            # of scorer number
    unit: m                                             # of scorer number
    train: [kinematics, optics]                         # values of the task column, or names of files
    unseen: [thermodynamics]
    search: [mechanics]                                 # optional: tasks that settings are searched on
    valid: [electricity]                                # optional: tasks to report on while something is developed
    sizes: {samples_per_task: 200, test_samples: 50, shot_pool: 50}

These four may also be mappings as in suites, to mix own data (under the name of this file) with other
sources:

    train:
      kinematics: {sources: {my: [kinematics]}}
      algebra: {sources: {reasoning_gym: [algebra]}}

Fields: ``messages``, or ``prompt`` with ``response``, and ``system``; without these the layout is recognised by its
columns (:mod:`metasft.data.sources.column_layouts`). ``answer`` for a scorer; ``task`` where more than one task is in a
file; ``level``, ``group`` (rows of one problem), and ``choices`` for the scorer choice (a list, or its JSON text).

Texts are used word for word. Only a scorer needs the answer in a form of its own: the form is asked for, and added to
responses without it. Without a scorer data are evaluated by loss and by exact match of the response.

``exclude``, ``near_duplicates``, ``stratify`` and ``max_chars`` as in suites; near-duplicates are looked for only where
one of the first two is given: the questions of a task are often made from one template.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from metasft.data import benchmark_scorers
from metasft.data.sources import column_layouts as layouts
from metasft.data.sources.source import ANSWER_LINE, BOXED, GSM8K, Item, Row, Source, multiple_choice
from metasft.data.sources.suite import ROLES, Suite, read_yaml, suite_from

FIELDS = ("messages", "prompt", "response", "system", "answer", "task", "level", "group", "choices")
OWN_DATA = "own data"
"""The first caveat of every source of own data; the second says whether texts are used as they are."""
_OWN_KEYS = ("licence", "files", "fields", "scorer", "instruction", "relative_tolerance", "unit")
_SUITE_KEYS = ("title", *ROLES, "sizes", "exclude", "near_duplicates", "stratify", "max_chars")
_FORMS = {"boxed": BOXED, "gsm8k": GSM8K}


def read_mapping(path: Path, known: Mapping[str, Source]) -> tuple[Suite, Source]:
    """The suite and the source that a mapping file describes.

    Raises:
        ValueError: it cannot be read, a file is missing, or an entry is wrong.
    """
    if not path.is_file():
        raise ValueError(f"--mapping is {path}, which is no file: give the YAML file that describes your data")
    values, where = read_yaml(path), str(path)
    if unknown := [key for key in values if key not in _OWN_KEYS + _SUITE_KEYS]:
        raise ValueError(
            f"{where} has the entry {unknown[0]!r}, which means nothing: use {', '.join(_OWN_KEYS + _SUITE_KEYS)}"
        )
    scorer = benchmark_scorers.EXACT_MATCH if values.get("scorer") is None else values["scorer"]
    # Of responses without a last line "Answer: ...".
    scorers = [name for name in benchmark_scorers.SCORERS if name != benchmark_scorers.BARE]
    if not isinstance(scorer, str) or scorer not in scorers:
        raise ValueError(f"scorer in {where} is {scorer!r}: choose from {', '.join(scorers)}")
    fields = _check_fields(values.get("fields"), scorer, where)
    if (scorer == "choice") != ("choices" in fields):
        raise ValueError(f"{where} has scorer {scorer} and fields {', '.join(fields)}: choice and choices go together")
    tasks = {role: _check_tasks(values.get(role) or [], path.stem, f"{role} in {where}") for role in ROLES}
    names = [
        name for entries in tasks.values() for entry in entries.values() for name in _own_subsets(entry, path.stem)
    ]
    files = _check_files(values.get("files"), path.parent, where)
    splits = tuple(files)
    several = "task" not in fields and len(set(names)) > 1
    task_per_file = several and all(set(names) <= {Path(name).stem for name in files[split]} for split in splits)
    if several and not task_per_file:
        raise ValueError(
            f"{where} names {len(set(names))} tasks but no field for them: add task: <column> to fields, or name every "
            "file after its task"
        )
    source = Source(
        name=path.stem,
        repository=path.name,
        revision="",
        licence=str(values.get("licence", "not stated")),
        files={split: "" for split in splits},
        columns={column: "any" for column in fields.values()},
        optional_columns=layouts.COLUMNS,
        read=_reader(fields, scorer, values, where),
        scorer=scorer,
        subsets=tuple(dict.fromkeys(names)),
        train_splits=("train",) if "test" in files else splits,
        test_splits=("test",) if "test" in files else splits,
        caveats=(OWN_DATA, _remark(scorer, values)),
        templated=values.get("near_duplicates") is None and not values.get("exclude"),
        local_files=files,
        task_per_file=task_per_file,
        subset_column=fields.get("task", ""),
    )
    if source.name in known:
        raise ValueError(f"--mapping is {path}, but {source.name} is the name of a known source: rename the file")
    suite_values = {**{key: values[key] for key in _SUITE_KEYS if key in values}, **tasks}
    return suite_from(suite_values, path.stem, where, {**known, source.name: source}), source


def _check_tasks(tasks: Any, own: str, where: str) -> dict[Any, Any]:
    """The tasks as a suite writes them; ``suite_from`` checks the entries."""
    if isinstance(tasks, Mapping):
        return dict(tasks)
    if not isinstance(tasks, list) or not all(isinstance(name, str) for name in tasks):
        raise ValueError(f"{where} is {tasks!r}: give a list of task names, or a mapping as in suites")
    return {name: {"sources": {own: [name]}} for name in tasks}


def _own_subsets(entry: Any, own: str) -> list[str]:
    sources = entry.get("sources") if isinstance(entry, Mapping) else None
    subsets = sources.get(own) if isinstance(sources, Mapping) else None
    return [str(subset) for subset in subsets] if isinstance(subsets, list) else []


def _check_fields(fields: Any, scorer: str, where: str) -> dict[str, str]:
    fields = {} if fields is None else fields
    if not isinstance(fields, Mapping) or not all(isinstance(column, str) for column in fields.values()):
        raise ValueError(f"fields in {where} is {fields!r}: map {', '.join(FIELDS)} to column names")
    if unknown := [name for name in fields if name not in FIELDS]:
        raise ValueError(f"fields in {where} has {unknown[0]!r}, which means nothing: use {', '.join(FIELDS)}")
    if "messages" in fields and "prompt" in fields:
        raise ValueError(f"fields in {where} has messages and prompt: map one of the two, messages hold the prompt")
    if "response" in fields and "messages" not in fields and "prompt" not in fields:
        raise ValueError(f"fields in {where} lacks prompt, which goes with response: say which column holds it")
    if "prompt" in fields and "answer" not in fields and scorer != benchmark_scorers.EXACT_MATCH:
        raise ValueError(_lacks_answer(scorer, where))
    return dict(fields)


def _lacks_answer(scorer: str, where: str) -> str:
    return f"fields in {where} lacks answer: say which column holds it, or leave scorer {scorer} out"


def _check_files(files: Any, folder: Path, where: str) -> dict[str, tuple[str, ...]]:
    if isinstance(files, list):
        files = {"train": files}
    if not isinstance(files, Mapping) or set(files) not in ({"train"}, {"train", "test"}):
        raise ValueError(f"files in {where} is {files!r}: give a list, or a mapping with train and test")
    found = {}
    for split, names in files.items():
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"files of {split} in {where} is {names!r}: give a list of paths")
        found[split] = tuple(str(folder / name) for name in names)
        if missing := [name for name in found[split] if not Path(name).is_file()]:
            raise ValueError(
                f"files of {split} in {where} names {missing[0]}, which is no file: give paths relative to it"
            )
    return found


def _reader(
    fields: Mapping[str, str], scorer: str, values: Mapping[str, Any], where: str
) -> Callable[[Row, str], Item | None]:
    scoring_info = {"scorer": scorer, **_check_number_settings(scorer, values, where)}
    hint = str(values.get("instruction") or "").strip()
    answers = fields.get("answer", "answer")

    def value(row: Row, name: str) -> str:
        return layouts.text_of(row.get(fields.get(name, ""))).strip()

    def read(row: Row, subset: str) -> Item | None:
        if scorer != benchmark_scorers.EXACT_MATCH and answers not in row:
            raise ValueError(_lacks_answer(scorer, where))
        turns = layouts.read_conversation(row, fields, where)
        if turns is None:
            return None
        *before, reply = turns
        asked = max(index for index, turn in enumerate(before) if turn["role"] == "user")
        question, response = before[asked]["content"], reply["content"]
        answer = layouts.text_of(row.get(answers)).strip()
        if scorer == benchmark_scorers.EXACT_MATCH:
            if "answer" in fields and answer != response.strip():
                raise ValueError(
                    f"{where} maps answer to {answers} beside responses, but names no scorer that would read it: add "
                    "one, or leave answer out"
                )
            item = Item(question, _asking(question, hint), response, response, scoring_info)
        elif not answer:
            return None
        else:
            # The answer alone takes the scorer's form; anything more is kept in front of it.
            reasoning = "" if response.strip() == answer else response
            if scorer == "choice":
                item = _read_choice(question, answer, reasoning, row.get(fields["choices"]), hint)
            else:
                item = _read_formed(question, answer, reasoning, scoring_info, hint)
        if item is None:
            return None
        item = _within(item, before, asked)
        return replace(item, level=level_of(value(row, "level")), group=value(row, "group"))

    def level_of(text: str) -> int | None:
        try:
            return int(float(text)) if text else None
        except (ValueError, OverflowError):
            raise ValueError(
                f"fields in {where} maps level to {fields['level']}, which holds {text!r}: give numbers, 1 the easiest"
            ) from None

    return read


def _within(item: Item, before: list[layouts.Turn], asked: int) -> Item:
    """An item whose question stands in a conversation, as the content of the turn ``before[asked]``."""

    def with_content(text: str) -> list[layouts.Turn]:
        return [*before[:asked], {**before[asked], "content": text}, *before[asked + 1 :]]

    turns = with_content(item.prompt)
    return replace(
        item,
        question=layouts.prompt_text(with_content(item.question)),
        prompt=layouts.prompt_text(turns),
        turns=() if [turn["role"] for turn in turns] == ["user"] else tuple(turns),
    )


def _remark(scorer: str, values: Mapping[str, Any]) -> str:
    """In words, what is done to the texts, and how the data are evaluated."""
    if scorer == benchmark_scorers.EXACT_MATCH:
        added = "with the instruction of the mapping added to prompts" if values.get("instruction") else "word for word"
        return f"no scorer: texts are used {added}; evaluation measures the loss and exact matches of the response"
    instruction, ending = _FORMS.get(scorer, ANSWER_LINE)
    options = "the options and " if scorer == "choice" else ""
    return (
        f"scorer {scorer} reads the answer in a form of its own: prompts get {options}the line '{instruction}', and "
        f"responses that do not end so the line '{ending % '<answer>'}'"
    )


def _check_number_settings(scorer: str, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    given = {key: values[key] for key in ("relative_tolerance", "unit") if values.get(key) is not None}
    tolerance = given.get("relative_tolerance", 0)
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 <= tolerance < 1:
        raise ValueError(f"relative_tolerance in {where} is {tolerance!r}: give a share such as 0.01")
    if "unit" in given and not isinstance(given["unit"], str):
        raise ValueError(f"unit in {where} is {given['unit']!r}: give a text, such as m")
    if given and scorer != "number":
        raise ValueError(f"{where} gives {', '.join(given)} with scorer {scorer}: these belong to scorer number")
    return given


def _asking(prompt: str, *lines: str) -> str:
    """A prompt with what else it shall ask for, in a last line; what it asks for already is not repeated."""
    missing = " ".join(line for line in lines if line and line not in prompt)
    return f"{prompt}\n{missing}" if missing else prompt


def _read_formed(prompt: str, answer: str, response: str, scoring_info: Mapping[str, Any], hint: str) -> Item:
    """The answer in the form that its scorer reads; a response that already ends so stays as it is."""
    instruction, ending = _FORMS.get(scoring_info["scorer"], ANSWER_LINE)
    verdict = benchmark_scorers.judge(response, answer, scoring_info)
    if not (verdict.formatted and verdict.correct):
        response = f"{response}\n{ending % answer}".strip()
    return Item(prompt, _asking(prompt, hint, instruction), response, answer, scoring_info)


def _read_choice(prompt: str, answer: str, response: str, choices: Any, hint: str) -> Item | None:
    """The answer may be a letter or the text of an option."""
    try:
        options = [str(option) for option in (json.loads(choices) if isinstance(choices, str) else choices)]
    except (TypeError, ValueError, RecursionError):
        return None
    letter = benchmark_scorers.chosen_letter(answer, options) if options else None
    return None if letter is None else multiple_choice(prompt, options, letter, hint=hint, response=response)
