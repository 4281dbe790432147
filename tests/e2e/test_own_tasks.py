"""71 tasks of one's own, as JSON Lines files, through every script: data, all methods, evaluation, comparison."""

from __future__ import annotations

import json

import pytest
import yaml
from experiment_files import SCALE, write_scale, write_suite
from script_runner import must_run
from tiny_model import build_tiny_model

SIZES = {"train": 51, "search": 4, "valid": 8, "unseen": 8}


def write_tasks(folder):
    """Task i: the number that comes i + 1 after the one in the question. Returns the mapping file."""
    names, roles = iter(range(sum(SIZES.values()))), {}
    for role, count in SIZES.items():
        roles[role] = [f"plus_{next(names) + 1:02}" for _ in range(count)]
    for task in (task for tasks in roles.values() for task in tasks):
        step = int(task[-2:])
        rows = [{"prompt": f"What is {step} after {n}?", "response": str(n + step)} for n in range(100, 136)]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [f"{task}.jsonl" for tasks in roles.values() for task in tasks]
    sizes = {"samples_per_task": 30, "support_ratio": 0.5, "query_ratio": 0.25, "test_samples": 6, "shot_pool": 25}
    mapping = folder / "mine.yaml"
    mapping.write_text(yaml.safe_dump({"title": "Sums", "files": files, **roles, "sizes": sizes}))
    return mapping


@pytest.mark.slow
def test_71_tasks_of_ones_own(tmp_path):
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    data = {"source": "local", "mapping": str(write_tasks(tasks)), "in_context": 3}
    small = {"meta.support_samples": 12}
    shots = {"evaluate": {"shots_in_prompt": True}}
    alike = {"overrides": {"data.train_batch_size": 4}, "trains_like": {"arm": "meta_lora"}}
    arms = {
        "base": {"label": "Base", "method": "base"},
        "full": {"label": "Full", "method": "base", "evaluate": {"full": True}},
        "in_context": {"label": "In context", "method": "base", **shots},
        "meta_lora": {"label": "META-LORA", "method": "meta_lora", "overrides": small},
        "fomaml": {"label": "FOMAML", "method": "fomaml", "overrides": small},
        "reptile": {"label": "Reptile", "method": "reptile", "overrides": small},
        "single": {"label": "One task", "method": "lora_single", "tasks": ["plus_01"]},
        "mixed": {"label": "Mixed", "method": "lora_mixed_all", **alike},
        "metaicl": {"label": "MetaICL", "method": "metaicl", **alike, **shots},
    }
    evaluate = {"split": "valid", "eval_tasks": [], "search_adaptation": True, "search_grid": ["adamw:1e-3"]}
    pair = [{"a": "meta_lora", "b": "base", "margin": 0.03}]
    suite = write_suite(tmp_path, arms, name="sums", data=data, evaluate=evaluate, comparisons=pair)
    shown = {"evaluate/all": {**SCALE["evaluate"]["all"], "n_shots": [0, 2], "n_runs": 1}, "train/lora": {}}
    scale = write_scale(tmp_path, shown, model=build_tiny_model(tmp_path / "model"))
    out = tmp_path / "out"
    must_run("run_experiments.py", "--suite", suite, "--scale", scale, "--output-dir", out, timeout=1500)
    document = json.loads((out / "experiments.json").read_text())
    assert {run["state"] for run in document["runs"].values()} == {"finished"}
    labelled = {name: document["arms"][name]["labelled_examples"] for name in ("meta_lora", "mixed", "metaicl")}
    assert labelled == {"meta_lora": 51 * 20, "mixed": 51 * 23, "metaicl": 51 * 23}
    for arm in arms:
        (results,) = out.glob(f"runs/evaluate-{arm}-*seed1/*_results.json")
        found = json.loads(results.read_text())
        assert list(found) == [f"plus_{number}" for number in range(56, 64)] and set(found["plus_56"]) == {"0", "2"}
    searched = json.loads((out / "runs/evaluate-meta_lora-seed1/meta_lora_search.json").read_text())
    assert searched["settings"]["tasks"] == [f"plus_{number}" for number in range(52, 56)]
    report = json.loads((out / "report/report.json").read_text())
    assert report["problems"] == [] and report["arms"]["meta_lora"]["scores"]
    results = tmp_path / "results"
    results.mkdir()
    for arm in ("meta_lora", "base"):
        (results / arm).symlink_to(out / f"runs/evaluate-{arm}-seed1")
    must_run("compare_methods.py", "--results-dir", results)
    must_run("compare_methods.py", "--paired", results / "meta_lora", results / "base", "--allow-different-protocol")
