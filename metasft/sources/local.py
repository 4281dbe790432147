"""Own data: JSONL, CSV or parquet files, and a YAML file that says which column is what.

    title: Exercises of our course
    licence: internal
    files: {train: [train.jsonl], test: [test.jsonl]}   # or a list: one pool, cut by a hash; relative to this file
    fields: {prompt: question, answer: result, response: solution, task: chapter, level: difficulty}
    scorer: number                                      # boxed, gsm8k, choice, number, boolean, text
    instruction: Give the result in metres.             # optional; the form of the answer is asked for anyway
    relative_tolerance: 0.01                            # of scorer number
    unit: m                                             # of scorer number
    train: [kinematics, optics]                         # values of the task column
    unseen: [thermodynamics]
    sizes: {samples_per_task: 200, test_samples: 50, shot_pool: 50}

``train`` and ``unseen`` may also be mappings as in suites, to mix own data (under the name of this file) with other
sources:

    train:
      kinematics: {sources: {my: [kinematics]}}
      algebra: {sources: {reasoning_gym: [algebra]}}

Fields: ``prompt`` and ``answer`` are needed; ``response`` (default: the answer alone), ``task`` (needed for more than
one task), ``level``, ``group`` (rows of one problem), and ``choices`` for the scorer choice (a list, or its JSON text).
``exclude``, ``near_duplicates``, ``stratify`` and ``max_chars`` as in suites.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from metasft.sources import scoring
from metasft.sources.competition import BOXED_INSTRUCTION
from metasft.sources.source import Item, Row, Source, multiple_choice, short_answer
from metasft.sources.suite import Suite, read_yaml, suite_from
from metasft.sources.word_problems import GSM8K_INSTRUCTION

FIELDS = ("prompt", "answer", "response", "task", "level", "group", "choices")
_OWN_KEYS = ("licence", "files", "fields", "scorer", "instruction", "relative_tolerance", "unit")
_SUITE_KEYS = ("title", "train", "unseen", "sizes", "exclude", "near_duplicates", "stratify", "max_chars")
_FORMS = {"boxed": (BOXED_INSTRUCTION, r"\boxed{%s}"), "gsm8k": (GSM8K_INSTRUCTION, "#### %s")}


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
    fields = _check_fields(values.get("fields"), where)
    scorer = values.get("scorer", "text")
    if not isinstance(scorer, str) or scorer not in scoring.SCORERS:
        raise ValueError(f"scorer in {where} is {scorer!r}: choose from {', '.join(scoring.SCORERS)}")
    if (scorer == "choice") != ("choices" in fields):
        raise ValueError(f"{where} has scorer {scorer} and fields {', '.join(fields)}: choice and choices go together")
    tasks = {
        role: _check_tasks(values.get(role) or [], path.stem, f"{role} in {where}") for role in ("train", "unseen")
    }
    names = [
        name for entries in tasks.values() for entry in entries.values() for name in _own_subsets(entry, path.stem)
    ]
    if "task" not in fields and len(set(names)) > 1:
        raise ValueError(f"{where} names {len(set(names))} tasks but no field for them: add task: <column> to fields")
    files = _check_files(values.get("files"), path.parent, where)
    splits = tuple(files)
    source = Source(
        name=path.stem,
        repository=path.name,
        revision="",
        licence=str(values.get("licence", "not stated")),
        files={split: "" for split in splits},
        columns={column: "any" for column in fields.values()},
        read=_reader(fields, scorer, values, where),
        scorer=scorer,
        subsets=tuple(dict.fromkeys(names)),
        train_splits=("train",) if "test" in files else splits,
        test_splits=("test",) if "test" in files else splits,
        caveats=("own data",),
        local_files=files,
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


def _check_fields(fields: Any, where: str) -> dict[str, str]:
    if not isinstance(fields, Mapping) or not all(isinstance(column, str) for column in fields.values()):
        raise ValueError(f"fields in {where} is {fields!r}: map {', '.join(FIELDS)} to column names")
    if unknown := [name for name in fields if name not in FIELDS]:
        raise ValueError(f"fields in {where} has {unknown[0]!r}, which means nothing: use {', '.join(FIELDS)}")
    for name in ("prompt", "answer"):
        if name not in fields:
            raise ValueError(f"fields in {where} lacks {name}: say which column holds it")
    return dict(fields)


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

    def read(row: Row, subset: str) -> Item | None:
        def value(name: str) -> str:
            content = row.get(fields.get(name, ""))
            return "" if content is None or content != content else str(content).strip()  # NaN: a gap in a parquet file

        prompt, answer, response = value("prompt"), value("answer"), value("response")
        if not prompt or not answer:
            return None
        if scorer == "choice":
            item = _read_choice(prompt, answer, response, row.get(fields["choices"]), hint)
        elif scorer in _FORMS:
            item = _read_formed(prompt, answer, response, scoring_info, hint)
        else:
            # A response that already ends with the answer in a form that scores stays as it is.
            verdict = scoring.judge(response, answer, scoring_info)
            item = short_answer(prompt, answer, scoring_info, hint=hint, response=response)
            item = replace(item, response=response) if verdict.formatted and verdict.correct else item
        return item and replace(item, level=level_of(value("level")), group=value("group"))

    def level_of(text: str) -> int | None:
        try:
            return int(float(text)) if text else None
        except (ValueError, OverflowError):
            raise ValueError(
                f"fields in {where} maps level to {fields['level']}, which holds {text!r}: give numbers, 1 the easiest"
            ) from None

    return read


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


def _read_formed(prompt: str, answer: str, response: str, scoring_info: Mapping[str, Any], hint: str) -> Item:
    """The answer in the form of a scorer that has its own."""
    instruction, ending = _FORMS[scoring_info["scorer"]]
    verdict = scoring.judge(response, answer, scoring_info)
    if not (verdict.formatted and verdict.correct):
        response = f"{response}\n{ending % answer}".strip()
    return Item(
        prompt, "\n".join([prompt, " ".join(filter(None, [hint, instruction]))]), response, answer, scoring_info
    )


def _read_choice(prompt: str, answer: str, response: str, choices: Any, hint: str) -> Item | None:
    """The answer may be a letter or the text of an option."""
    try:
        options = [str(option) for option in (json.loads(choices) if isinstance(choices, str) else choices)]
    except (TypeError, ValueError, RecursionError):
        return None
    letter = scoring.chosen_letter(answer, options) if options else None
    return None if letter is None else multiple_choice(prompt, options, letter, hint=hint, response=response)
