"""A suite of own data and embedded tasks through the scripts as they are: prepared, trained, evaluated, compared."""

from __future__ import annotations

import json

import pandas as pd
import yaml
from script_runner import must_run

SUITE = {
    "title": "Doubling and number theory; tripling and logic unseen",
    "licence": "ours",
    "files": ["own.csv"],
    "fields": {"prompt": "question", "answer": "result", "task": "topic"},
    "scorer": "number",
    "train": {
        "doubling": {"sources": {"own": ["doubling"]}},
        "number_theory": {"sources": {"reasoning_gym": ["number_theory"]}},
    },
    "unseen": {
        "tripling": {"sources": {"own": ["tripling"]}},
        "theorem_proving": {"sources": {"reasoning_gym": ["theorem_proving"]}},
    },
    "sizes": {"samples_per_task": 20, "support_ratio": 0.4, "query_ratio": 0.3, "test_samples": 4, "shot_pool": 4},
}


def test_a_mixed_suite_is_trained_evaluated_and_compared(tiny_model, tmp_path):
    rows = [
        {"question": f"{topic} of {number}?", "result": factor * number, "topic": topic}
        for topic, factor in (("doubling", 2), ("tripling", 3))
        for number in range(30)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "own.csv", index=False)
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(SUITE))
    data, run, results = tmp_path / "data" / "mixed", tmp_path / "run", tmp_path / "results" / "meta_lora"
    must_run("prepare_math_science_data.py", "--mapping", tmp_path / "own.yaml", "--output-dir", data)

    must_run(
        "meta_lora_trainer.py", "--config-path", "data/math_science_meta", "--config-name", "config_meta_lora_guide",
        f"model.path={tiny_model}", f"meta.task_dir={data / 'meta_train'}", "meta.support_samples=8",
        "meta.num_inner_steps=2", "model.lora_rank=4", "model.lora_alpha=8", "trainer.total_training_steps=1",
        f"trainer.default_local_dir={run}",
    )  # fmt: skip
    metrics = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert {name for name in metrics if name.startswith("meta/query_loss_after/")} == {
        f"meta/query_loss_after/{task}" for task in SUITE["train"]
    }

    must_run(
        "evaluate_few_shot.py", "--model-type", "meta_lora", "--model-path", run / "meta_lora_checkpoint_step_1.pt",
        "--data-dir", data, "--eval-tasks", *SUITE["unseen"], "--n-shots", "0", "2", "--n-runs", "1",
        "--max-new-tokens", "4", "--adaptation-steps", "2", "--output-dir", results,
    )  # fmt: skip
    measured = json.loads((results / "meta_lora_results.json").read_text())
    assert list(measured) == list(SUITE["unseen"])
    assert all(entry["n_test"] == 4 for by_shots in measured.values() for entry in by_shots.values())

    table = tmp_path / "comparison.md"
    must_run(
        "compare_methods.py", "--results-dir", tmp_path / "results", "--checkpoints-dir", tmp_path,
        "--output", tmp_path / "comparison.png", "--table", table,
    )  # fmt: skip
    assert all(task in table.read_text() for task in SUITE["unseen"])
