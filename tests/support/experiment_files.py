"""Suites and scales of experiments for tests: small ones as YAML files, and plans made of them without torch."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from metasft.experiments.plan import Plan, make_plan
from metasft.experiments.store import ExperimentStore, finished_searches, known_runs
from metasft.experiments.suites import read_scale, read_suites

REMOVED = object()
"""As a value in place of one of a file: the key is left out."""

RUNS = ("prepare", "train", "train_lora", "evaluate")
SCALE: dict[str, Any] = {
    "title": "Small",
    "seeds": [1],
    "environment": {"OMP_NUM_THREADS": "1"},
    "runs": {group: {"cpus": 1} for group in RUNS},
    "data": {
        "tasks": ["algebra", "number_theory", "calculus"], "support_ratio": 0.45, "query_ratio": 0.25,
        "samples_per_task": 60, "test_samples": 6, "shot_pool": 6,
    },
    "train": {
        "meta_learners": {
            "meta.support_samples": 20, "meta.num_inner_steps": 2, "meta.inner_batch_size": 2,
            "meta.query_batch_size": 2, "meta.meta_batch_size": 2, "trainer.total_training_steps": 1,
            "trainer.save_freq": -1,
        },
        "lora": {"trainer.total_training_steps": 2, "data.train_max_samples": 16},
    },
    "evaluate": {
        "all": {
            "eval_tasks": ["calculus"], "n_shots": [0, 2], "n_runs": 2, "limit": 4, "adaptation_steps": 2,
            "max_new_tokens": 2,
        },
        "lora": {"adaptation_optimizer": "adamw", "adaptation_lr": 1.0e-3},
        "full": {"adaptation_optimizer": "adamw", "adaptation_lr": 1.0e-5},
    },
}  # fmt: skip
META_LORA = {"label": "META-LORA", "method": "meta_lora"}
FOMAML = {"label": "FOMAML", "method": "fomaml"}
BASE = {"label": "Base", "method": "base"}
SINGLE = {"label": "One task", "method": "lora_single", "tasks": ["algebra", "number_theory"]}
MIXED = {"label": "All tasks", "method": "lora_mixed"}
SLOWER = {**META_LORA, "overrides": {"meta.num_inner_steps": 3}}
ARMS = {"a": META_LORA, "f": FOMAML}
SEARCHED = {"a": META_LORA, "b": SLOWER, "f": FOMAML, "base": BASE}
SEARCH = {"evaluate/search": {"limit": 2, "arms": {"meta_lora": "b", "fomaml": "elsewhere"}}}
"""Of the scale of ``SEARCHED``: ``b`` searches for ``a`` too."""


def model_folder(folder: Path) -> Path:
    """What passes for a model until one is loaded. Returns ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    return folder


def write_scale(folder: Path, changes: Mapping[str, Any] | None = None, *, model: Path, name: str = "small") -> Path:
    """Write ``SCALE`` with changes: keys such as ``evaluate/all/n_shots``, values to put there."""
    scale = {**copy.deepcopy(SCALE), "model": str(model)}
    for key, value in (changes or {}).items():
        *groups, last = key.split("/")
        place = scale
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value
        if value is REMOVED:
            del place[last]
    return _write(folder / f"{name}.yaml", scale)


def write_suite(folder: Path, arms: Mapping[str, Any], *, name: str = "try", **more: Any) -> Path:
    suite = {"title": "Try", "question": "Does it work?", "arms": dict(arms), **more}
    return _write(folder / f"{name}.yaml", {key: value for key, value in suite.items() if value is not REMOVED})


def plan_of(folder: Path, arms: Mapping[str, Any], changes: Mapping[str, Any] | None = None, **further: Any) -> Plan:
    """The plan of one suite at ``SCALE`` with changes, in ``folder / "out"``.

    Args:
        further: of :func:`make_plan`.
    """
    suite = write_suite(folder, arms)
    scale = write_scale(folder, changes, model=model_folder(folder / "model"))
    return make_plan(read_suites([str(suite)]), read_scale(str(scale)), folder / "out", **further)


def opened(
    folder: Path,
    arms: Mapping[str, Any] = ARMS,
    changes: Mapping[str, Any] | None = None,
    *,
    retry_failed: bool = False,
    name: str = "try",
) -> ExperimentStore:
    """The store of a plan made with what the folder knows, as ``run_experiments.py`` opens it."""
    out = folder / "out"
    suite = write_suite(folder, arms, name=name)
    scale = write_scale(folder, changes, model=model_folder(folder / "model"))
    plan = make_plan(read_suites([str(suite)]), read_scale(str(scale)), out, known_runs(out), finished_searches(out))
    store = ExperimentStore(plan, ["python", "run_experiments.py"])
    store.open(retry_failed=retry_failed)
    return store


def flag(command: Sequence[str], name: str) -> str:
    """The value of a flag in a command."""
    return command[command.index(name) + 1]


def _write(path: Path, content: Any) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path
