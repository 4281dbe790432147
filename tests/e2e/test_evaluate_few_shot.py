"""evaluate_few_shot.py as users run it: result files, continuing, and refusals that cost no model."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from few_shot_data import ADAPTATION, save_random_adapter, write_unseen_tasks
from script_runner import ROOT, must_run, run_script, script_environment

KEYS = {
    "accuracy_mean", "accuracy_std", "ci95", "n_runs", "n_test",
    "loss_mean", "format_accuracy", "majority_baseline", "adapt_steps", "adapt_seconds",
}  # fmt: skip
PREDICTION_KEYS = {
    "task", "n_shots", "run", "example_id", "prompt", "gold", "output", "extracted", "correct", "formatted",
}  # fmt: skip


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_unseen_tasks(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_model):
    return save_random_adapter(tmp_path_factory.mktemp("adapter"), tiny_model)


def flags(model_type, path, data_dir, folder, *more):
    return (
        "evaluate_few_shot.py", "--model-path", path, "--model-type", model_type, "--eval-tasks", "calculus", "logic",
        "--n-shots", "0", "2", "5", "--n-runs", "2", "--limit", "5", "--max-new-tokens", "8", "--adaptation-steps", "3",
        "--data-dir", data_dir, "--output-dir", folder, *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(adapter, data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    return folder, must_run(*flags("meta_lora", adapter, data_dir, folder))


def read(path):
    return json.loads(path.read_text())


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(results):
    return {
        task: {n: {k: v for k, v in entry.items() if k != "adapt_seconds"} for n, entry in by_shots.items()}
        for task, by_shots in results.items()
    }


def test_results_have_the_documented_form(run):
    folder, _ = run
    results = read(folder / "meta_lora_results.json")
    assert list(results) == ["calculus", "logic"]
    for by_shots in results.values():
        assert list(by_shots) == ["0", "2", "5"]
        for shots, entry in by_shots.items():
            assert entry.keys() == KEYS
            assert entry["n_test"] == 5
            assert (entry["n_runs"], entry["adapt_steps"]) == ((1, 0) if shots == "0" else (2, 3))
            assert 0 <= entry["ci95"][0] <= entry["accuracy_mean"] <= entry["ci95"][1] <= 1
            assert (entry["adapt_seconds"] > 0) == (shots != "0")
            assert entry["loss_mean"] > 0


def test_predictions_cover_the_same_items_in_every_cell(run):
    folder, _ = run
    predictions = read_lines(folder / "meta_lora_predictions.jsonl")
    assert all(line.keys() == PREDICTION_KEYS for line in predictions)
    cells = {}
    for line in predictions:
        cells.setdefault((line["task"], line["n_shots"], line["run"]), []).append(line["example_id"])
    assert len(cells) == 10  # two tasks, one run at 0 shots and two at 2 and 5
    for (task, _, _), items in cells.items():
        assert items == [f"{task}-{100 + i}" for i in range(5)]


def test_results_can_be_recomputed_from_the_predictions(run):
    folder, _ = run
    results, predictions = read(folder / "meta_lora_results.json"), read_lines(folder / "meta_lora_predictions.jsonl")
    for task, by_shots in results.items():
        for shots, entry in by_shots.items():
            chosen = [p for p in predictions if (p["task"], str(p["n_shots"])) == (task, shots)]
            assert entry["accuracy_mean"] == pytest.approx(sum(p["correct"] for p in chosen) / len(chosen))
            assert entry["format_accuracy"] == pytest.approx(sum(p["formatted"] for p in chosen) / len(chosen))


def test_shots_are_nested_and_never_test_items(run):
    folder, _ = run
    cells = {(c["task"], c["n_shots"], c["run"]): c["shots"] for c in read_lines(folder / "meta_lora_cells.jsonl")}
    tested = {p["example_id"] for p in read_lines(folder / "meta_lora_predictions.jsonl")}
    for (task, n_shots, number), shots in cells.items():
        assert len(set(shots)) == n_shots
        assert shots == cells[task, 5, number][:n_shots]
        assert not tested & set(shots)


def test_settings_say_what_was_adapted_and_how(run, adapter, tiny_model):
    settings = read(run[0] / "meta_lora_settings.json")
    assert (settings["model_path"], settings["base_model"]) == (str(adapter), str(tiny_model))
    assert settings["adapts"] == "LoRA of the checkpoint, r=4"
    recorded = (ADAPTATION["inner_optimizer"], ADAPTATION["inner_lr"], "checkpoint")
    names = ("adaptation_optimizer", "adaptation_lr", "adaptation_origin")
    assert tuple(settings[name] for name in names) == recorded
    assert settings["trained_parameters"] > 0


def test_output_names_the_files_and_shows_the_accuracies(run):
    _, finished = run
    for name in ("meta_lora_results.json", "meta_lora_settings.json", "meta_lora_predictions.jsonl"):
        assert name in finished.stdout
    assert finished.stdout.count("calculus") >= 3
    assert "Traceback" not in finished.stderr


def test_a_finished_evaluation_is_not_run_again(run, adapter, data_dir):
    folder, _ = run
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    (folder / "meta_lora_results.json").unlink()
    must_run(*flags("meta_lora", adapter, data_dir, folder))
    # The seconds of the adaptations are measured anew by every run: equal ones mean that nothing ran.
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_an_interrupted_evaluation_continues(run, adapter, data_dir, tmp_path):
    """Cut off in the middle of the fourth cell, it keeps three and ends with the results of an uninterrupted run."""
    folder, _ = run
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "meta_lora_results.json").unlink()
    for name, kept in (("meta_lora_cells.jsonl", 3), ("meta_lora_predictions.jsonl", 17)):
        whole = (folder / name).read_text().splitlines(keepends=True)
        (tmp_path / name).write_text("".join(whole[:kept]) + whole[kept][:20])
    must_run(*flags("meta_lora", adapter, data_dir, tmp_path))
    cells, again = read_lines(folder / "meta_lora_cells.jsonl"), read_lines(tmp_path / "meta_lora_cells.jsonl")
    assert again[:3] == cells[:3]
    assert [c["adapt_seconds"] for c in again[3:]] != [c["adapt_seconds"] for c in cells[3:]]
    assert read_lines(tmp_path / "meta_lora_predictions.jsonl") == read_lines(folder / "meta_lora_predictions.jsonl")
    assert without_times(read(tmp_path / "meta_lora_results.json")) == without_times(
        read(folder / "meta_lora_results.json")
    )


def test_other_settings_do_not_mix_with_finished_cells(run, adapter, data_dir):
    folder, _ = run
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    refused = run_script(*flags("meta_lora", adapter, data_dir, folder, "--seed", "2"))
    assert refused.returncode == 2
    assert "other settings (seed: 1 there, 2 now)" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize("model_type", ["base", "fomaml"])
def test_whole_models(model_type, tiny_model, data_dir, tmp_path):
    """They share the folder: every model type has its own files."""
    must_run(*flags(model_type, tiny_model, data_dir, tmp_path, "--adaptation-lr", "0.01"))
    results = read(tmp_path / f"{model_type}_results.json")
    settings = read(tmp_path / f"{model_type}_settings.json")
    assert settings["adapts"] == ("fresh LoRA r=16 alpha=32" if model_type == "base" else "all parameters")
    assert results["calculus"]["5"]["loss_mean"] < results["calculus"]["0"]["loss_mean"]


def test_errors_that_need_no_model_come_before_torch(tiny_model, adapter, data_dir, tmp_path):
    """Each is one line and exit code 2, and none of them has imported what takes seconds."""
    good = list(map(str, flags("base", tiny_model, data_dir, tmp_path / "out")))[1:]
    wrong = {
        "--n-shots asks for 50 shots": [*good, "--n-shots", "0", "50"],
        "--eval-tasks names algebra": [*good, "--eval-tasks", "algebra"],
        "--data-dir is": [*good, "--data-dir", str(tmp_path)],
        "does not exist": [*good, "--model-path", str(tmp_path / "nowhere")],
        "--model-type base takes a Hugging Face model folder": [*good, "--model-path", str(adapter)],
        "--model-type meta_lora takes": [*good, "--model-type", "meta_lora"],
        "--n-runs is 0": [*good, "--n-runs", "0"],
        "--device is 'tpu'": [*good, "--device", "tpu"],
        "only --model-type base adapts a fresh LoRA": [*good, "--model-type", "fomaml", "--lora-rank", "8"],
    }
    program = (
        "import contextlib, io, json, sys\n"
        "import evaluate_few_shot\n"
        "outcomes = []\n"
        "for arguments in json.loads(sys.stdin.read()):\n"
        "    stderr = io.StringIO()\n"
        "    with contextlib.redirect_stderr(stderr):\n"
        "        code = evaluate_few_shot.main(arguments)\n"
        "    outcomes.append([code, stderr.getvalue()])\n"
        "heavy = sorted({'torch', 'transformers', 'peft', 'verl'} & set(sys.modules))\n"
        "print(json.dumps([heavy, outcomes]))\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(list(wrong.values())),
        cwd=ROOT,
        env=script_environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    heavy, outcomes = json.loads(finished.stdout)
    assert heavy == []
    for message, (code, stderr) in zip(wrong, outcomes, strict=True):
        assert code == 2
        assert message in stderr
        assert len(stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_help_is_quick_and_a_wrong_choice_is_an_error():
    shown = must_run("evaluate_few_shot.py", "--help", timeout=20)
    assert "--adaptation-steps" in shown.stdout
    refused = run_script("evaluate_few_shot.py", "--model-type", "maml")
    assert refused.returncode == 2
    assert "invalid choice: 'maml'" in refused.stderr
