"""evaluate_few_shot.py as users run it: result files, continuing, and refusals that cost no model."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys

import pytest
from few_shot_data import (
    ADAPTATION,
    save_random_adapter,
    write_training_tasks,
    write_unseen_tasks,
    write_validation_tasks,
)
from script_runner import ROOT, must_run, run_script, script_environment

KEYS = {
    "accuracy_mean", "accuracy_lenient", "truncated_share", "accuracy_std", "accuracy_worst", "ci95", "n_runs",
    "n_test", "loss_mean", "format_accuracy", "majority_baseline", "trivial_baseline", "adapt_steps", "adapt_seconds",
}  # fmt: skip
PREDICTION_KEYS = {
    "task", "n_shots", "run", "example_id", "prompt", "gold", "output", "extracted", "correct", "formatted",
    "correct_lenient", "truncated", "loss", "tokens",
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


def in_process(script, *arguments):
    """The exit code, for runs where a fresh interpreter would only cost its start."""
    import evaluate_few_shot

    assert script == "evaluate_few_shot.py"
    return evaluate_few_shot.main([str(argument) for argument in arguments])


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


@pytest.fixture(scope="module")
def whole_run(adapter, data_dir, tmp_path_factory):
    """Search, in-domain task and speed curve in one go."""
    write_training_tasks(data_dir)
    folder = tmp_path_factory.mktemp("whole")
    arguments = (
        *flags("meta_lora", adapter, data_dir, folder, "--search-adaptation", "--search-limit", "3"),
        "--speed-steps", "0", "1", "3", "--speed-shots", "5",
    )  # fmt: skip
    arguments = [*arguments, "--eval-tasks", "logic", "harder"]  # the last one counts
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert in_process(*arguments) == 0
    return folder, arguments, printed.getvalue()


def test_the_searched_rate_is_the_one_that_adapts(whole_run):
    folder, _, _ = whole_run
    found, settings = read(folder / "meta_lora_search.json"), read(folder / "meta_lora_settings.json")
    assert found["settings"]["tasks"] == ["easy"]  # harder is under evaluation
    assert list(found["choice"]) == list(found["losses"]) == ["2", "5"]
    chosen = {}
    for shots, choice in found["choice"].items():
        assert len(found["losses"][shots]) == len(found["settings"]["grid"])
        best = min((loss, name) for name, loss in found["mean"][shots].items() if loss is not None)[1]
        chosen[shots] = f"{choice['optimizer']} {choice['lr']:g}, {choice['steps']} steps"
        assert chosen[shots] == best
    assert settings["adaptation_origin"] == "search on training tasks"
    assert (settings["search"]["choice"], settings["search"]["trials_per_shot_count"]) == (found["choice"], 7)
    if len(set(chosen.values())) > 1:
        assert settings["adaptation_by_shots"] == chosen
    else:
        lr, steps = settings["adaptation_lr"], settings["adaptation_steps"]
        assert f"{settings['adaptation_optimizer']} {lr:g}, {steps} steps" == chosen["2"]


def test_a_choice_on_search_tasks_serves_another_evaluation(adapter, tiny_model, tmp_path, capsys):
    """Reported on validation tasks, searched on those of the other role, and adapted alike by an arm that follows."""
    data = write_validation_tasks(tmp_path / "data", {"one": "search", "two": "valid", "three": "valid"})

    def arguments(name, *more):
        common = flags("meta_lora", adapter, data, tmp_path / name, "--split", "valid", *more)
        at = common.index("--eval-tasks")
        return *common[:at], *common[at + 3 :]

    assert in_process(*arguments("first", "--search-adaptation", "--search-limit", "2")) == 0
    chosen = tmp_path / "first" / "meta_lora_search.json"
    assert in_process(*arguments("second", "--adaptation-settings", chosen)) == 0
    first, second = (read(tmp_path / name / "meta_lora_settings.json") for name in ("first", "second"))
    assert (first["split"], first["eval_tasks"], first["search"]["tasks"]) == ("valid", ["three", "two"], ["one"])
    assert first["adaptation_origin"] == "search on search tasks"
    assert {k: v for k, v in first.items() if k != "tokens"} == {k: v for k, v in second.items() if k != "tokens"}
    results = [without_times(read(tmp_path / name / "meta_lora_results.json")) for name in ("first", "second")]
    assert results[0] == results[1]
    capsys.readouterr()
    assert in_process(*arguments("first", "--split", "search", "--adaptation-settings", chosen)) == 2
    assert "other settings (split: 'valid' there, 'search' now)" in capsys.readouterr().err
    assert in_process(*arguments("third", "--adaptation-settings", tmp_path / "none.json")) == 2
    assert "none.json" in capsys.readouterr().err


def test_training_tasks_are_tested_in_domain(whole_run):
    folder, _, _ = whole_run
    assert read(folder / "meta_lora_settings.json")["domain"] == {"logic": "unseen", "harder": "in_domain"}
    cells = read_lines(folder / "meta_lora_cells.jsonl")
    assert {shot for cell in cells if cell["task"] == "harder" for shot in cell["shots"]} <= {
        f"harder-{i}" for i in range(30)
    }


def test_the_speed_curve_has_the_documented_form(whole_run):
    folder, _, printed = whole_run
    curve, results = read(folder / "meta_lora_speed.json"), read(folder / "meta_lora_results.json")
    assert list(curve) == ["logic", "harder"]
    for task, by_steps in curve.items():
        assert list(by_steps) == ["0", "1", "3"]
        for steps, entry in by_steps.items():
            assert entry.keys() == KEYS
            assert (entry["n_runs"], entry["n_test"], entry["adapt_steps"]) == (2, 5, int(steps))
        # Its ends are cells of the evaluation: no shots, and 5 shots after the same 3 steps.
        for steps, shots in (("0", "0"), ("3", "5")):
            assert by_steps[steps]["loss_mean"] == pytest.approx(results[task][shots]["loss_mean"], rel=1e-5)
            assert by_steps[steps]["accuracy_mean"] == results[task][shots]["accuracy_mean"]
    assert "meta_lora_speed.json" in printed


def test_search_and_speed_curve_continue(whole_run, tmp_path, capsys):
    """Cut off in both, each keeps what is finished; the search is not run again, and a lost point is measured anew."""
    folder, arguments, _ = whole_run
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "meta_lora_speed.json").unlink()
    whole = (folder / "meta_lora_speed_cells.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "meta_lora_speed_cells.jsonl").write_text("".join(whole[:7]) + whole[7][:9])
    found = read(tmp_path / "meta_lora_search.json")
    again = [tmp_path if argument == folder else argument for argument in arguments]
    assert in_process(*again) == 0
    assert "searching" not in capsys.readouterr().err
    assert read(tmp_path / "meta_lora_search.json") == found
    assert read_lines(tmp_path / "meta_lora_speed_cells.jsonl")[:7] == [json.loads(line) for line in whole[:7]]
    ours, theirs = read(tmp_path / "meta_lora_speed.json"), read(folder / "meta_lora_speed.json")
    for task, by_steps in theirs.items():
        for steps, entry in by_steps.items():
            assert ours[task][steps]["loss_mean"] == pytest.approx(entry["loss_mean"], rel=1e-5)


def test_shots_in_the_prompt(tiny_model, data_dir, tmp_path, capsys):
    assert in_process(*flags("base", tiny_model, data_dir, tmp_path, "--shots-in-prompt")) == 0
    settings, results = read(tmp_path / "base_settings.json"), read(tmp_path / "base_results.json")
    assert (settings["protocol"], settings["adapts"]) == ("in_context", "nothing: the shots are in the prompt")
    for by_shots in results.values():
        assert [(n, entry["n_runs"], entry["adapt_steps"]) for n, entry in by_shots.items()] == [
            ("0", 1, 0),
            ("2", 2, 0),
            ("5", 2, 0),
        ]
        assert len({entry["loss_mean"] for entry in by_shots.values()}) == 3
    assert in_process(*flags("base", tiny_model, data_dir, tmp_path)) == 2
    assert "other settings (" in capsys.readouterr().err


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
            shares = {
                "format_accuracy": "formatted",
                "accuracy_lenient": "correct_lenient",
                "truncated_share": "truncated",
            }
            for share, key in shares.items():
                assert entry[share] == pytest.approx(sum(p[key] for p in chosen) / len(chosen))
            runs = [[p for p in chosen if p["run"] == run] for run in range(entry["n_runs"])]
            losses = [sum(p["loss"] * p["tokens"] for p in run) / sum(p["tokens"] for p in run) for run in runs]
            assert entry["loss_mean"] == pytest.approx(sum(losses) / len(losses))


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
    assert in_process(*flags("meta_lora", adapter, data_dir, folder)) == 0
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
    assert in_process(*flags("meta_lora", adapter, data_dir, tmp_path)) == 0
    cells, again = read_lines(folder / "meta_lora_cells.jsonl"), read_lines(tmp_path / "meta_lora_cells.jsonl")
    assert again[:3] == cells[:3]
    assert [c["adapt_seconds"] for c in again[3:]] != [c["adapt_seconds"] for c in cells[3:]]
    # The cells of the second run were batched otherwise: their losses agree up to rounding.
    ours, whole = (read_lines(place / "meta_lora_predictions.jsonl") for place in (tmp_path, folder))
    losses = [[line.pop("loss") for line in lines] for lines in (ours, whole)]
    assert ours == whole and losses[0] == pytest.approx(losses[1], rel=1e-5)
    ours, whole = (read(place / "meta_lora_results.json") for place in (tmp_path, folder))
    for task, by_shots in whole.items():
        for shots, entry in by_shots.items():
            assert ours[task][shots].pop("loss_mean") == pytest.approx(entry["loss_mean"], rel=1e-5)
            del entry["loss_mean"]
    assert without_times(ours) == without_times(whole)


def test_other_settings_do_not_mix_with_finished_cells(run, adapter, data_dir, capsys):
    folder, _ = run
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert in_process(*flags("meta_lora", adapter, data_dir, folder, "--seed", "2")) == 2
    printed = capsys.readouterr().err
    assert "other settings (seed: 1 there, 2 now)" in printed
    assert len(printed.splitlines()) == 1
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize("model_type", ["base", "fomaml"])
def test_whole_models(model_type, tiny_model, data_dir, tmp_path):
    """They share the folder: every model type has its own files."""
    assert in_process(*flags(model_type, tiny_model, data_dir, tmp_path, "--adaptation-lr", "0.01")) == 0
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
        "--n-runs=0": [*good, "--n-runs", "0"],
        "--device='tpu'": [*good, "--device", "tpu"],
        "only --model-type base adapts a fresh LoRA": [*good, "--model-type", "fomaml", "--lora-rank", "8"],
        "--cells-per-batch=0": [*good, "--cells-per-batch", "0"],
        "--speed-only needs --speed-steps": [*good, "--speed-only"],
        "exclude each other": [*good, "--shots-in-prompt", "--adaptation-lr", "1"],
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
