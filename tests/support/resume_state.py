"""Comparing what runs leave behind: bit for bit, and complete at any moment."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

TIMES = ("perf/step_seconds", "perf/peak_memory_gb", "perf/tokens_per_second", "valid/seconds")


def same(a, b) -> bool:
    """Whether two nested values are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        a, b = getattr(a, "_local_tensor", a), getattr(b, "_local_tensor", b)
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without those that measure the machine."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def saved_step(folder: Path) -> int:
    """The meta-step in charge, 0 before the first save."""
    tracker = folder / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.exists() else 0


def read_state(folder: Path, step: int) -> dict:
    """Every tensor file of a resume state; raises where one is torn."""
    state = folder / f"global_step_{step}"
    return {file.name: torch.load(file, weights_only=False) for file in sorted(state.glob("*.pt"))}


def read_exports(folder: Path) -> dict:
    """Every export that has its final name; raises where one is torn."""
    found = {file.name: torch.load(file, weights_only=True) for file in folder.glob("*_checkpoint_step_*.pt")}
    for entry in [*folder.glob("adapter_step_*"), *folder.glob("step_*")]:
        (weights,) = entry.glob("*model.safetensors")
        found[entry.name] = load_file(weights)
        for rates in entry.rglob("*rates.safetensors"):
            found[entry.name] |= {f"rate of {name}": rate for name, rate in load_file(rates).items()}
        for file in entry.glob("*.json"):
            json.loads(file.read_text())
        assert (entry / "adaptation.json").exists(), entry
    return found


def assert_complete(folder: Path) -> None:
    """Whatever has a final name in a run's folder is whole: states, exports, the tracker file and what it names."""
    for state in folder.glob("global_step_*"):
        layout = json.loads((state / "layout.json").read_text())
        on_disk = {str(f.relative_to(state)): f.stat().st_size for f in state.rglob("*") if f.is_file()}
        del on_disk["layout.json"]
        assert layout["files"] == on_disk, state
    read_exports(folder)
    if saved_step(folder):
        assert read_state(folder, saved_step(folder))


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, optimizer, schedule, position in every stream, random states, exports and metrics are equal."""
    step = saved_step(one)
    assert saved_step(other) == step
    a, b = read_state(one, step), read_state(other, step)
    assert a.keys() == b.keys() and len(a) >= 4
    assert [name for name in a if not same(a[name], b[name])] == []
    a, b = read_exports(one), read_exports(other)
    last = [name for name in a if name.partition(".")[0].endswith(f"step_{step}")]
    assert last and all(same(a[name], b[name]) for name in last)
    assert metrics(one) == metrics(other)
    summaries = [json.loads((folder / "run_summary.json").read_text()) for folder in (one, other)]
    assert len({(s["meta_steps"], s["tokens"], s["checkpoint_bytes"]) for s in summaries}) == 1
    assert not list(other.glob(".*.partial"))
