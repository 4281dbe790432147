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

Fields: ``prompt`` and ``answer`` are needed; ``response`` (default: the answer alone), ``task`` (needed for more than
one task), ``level``, ``group`` (rows of one problem), and ``choices`` for the scorer choice (a list, or its JSON text).
``exclude``, ``near_duplicates``, ``stratify`` and ``max_chars`` as in suites.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metasft.sources import scoring
from metasft.sources.answers import INSTRUCTION
from metasft.sources.competition import BOXED_INSTRUCTION
from metasft.sources.source import Item, Row, Source, answer_line, asking, multiple_choice
from metasft.sources.suite import Suite, read_yaml, suite_from
from metasft.sources.word_problems import GSM8K_INSTRUCTION

FIELDS = ("prompt", "answer", "response", "task", "level", "group", "choices")
_OWN_KEYS = ("licence", "files", "fields", "scorer", "instruction", "relative_tolerance", "unit")
_SUITE_KEYS = ("title", "train", "unseen", "sizes", "exclude", "near_duplicates", "stratify", "max_chars")
_FORMS = {"boxed": BOXED_INSTRUCTION, "gsm8k": GSM8K_INSTRUCTION}


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
    if scorer not in scoring.SCORERS:
        raise ValueError(f"scorer in {where} is {scorer!r}: choose from {', '.join(scoring.SCORERS)}")
    if (scorer == "choice") != ("choices" in fields):
        raise ValueError(f"{where} has scorer {scorer} and fields {', '.join(fields)}: choice and choices go together")
    tasks = {role: values.get(role) or [] for role in ("train", "unseen")}
    for role, names in tasks.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{role} in {where} is {names!r}: give a list of task names")
    names = [*tasks["train"], *tasks["unseen"]]
    if "task" not in fields and len(names) > 1:
        raise ValueError(f"{where} names {len(names)} tasks but no field for them: add task: <column> to fields")
    files = _check_files(values.get("files"), path.parent, where)
    splits = tuple(files)
    source = Source(
        name=path.stem,
        repository=path.name,
        revision="",
        licence=str(values.get("licence", "not stated")),
        files={split: "" for split in splits},
        columns={column: "any" for column in fields.values()},
        read=_reader(fields, scorer, values),
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
    suite_values = {key: values[key] for key in _SUITE_KEYS if key in values}
    for role in ("train", "unseen"):
        suite_values[role] = {name: {"sources": {source.name: [name]}} for name in tasks[role]}
    return suite_from(suite_values, path.stem, where, {**known, source.name: source}), source


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
        if not isinstance(names, list) or not names:
            raise ValueError(f"files of {split} in {where} is {names!r}: give a list of paths")
        found[split] = tuple(str(folder / name) for name in names)
        if missing := [name for name in found[split] if not Path(name).is_file()]:
            raise ValueError(f"files of {split} in {where} names {missing[0]}, which is no file")
    return found


def _reader(fields: Mapping[str, str], scorer: str, values: Mapping[str, Any]):
    scoring_info = {"scorer": scorer}
    for key in ("relative_tolerance", "unit"):
        if key in values:
            scoring_info[key] = values[key]
    hint = str(values.get("instruction") or "").strip()

    def read(row: Row, subset: str) -> Item | None:
        def value(name: str) -> str:
            content = row.get(fields.get(name, ""))
            return "" if content is None else str(content).strip()

        prompt, answer, response = value("prompt"), value("answer"), value("response")
        if not prompt or not answer:
            return None
        level = int(float(value("level"))) if value("level") else None
        if scorer == "choice":
            return _read_choice(prompt, answer, response, row[fields["choices"]], level)
        form = _FORMS.get(scorer)
        instruction = " ".join(part for part in (hint, form or INSTRUCTION) if part)
        # A response that already ends with the answer in a form that scores stays as it is.
        verdict = scoring.judge(response, answer, scoring_info)
        if not (verdict.formatted and verdict.correct):
            ending = {"boxed": rf"\boxed{{{answer}}}", "gsm8k": f"#### {answer}"}.get(scorer, answer_line(answer))
            response = f"{response}\n{ending}".strip()
        return Item(
            question=prompt,
            prompt=f"{prompt}\n{instruction}" if form else asking(prompt, hint),
            response=response,
            answer=answer,
            scoring=scoring_info,
            level=level,
            group=value("group"),
        )

    return read


def _read_choice(prompt: str, answer: str, response: str, choices: Any, level: int | None) -> Item | None:
    """The answer may be a letter or the text of an option."""
    try:
        options = [str(option) for option in (json.loads(choices) if isinstance(choices, str) else choices)]
    except (TypeError, ValueError):
        return None
    letter = scoring.chosen_letter(answer, options) if options else None
    return None if letter is None else multiple_choice(prompt, options, letter, level=level, reasoning=response)
