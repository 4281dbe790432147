"""Good inputs of every script in a folder of their own, ready to be spoilt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from few_shot_data import save_random_adapter, write_training_tasks, write_unseen_tasks
from safetensors.torch import load_file, save_file
from script_runner import ROOT

TRAINERS = {
    "meta_lora": ("meta_lora_trainer.py", "config_meta_lora_guide"),
    "fomaml": ("maml_sft_trainer.py", "config_fomaml_math_science"),
    "reptile": ("reptile_sft_trainer.py", "config_reptile_math_science"),
    "lora_ml": ("lora_ml_trainer.py", "config_lora_ml"),
}
SCRIPTS = {
    "prepare": "prepare_math_science_data.py",
    "evaluate": "evaluate_few_shot.py",
    "compare": "compare_methods.py",
    "experiments": "run_experiments.py",
    **{name: script for name, (script, _) in TRAINERS.items()},
}
OUTPUT = "out"
"""Where a script is told to write, below the folder that it runs in."""
SUPPORT, QUERY = "tasks/add_support.parquet", "tasks/add_query.parquet"
POOL = "data/meta_test/calculus_support.parquet"
ADAPTER = "adapter/adapter_step_7"
FROM_ADAPTER = f"model.lora_adapter_path={ADAPTER}"


def arguments_of(program: str) -> list[str]:
    """A command line that works on the files of :func:`make_inputs`, in a second or two."""
    if program in TRAINERS:
        settings = {
            "model.path": "model",
            "meta.task_dir": "tasks",
            "meta.support_samples": 24,
            "meta.num_inner_steps": 2,
            "trainer.total_training_steps": 1,
            "trainer.default_local_dir": OUTPUT,
            **({"model.lora_rank": 4} if program == "meta_lora" else {}),
            **({"model.lora_rank": 4, "meta.task_lora_rank": 1} if program == "lora_ml" else {}),
        }
        where = ["--config-path", str(ROOT / "data/math_science_meta"), "--config-name", TRAINERS[program][1]]
        return [*where, *(f"{key}={value}" for key, value in settings.items())]
    return {
        "prepare": ["--output-dir", f"{OUTPUT}/data", "--samples-per-task", "20", "--tasks", "algebra", "calculus"],
        "evaluate": [
            *("--model-type", "base", "--model-path", "model", "--data-dir", "data", "--output-dir", OUTPUT),
            *("--n-shots", "0", "2", "--n-runs", "1", "--adaptation-steps", "2", "--max-new-tokens", "4"),
        ],
        "compare": ["--output", f"{OUTPUT}/figure.png", "--table", f"{OUTPUT}/table.md"],
        "experiments": ["--suite", "suite.yaml", "--scale", "scale.yaml", "--output-dir", OUTPUT],
    }[program]


def make_inputs(folder: Path, tiny_model: Path, task_dir: Path) -> Path:
    """Everything that the scripts read, made once. Returns ``folder``.

    ``model`` is read up to its weights without complaint, and these do not fit it: a check that is made before the
    model is loaded speaks first, and one that is made too late never speaks. ``good_model`` is the whole one.
    """
    folder.mkdir()
    shutil.copytree(tiny_model, folder / "good_model")
    shutil.copytree(tiny_model, folder / "model")
    weights = folder / "model" / "model.safetensors"
    save_file({name: torch.zeros(3, 3) for name in load_file(weights)}, weights, metadata={"format": "pt"})
    shutil.copytree(task_dir, folder / "tasks")
    write_training_tasks(write_unseen_tasks(folder / "data"))
    (folder / "adapter").mkdir()
    save_random_adapter(folder / "adapter", folder / "good_model")
    for name in ("one", "other"):
        _write_results(folder / "results" / name)
    mapping = {
        "title": "Sums",
        "files": ["rows.jsonl"],
        "fields": {"prompt": "question", "answer": "result"},
        "scorer": "number",
        "train": ["sums"],
        "sizes": {"samples_per_task": 20},
    }
    write_yaml(folder / "mapping.yaml", mapping)
    rows = [{"question": f"What is {n} plus {n * n}?", "result": n + n * n} for n in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copyfile(ROOT / "data/experiments/two_stage.yaml", folder / "suite.yaml")
    shutil.copyfile(ROOT / "data/experiments/scales/smoke.yaml", folder / "scale.yaml")
    return folder


def _write_results(folder: Path, model_type: str = "base") -> None:
    """A finished evaluation: one task, 0 and 5 shots, four test items."""
    folder.mkdir(parents=True)
    entry = {"accuracy_mean": 0.5, "accuracy_std": 0.0, "ci95": [0.2, 0.8], "n_runs": 1, "n_test": 4, "loss_mean": 1.0}
    places = [{"task": "calculus", "n_shots": n, "run": 0} for n in (0, 5)]
    predictions = [{**p, "example_id": f"calculus-{i}", "correct": i < 2} for p in places for i in range(4)]
    cells = [{**p, "n_test": 4, "loss": 1.0, "shots": [f"s{i}" for i in range(p["n_shots"])]} for p in places]
    write_json(folder / f"{model_type}_results.json", {"calculus": {"0": entry, "5": entry}})
    write_json(folder / f"{model_type}_settings.json", {"seed": 1, "data_sha256": {"calculus_test.parquet": "aa"}})
    for name, lines in (("predictions", predictions), ("cells", cells)):
        (folder / f"{model_type}_{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


# ---- spoiling -------------------------------------------------------------------------------------------------------


def write_yaml(path: Path, content: Any) -> None:
    path.write_text(yaml.safe_dump(content), encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def change_json(path: Path, **changes: Any) -> None:
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **changes})


def cut_off(path: Path, share: float = 0.5) -> None:
    """Keep the head of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def rows_of(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def change_row(path: Path, number: int, **changes: Any) -> None:
    """Other values in one row of a parquet file."""
    rows = rows_of(path)
    rows[number] = {**rows[number], **changes}
    write_rows(path, rows)


def change_turn(path: Path, number: int, turn: int, **changes: Any) -> None:
    """Another role or content in one turn of one row of a parquet file."""
    messages = rows_of(path)[number]["messages"]
    messages[turn] = {**messages[turn], **changes}
    change_row(path, number, messages=messages)
