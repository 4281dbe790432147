"""The files of an evaluation: written cell by cell, so that an interrupted one continues."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metasft.config.result_files import Place
from metasft.config.schema import AnyNumber, Count, validated
from metasft.evaluation.protocol import Cell
from metasft.files.atomic import replacing_file, write_json
from metasft.files.untrusted import read_json

# What may differ between the run that wrote the finished cells and the run that continues it: how the work was cut up
# and what was measured along the way, not what was evaluated.
_NOT_COMPARED = ("versions", "trained_parameters", "cells_per_batch", "one_at_a_time_because", "tokens")


# What is read again of a line. Unlike what compares methods, it accepts a loss that has left the finite range.
class _Prediction(Place):
    step: Count | None = None
    correct: bool
    correct_lenient: bool
    formatted: bool
    truncated: bool


class _Cell(Place):
    step: Count | None = None
    n_test: Count
    loss: AnyNumber
    adapt_steps: Count
    adapt_seconds: AnyNumber


class ResultStore:
    """The result files of one model type in one folder; knows which cells are finished.

    ``<type>_predictions.jsonl`` and ``<type>_cells.jsonl`` grow by one cell at a time, the line in the cells file last:
    a cell counts as finished when that line is there, so an interruption costs the cells under way and nothing else.

    Args:
        kind: ``results``, or ``speed`` for the files of the speed curve (``<type>_speed.json``, ``<type>_speed_...``).
    """

    def __init__(self, folder: Path, model_type: str, kind: str = "results") -> None:
        self.folder = folder
        stem = model_type if kind == "results" else f"{model_type}_{kind}"
        self.results_path = folder / f"{model_type}_{kind}.json"
        self.settings_path = folder / f"{stem}_settings.json"
        self.predictions_path = folder / f"{stem}_predictions.jsonl"
        self.cells_path = folder / f"{stem}_cells.jsonl"
        self.cells: dict[Cell, dict[str, Any]] = {}
        self.predictions: dict[Cell, list[dict[str, Any]]] = {}

    def open(self, settings: Mapping[str, Any], *, overwrite: bool) -> None:
        """Continue what earlier runs with the same settings left, or start afresh.

        Raises:
            ValueError: the folder holds results made with other settings, or cannot be written.
        """
        files = (self.results_path, self.settings_path, self.predictions_path, self.cells_path)
        remedy = "give another --output-dir, or --overwrite to start again"
        kept = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if overwrite:
                for file in files:
                    file.unlink(missing_ok=True)
            elif any(file.exists() for file in files):
                kept = self._check_settings(settings, remedy)
                self._read_finished(remedy)
            write_json(self.settings_path, {**settings, **kept})
        except OSError as error:
            raise ValueError(f"--output-dir is {self.folder}, which cannot be used ({error}): {remedy}") from error

    def _check_settings(self, settings: Mapping[str, Any], remedy: str) -> dict[str, Any]:
        """What the settings file knows beyond ``settings``: figures that only a loaded model gives."""
        if not self.settings_path.is_file():
            raise ValueError(f"{self.folder} holds results without {self.settings_path.name}: {remedy}")
        earlier = read_json(self.settings_path, remedy)
        current = json.loads(json.dumps(settings))
        keys = [k for k in {**earlier, **current} if k not in _NOT_COMPARED and earlier.get(k) != current.get(k)]
        if keys:
            key = keys[0]
            raise ValueError(
                f"{self.folder} holds results made with other settings ({key}: {earlier.get(key)!r} there, "
                f"{current.get(key)!r} now): {remedy}"
            )
        return {key: value for key, value in earlier.items() if key not in current}

    def _read_finished(self, remedy: str) -> None:
        predictions: dict[Cell, list[dict[str, Any]]] = {}
        for line in _read_lines(self.predictions_path, _Prediction, remedy):
            predictions.setdefault(_cell_of(line), []).append(line)
        for record in _read_lines(self.cells_path, _Cell, remedy):
            cell = _cell_of(record)
            if len(predictions.get(cell, ())) == record["n_test"]:
                self.cells[cell], self.predictions[cell] = record, predictions[cell]
        # What an interrupted cell left behind would be there twice after it ran again.
        _write_lines(self.predictions_path, [line for cell in self.cells for line in self.predictions[cell]])
        _write_lines(self.cells_path, list(self.cells.values()))

    def add(self, record: dict[str, Any], predictions: list[dict[str, Any]]) -> None:
        """Append one finished cell."""
        _append_lines(self.predictions_path, predictions)
        _append_lines(self.cells_path, [record])
        cell = _cell_of(record)
        self.cells[cell], self.predictions[cell] = record, predictions


def _cell_of(line: Mapping[str, Any]) -> Cell:
    return Cell(line["task"], line["n_shots"], line["run"], line.get("step"))


def _read_lines(path: Path, kind: type[Place], remedy: str) -> list[dict[str, Any]]:
    """The JSON lines of a file; the last one may have been cut off by an interruption, within a character too.

    Raises:
        ValueError: another line is damaged.
    """
    if not path.is_file():
        return []
    complete = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is empty or cut off
    lines = []
    for number, encoded in enumerate(complete, 1):
        try:
            lines.append(json.loads(encoded.decode("utf-8")))
            validated(kind, lines[-1])
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} line {number} is damaged: {remedy}") from error
    return lines


def _write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    with replacing_file(path) as temporary:
        temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def _append_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())
