"""What a run of ``benchmarks/gpu_run.py`` measured, as entries of docs/performance.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_run import RANDOM_WEIGHTS, RANDOM_WORDS
from benchmarks.sections.common import RANK

Record = Mapping[str, Any]

SECTIONS = {"meta_step": "peft_loop", "fomaml": "fomaml", "update_rule": "update_rule", "top_layers": "top_layers"}
"""Part, without its dtype -> section of one part."""

ALIKE = ("threads", "seed", "repeats", "model", "task_dir")
"""What all parts of a section must have been measured with."""


def read_entries(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(section, dtype) -> entry, from the finished parts of a run on a GPU that was no rehearsal.

    Raises:
        ValueError: there are none, a file is damaged, or parts of one section were measured with different settings.
    """
    records = _finished(folder)
    machine = records.pop("environment", None)
    sections: dict[tuple[str, str], dict[str, Record]] = {}
    for name, record in records.items():
        if (place := _place(name)) is not None:
            sections.setdefault(place, {})[name] = record
    if machine is None or not sections:
        raise ValueError(
            f"--take-in is {folder}, which holds no {'environment.json' if machine is None else 'measurement'} of a "
            "finished run on a GPU: give the output folder of benchmarks/gpu_run.py"
        )
    return {
        place: {**_circumstances(parts, machine["result"]), "result": _result(place[0], parts)}
        for place, parts in sections.items()
    }


def _finished(folder: Path) -> dict[str, Record]:
    records = {}
    for file in sorted(folder.glob("*.json")):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            raise ValueError(f"--take-in: {file} is not readable JSON: remove it, and run that part again") from None
        if (
            isinstance(record, dict)
            and record.get("state") == "finished"
            and record["device"] == "cuda"
            and not record["tiny"]
        ):
            records[file.stem] = record
    return records


def _place(part: str) -> tuple[str, str] | None:
    """Section and dtype of a part; None: it has no place on the page."""
    kind, _, detail = part.partition(".")
    if kind == "memory":
        return kind, "any"
    if kind.startswith("inner_step"):
        return "inner_step", detail
    return (SECTIONS[kind], detail) if kind in SECTIONS else None


def _circumstances(parts: Mapping[str, Record], machine: Mapping[str, Any]) -> dict[str, Any]:
    first, *others = parts
    for key in ALIKE:
        for name in others:
            if parts[name].get(key) != parts[first].get(key):
                raise ValueError(
                    f"--take-in: {first} was measured with {key}={parts[first].get(key)}, {name} with "
                    f"{parts[name].get(key)}: remove one of their files, and run that part again"
                )
    measured = parts[first]
    if missing := [key for key in ALIKE if key not in measured]:
        raise ValueError(f"--take-in: {first} does not say {', '.join(missing)}: remove its file, and run it again")
    flags = "".join(
        f" --{key.replace('_', '-')} {Path(measured[key]).name}"
        for key, other in (("model", RANDOM_WEIGHTS), ("task_dir", RANDOM_WORDS))
        if measured[key] != other
    )
    return {
        "date": max(record["started"] for record in parts.values())[:10],
        "device_name": machine["gpus"][0]["name"],
        "cores": machine["cores"],
        **{key: measured[key] for key in ("threads", "seed", "repeats")},
        "quick": False,
        "model": f"{RANDOM_WEIGHTS} in the shape of SmolLM2-135M"
        if measured["model"] == RANDOM_WEIGHTS
        else Path(measured["model"]).name,
        "tasks": Path(measured["task_dir"]).name,
        "python": machine["python"],
        "versions": {name: machine["versions"][name] for name in ("torch", "transformers", "peft", "verl")},
        "command": f"python benchmarks/gpu_run.py --parts {' '.join(parts)}{flags}",
    }


def _result(section: str, parts: Mapping[str, Record]) -> dict[str, Any]:
    results: Sequence[dict[str, Any]] = [record["result"] for record in parts.values()]
    if section == "inner_step":
        return {"rank": results[0]["rank"], "cells": [cell for result in results for cell in result["cells"]]}
    if section == "memory":
        settings = {key: results[0][key] for key in ("tasks", "inner_steps", "batch", "support_samples")}
        peaks = {
            name.removeprefix("memory."): {key: value for key, value in result.items() if key not in settings}
            for name, result in zip(parts, results, strict=True)
        }
        return {**settings, "rank": RANK, "lean": {}, "arms": peaks}
    return results[0]
