"""One evaluation's answers and losses, read from its files; and whether two of them may be compared item by item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import create_model

from metasft.config.result_files import (
    RESULTS_SUFFIX,
    CellLine,
    Prediction,
    find_file,
    read_lines,
    read_settings,
)
from metasft.config.schema import Count

SPEED_SUFFIX = "_speed.json"
# What of the settings is the protocol: every key that begins like this, and these. Where the optimizer and its rate
# come from does not matter once they are equal.
_PROTOCOL_PREFIX = "adaptation_"
_PROTOCOL_KEYS = (
    *("protocol", "decoding", "max_new_tokens", "max_length", "dtype", "chat_template_sha256"),
    "chat_template_kwargs",
)
_NOT_PROTOCOL = ("adaptation_origin",)
_CHOSEN = tuple(f"adaptation_{key}" for key in ("optimizer", "lr", "steps", "by_shots", "factor"))
"""What a search chooses: no difference in protocol where both sides searched alike."""

Place = tuple[str, int]
"""(task, shot count), or (task, update steps) of a speed curve."""


@dataclass(frozen=True)
class Evaluation:
    """One finished evaluation.

    Attributes:
        label: name in the comparison.
        path: its results file.
        settings: content of ``<model_type>_settings.json``.
        correct: place -> run -> example_id -> whether the answer was right.
        losses: place -> run -> nats per response token of the test set.
        shots: place -> run -> example_ids adapted on.
    """

    label: str
    path: Path
    settings: Mapping[str, Any]
    correct: Mapping[Place, Mapping[int, Mapping[str, bool]]]
    losses: Mapping[Place, Mapping[int, float]]
    shots: Mapping[Place, Mapping[int, Sequence[str]]]


def read_evaluation(label: str, path: Path, *, speed: bool = False) -> Evaluation:
    """Read a result folder (or the ``<model type>_results.json`` in it) of ``evaluate_few_shot.py``.

    Args:
        speed: the curve over update steps (``<model type>_speed.json``) instead.

    Raises:
        ValueError: a file is missing or of another format, or the evaluation is unfinished.
    """
    suffix = SPEED_SUFFIX if speed else RESULTS_SUFFIX
    results = find_file(label, path, suffix, "run evaluate_few_shot.py to the end")
    stem = results.name.removesuffix(".json" if speed else suffix)
    files = {
        name: results.with_name(f"{stem}_{name}") for name in ("settings.json", "predictions.jsonl", "cells.jsonl")
    }
    for file in files.values():
        if not file.is_file():
            raise ValueError(f"results of {label}: {file} does not exist: run evaluate_few_shot.py again")
    try:
        correct, losses, shots = _read_cells(files, "step" if speed else "n_shots")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"results of {label} in {results.parent} are unfinished or of another format ({error}): run "
            "evaluate_few_shot.py again"
        ) from error
    if not correct:
        raise ValueError(f"results of {label}: {files['predictions.jsonl']} is empty: run evaluate_few_shot.py again")
    return Evaluation(label, results, read_settings(files["settings.json"]), correct, losses, shots)


def _read_cells(files: Mapping[str, Path], by: str) -> tuple[dict, dict, dict]:
    correct: dict[Place, dict[int, dict[str, bool]]] = {}
    losses: dict[Place, dict[int, float]] = {}
    shots: dict[Place, dict[int, list[str]]] = {}
    for line in read_lines(files["predictions.jsonl"], _with(by, Prediction)):
        run = correct.setdefault((line["task"], line[by]), {}).setdefault(line["run"], {})
        if line["example_id"] in run:
            raise ValueError(f"item {line['example_id']} is there twice in run {line['run']}")
        run[line["example_id"]] = line["correct"]
    for line in read_lines(files["cells.jsonl"], _with(by, CellLine)):
        place, run = (line["task"], line[by]), line["run"]
        losses.setdefault(place, {})[run] = line["loss"]
        shots.setdefault(place, {})[run] = line["shots"]
        found = len(correct.get(place, {}).get(run, {}))
        if found != line["n_test"]:
            raise ValueError(f"{found} predictions for the {line['n_test']} items of {place}, run {run}")
    for place, runs in correct.items():
        if set(runs) != set(losses.get(place, {})):
            raise ValueError(f"{place} is unfinished")
    return correct, losses, shots


def _with(by: str, kind: type) -> type:
    return create_model(kind.__name__, __base__=kind, **{by: (Count, ...)})


# ---- may they be paired? --------------------------------------------------------------------------------------------


def check_pairing(a: Evaluation, b: Evaluation, *, allow_different_protocol: bool = False) -> list[str]:
    """What a reader of the comparison has to know; the places to compare are those that both have.

    Raises:
        ValueError: items, data files, shot sets or (unless allowed) the adaptation protocol differ, naming what.
    """
    common = set(a.correct) & set(b.correct)
    if not common:
        raise ValueError(
            f"{a.label} and {b.label} have no task and shot count in common: evaluate both with the same --eval-tasks "
            "and --n-shots"
        )
    _check_data(a, b, {task for task, _ in common})
    for place in sorted(common):
        _check_place(a, b, place)
    notes = []
    keys = [key for key in {**a.settings, **b.settings} if key.startswith(_PROTOCOL_PREFIX) or key in _PROTOCOL_KEYS]
    left_out = {*_NOT_PROTOCOL, *(_CHOSEN if _searched_alike(a, b) else ())}
    values = [(key, a.settings.get(key), b.settings.get(key)) for key in keys if key not in left_out]
    different = "; ".join(f"{key}: {x!r} and {y!r}" for key, x, y in values if x != y)
    if different and not allow_different_protocol:
        raise ValueError(
            f"the adaptation protocol of {a.label} and {b.label} differs ({different}): evaluate both with the same "
            "--adaptation-* and --chat-template* flags, or pass --allow-different-protocol to compare them all the same"
        )
    if different:
        notes.append(f"The adaptation protocol differs between {a.label} and {b.label}: {different}.")
    bases = [e.settings.get("base_model") for e in (a, b)]
    if None not in bases and bases[0] != bases[1]:
        notes.append(f"The base models differ: {bases[0]} and {bases[1]}.")
    for one, other in ((a, b), (b, a)):
        alone = sorted(set(one.correct) - set(other.correct))
        if alone:
            listed = ", ".join(f"{task} at {n} shots" for task, n in alone)
            notes.append(f"Only {one.label} was evaluated on {listed}: left out.")
    return notes


def _searched_alike(a: Evaluation, b: Evaluation) -> bool:
    """Whether both chose from as many trials on the same tasks."""
    searches = [e.settings.get("search") or {} for e in (a, b)]
    one, other = ({key: value for key, value in found.items() if key != "choice"} for found in searches)
    return bool(one) and one == other


def _check_data(a: Evaluation, b: Evaluation, tasks: set[str]) -> None:
    hashes = [e.settings.get("data_sha256") for e in (a, b)]
    for evaluation, found in zip((a, b), hashes, strict=True):
        if not isinstance(found, dict) or not found:
            raise ValueError(
                f"the settings of {evaluation.label} hold no data_sha256, so that nobody knows whether the data were "
                "the same: run evaluate_few_shot.py again"
            )
    for file in sorted(set(hashes[0]) & set(hashes[1])):
        if hashes[0][file] != hashes[1][file] and any(file.startswith(f"{task}_") for task in tasks):
            raise ValueError(
                f"the data of {a.label} and {b.label} differ: {file} has SHA-256 {hashes[0][file][:12]}... and "
                f"{hashes[1][file][:12]}...: evaluate both on the same --data-dir"
            )


def _check_place(a: Evaluation, b: Evaluation, place: Place) -> None:
    where = f"{place[0]} at {place[1]} shots"
    runs = [sorted(e.correct[place]) for e in (a, b)]
    if runs[0] != runs[1]:
        raise ValueError(
            f"{where}: {a.label} has {len(runs[0])} runs (shot sets), {b.label} has {len(runs[1])}: evaluate both with "
            "the same --n-runs"
        )
    for run in runs[0]:
        ours, theirs = (set(e.correct[place][run]) for e in (a, b))
        if ours != theirs:
            raise ValueError(
                f"{where}: the test items differ ({len(ours)} of {a.label}, {len(theirs)} of {b.label}, "
                f"{len(ours & theirs)} in common; run {run}): evaluate both with the same --limit and --data-dir"
            )
        if list(a.shots[place][run]) != list(b.shots[place][run]):
            raise ValueError(
                f"{where}: {a.label} and {b.label} adapted on different shots in run {run} (seed "
                f"{a.settings.get('seed')} and {b.settings.get('seed')}): evaluate both with the same --seed"
            )
