"""A run on a GPU: which parts there are, what its table says, and how its results reach docs/performance.md."""

import json
import time

import pytest
from script_runner import ROOT

from benchmarks import bench, gpu_run
from benchmarks.arms import WORKLOADS, Settings, ratio, spread
from benchmarks.sections.common import TOGETHER
from benchmarks.sections.inner_step import cells
from metasft.reporting import performance as report

SPREAD = spread([1.0, 1.0])
RATIO = ratio([2.0, 2.0], [1.0, 1.0])


# --------------------------------------------------------------------------------------------------------------- cells


def settings(**changes):
    return Settings(model="a-model", task_dir="tasks", **changes)


def test_a_gpu_measures_up_to_64_tasks_and_a_cpu_16():
    on_cpu, on_gpu = (cells(settings(device=device, largest_cell=65536)) for device in ("cpu", "cuda"))
    assert set(on_cpu) < set(on_gpu)
    assert set(on_gpu) - set(on_cpu) == {(tasks, tokens) for tasks in (32, 64) for tokens in (16, 64, 256, 1024)}
    assert on_gpu[0] == (1, 16) and on_gpu[-1] == (64, 1024)
    assert TOGETHER == ["meta.task_batch_limit=64"]


def test_cells_of_chosen_token_counts():
    chosen = cells(settings(device="cuda", largest_cell=65536, token_counts=[256]))
    assert chosen == [(tasks, 256) for tasks in (1, 2, 4, 8, 16, 32, 64)]
    assert cells(settings(token_counts=[32])) == [(4, 32)]
    assert cells(settings(largest_cell=2048, token_counts=[1024])) == [(1, 1024), (2, 1024)]
    assert cells(settings(quick=True)) == [(2, 16), (2, 64)]
    assert cells(settings(quick=True, token_counts=[256])) == [(2, 256)]


# --------------------------------------------------------------------------------------------------------------- parts


def test_an_inner_step_is_a_part_per_token_count_and_dtype():
    named = [part for part in gpu_run.PARTS if part.startswith("inner_step")]
    assert named == [f"inner_step_{tokens}.{dtype}" for tokens in (16, 32, 64, 256, 1024) for dtype in ("bf16", "fp32")]
    assert set(WORKLOADS) == {16, 32, 64, 256, 1024}


def test_the_part_hands_its_token_count_on(tmp_path, monkeypatch):
    jobs = []

    def finish(run, *words, **_):
        jobs.append(json.loads(words[-2].read_text()))
        words[-1].write_text(json.dumps({"result": {"cells": []}}))

    monkeypatch.setattr(gpu_run.Run, "command", finish)
    run = a_run(tmp_path, part="inner_step_256.bf16", model=tmp_path, task_dir=tmp_path)
    assert gpu_run.PARTS["inner_step_256.bf16"](run) == {"cells": []}
    assert Settings(**jobs[0]).token_counts == [256] and Settings(**jobs[0]).largest_cell == 65536
    assert jobs[0]["threads"] == run.circumstances()["threads"]


def test_hidden_rules_come_last_and_only_with_a_model(tmp_path, capsys):
    rules = ["rules.seed1", "rules.seed2", "rules.seed3"]
    assert list(gpu_run.PARTS)[-3:] == rules
    assert gpu_run.choose_parts(None, model=tmp_path) == list(gpu_run.PARTS)
    assert gpu_run.choose_parts(None, model=None) == list(gpu_run.PARTS)[:-3]
    assert capsys.readouterr().out == ""
    assert gpu_run.choose_parts(["rules.seed2", "gradients"], model=None) == ["gradients"]
    assert capsys.readouterr().out == "gpu_run: not run, for want of --model: rules.seed2\n"


def a_run(folder, **changes):
    fixed = {"output": folder, "device": "cpu", "tiny": False, "model": None, "task_dir": None}
    return gpu_run.Run(**{**fixed, "part_seconds": 300.0, "ends": time.monotonic() + 300, **changes})


def report_with(status):
    score = {"task": "all", "shots": 5, "accuracy": 0.25}
    return {
        "arms": {arm: {"label": arm, "status": status, "scores": [score], "cost": {}} for arm in gpu_run.RULES_ARMS}
    }


@pytest.mark.parametrize(("device", "tiny", "scale"), [("cpu", False, "cpu"), ("cpu", True, "smoke")])
def test_hidden_rules_run_as_an_experiment(tmp_path, monkeypatch, device, tiny, scale):
    def finish(run, *words, **how):
        words = list(map(str, words))
        assert words[:6] == ["run_experiments.py", "--suite", "rules", "--scale", scale, "--seeds"] and words[6] == "2"
        assert words[words.index("--model") + 1] == str(tmp_path) and how["resumes"]
        place = run.output / "rules_seed2" / "report"
        place.mkdir(parents=True)
        (place / "report.json").write_text(json.dumps(report_with("measured")))

    monkeypatch.setattr(gpu_run.Run, "command", finish)
    found = gpu_run.PARTS["rules.seed2"](a_run(tmp_path, device=device, tiny=tiny, model=tmp_path))
    assert found["folder"] == str(tmp_path / "rules_seed2") and set(found["arms"]) == set(gpu_run.RULES_ARMS)
    assert found["arms"]["rules_base"]["scores"] == [{"task": "all", "shots": 5, "accuracy": 0.25}]


def test_an_experiment_that_failed_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run.Run, "command", lambda *_, **__: 1)
    run = a_run(tmp_path, model=tmp_path, part="rules.seed2")
    (tmp_path / "rules.seed2.log").write_text("more\nno disk\n")
    with pytest.raises(gpu_run.Failed, match="exit code 1: no disk"):
        gpu_run.PARTS["rules.seed2"](run)
    place = tmp_path / "rules_seed2" / "report"
    place.mkdir(parents=True)
    (place / "report.json").write_text(json.dumps(report_with("missing: a run failed")))
    with pytest.raises(gpu_run.Failed, match="rules_base: missing: a run failed"):
        gpu_run.PARTS["rules.seed2"](run)


def test_on_a_gpu_trainings_and_evaluations_of_the_experiment_have_it(tmp_path):
    from metasft.experiments.suites import read_scale

    scale, shipped = read_scale(str(gpu_run._scale(a_run(tmp_path, device="cuda")))), read_scale("cpu")
    runs = scale.runs
    assert (runs.prepare.gpus, runs.train.gpus, runs.train_lora.gpus, runs.evaluate.gpus) == (0, 1, 1, 1)
    same = {"name", "title", "runs"}
    assert scale.model_dump(exclude=same) == shipped.model_dump(exclude=same)


def test_an_experiment_is_asked_to_end_and_goes_on_later(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "LEAVING_SECONDS", 20)
    notes = tmp_path / "notes"
    script = (
        "import pathlib, signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(notes)!r}).write_text('saved'), sys.exit(1)))\n"
        f"pathlib.Path({str(notes)!r}).write_text('begun')\ntime.sleep(60)"
    )
    run = a_run(tmp_path, part="rules.seed1", part_seconds=23.0, began=time.monotonic())
    with pytest.raises(gpu_run.OutOfTime):
        run.command("-c", script, resumes=True)
    assert notes.read_text() == "saved"


# --------------------------------------------------------------------------------------------------------------- table


def put(folder, part, result, **changes):
    record = {"part": part, "device": "cuda", "tiny": False, "state": "finished", "seconds": 1.0}
    record |= {"model": "random weights", "task_dir": "random words", "threads": 8, "seed": 1, "repeats": 5}
    record |= {"started": "2026-01-02T03:04:05+00:00", "result": result, **changes}
    (folder / f"{part}.json").write_text(json.dumps(record))


def test_the_table_has_the_scores_of_hidden_rules(tmp_path):
    def arm(label, *accuracies):
        scores = [
            {"task": "all", "shots": n, "accuracy": a} for n, a in zip((0, 5, "all > 0"), accuracies, strict=True)
        ]
        return {
            "label": label,
            "status": "measured",
            "scores": [{"task": "upper", "shots": 0, "accuracy": 1.0}, *scores],
        }

    for seed in (1, 2):
        arms = {"rules_base": arm("Fresh LoRA", 0.0, 0.5, 0.55), "rules_meta_lora": arm("META-LORA", 0.125, 0.625, 0.7)}
        put(tmp_path, f"rules.seed{seed}", {"folder": "there", "arms": arms})
    table = gpu_run.table(tmp_path)
    assert (
        "| part | arm | accuracy, shots: 0 | accuracy, shots: 5 | accuracy, shots: all > 0 |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| rules.seed1 | Fresh LoRA | 0.0% | 50.0% | 55.0% |\n"
        "| rules.seed1 | META-LORA | 12.5% | 62.5% | 70.0% |\n"
        "| rules.seed2 | Fresh LoRA | 0.0% |"
    ) in table
    put(tmp_path, "rules.seed1", None, state="cut short")
    assert "rules.seed1 | Fresh" not in gpu_run.table(tmp_path) and "| rules.seed1 | cut short |" in gpu_run.table(
        tmp_path
    )


def test_the_table_has_the_cells_of_every_token_count(tmp_path):
    for tokens in (16, 1024):
        put(tmp_path, f"inner_step_{tokens}.bf16", {"rank": 16, "cells": [cell(64, tokens)]})
    table = gpu_run.table(tmp_path)
    assert "| inner_step_16.bf16 | one_at_a_time, T = 64, 16 tokens |" in table
    assert "| inner_step_1024.bf16 | batched, T = 64, 1024 tokens |" in table


# ------------------------------------------------------------------------------------------------------------- take in

VERSIONS = {"torch": "2.11.0", "transformers": "5.10.4", "peft": "0.21.2", "verl": "0.9.0", "ray": "2.60.0"}
MACHINE = {"python": "3.11.7", "cores": 16, "versions": VERSIONS, "gpus": [{"name": "A GPU", "capability": [9, 0]}]}
PEAKS = {"before_model_bytes": 0, "loading_peak_bytes": 2**20, "training_peak_bytes": 2**21, "peak_bytes": 2**21}
SIZE = {"tasks": 4, "inner_steps": 2, "batch": 4, "support_samples": 100}


def cell(tasks, tokens):
    arms = ("batched", "one_at_a_time", "peft_layers")
    return {
        "tasks": tasks,
        "tokens": tokens,
        "examples": 1,
        "length": tokens,
        "seconds": dict.fromkeys(arms, SPREAD),
        "tokens_per_second": dict.fromkeys(arms, 100.0),
        "ratio": dict.fromkeys(arms[1:], RATIO),
        "faster_sequential": "one_at_a_time",
        "gradient_checks": [{"relative_difference": 1e-6}],
        "flops_per_token": 1e9,
    }


def meta_step():
    return {
        "tasks": 4,
        "inner_steps": 5,
        "examples": 4,
        "tokens": 2000.0,
        "seconds": {"batched": SPREAD, "one_at_a_time": SPREAD, "peft_loop": SPREAD},
        "tokens_per_second": dict.fromkeys(("batched", "one_at_a_time", "peft_loop"), 2000.0),
        "ratio": {"one_at_a_time": RATIO, "peft_loop": RATIO},
        "fastest_loop": "peft_loop",
        "flops_per_token": {"batched": 1e9, "peft_loop": 2e9},
        "gradient_checks": [{"arms": ["batched", "one_at_a_time"], "relative_difference": 1e-6, "tolerance": None}],
    }


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    put(folder, "environment", MACHINE)
    put(folder, "meta_step.bf16", meta_step())
    put(folder, "inner_step_16.bf16", {"rank": 16, "cells": [cell(1, 16), cell(64, 16)]})
    put(folder, "inner_step_1024.bf16", {"rank": 16, "cells": [cell(64, 1024)]}, started="2026-01-05T00:00:00+00:00")
    for arm in ("meta_lora_bf16", "fomaml_bf16_autocast"):
        put(folder, f"memory.{arm}", {**SIZE, **PEAKS})
    put(folder, "meta_step_05b.bf16", meta_step())
    put(folder, "memory_05b.meta_lora_bf16", {**SIZE, **PEAKS})
    put(folder, "meta_step.fp32", None, state="failed")
    put(folder, "fomaml.fp32", {}, device="cpu")
    put(folder, "fomaml.bf16", {}, tiny=True)
    put(folder, "gradients", {})
    return folder


def test_a_run_is_taken_into_the_page(folder, tmp_path):
    output = tmp_path / "docs" / "performance.md"
    assert bench.main(["--take-in", str(folder), "--output", str(output)]) == 0
    results = json.loads(output.with_suffix(".json").read_text())
    assert {section: list(kinds["cuda"]) for section, kinds in results.items()} == {
        "inner_step": ["bf16"],
        "peft_loop": ["bf16"],
        "memory": ["any"],
    }
    assert results["peft_loop"]["cuda"]["bf16"] == {
        "date": "2026-01-02",
        "device_name": "A GPU",
        "cores": 16,
        "threads": 8,
        "seed": 1,
        "repeats": 5,
        "quick": False,
        "model": "random weights in the shape of SmolLM2-135M",
        "tasks": "random words",
        "python": "3.11.7",
        "versions": {"torch": "2.11.0", "transformers": "5.10.4", "peft": "0.21.2", "verl": "0.9.0"},
        "command": "python benchmarks/gpu_run.py --parts meta_step.bf16",
        "result": json.loads(json.dumps(meta_step())),
    }
    steps = results["inner_step"]["cuda"]["bf16"]
    assert sorted((c["tasks"], c["tokens"]) for c in steps["result"]["cells"]) == [(1, 16), (64, 16), (64, 1024)]
    assert steps["date"] == "2026-01-05"
    assert results["memory"]["cuda"]["any"]["result"] == {
        **SIZE,
        "rank": 16,
        "lean": {},
        "arms": {"fomaml_bf16_autocast": PEAKS, "meta_lora_bf16": PEAKS},
    }
    text = output.read_text()
    assert (
        "**GPU, bf16**" in text
        and "| 64 | 1024 | 1 of 1024 |" in text
        and "| fomaml bf16 autocast | 2 | 2 | 2 |" in text
    )
    assert "A GPU, 16 cores | 8 | 1 | random weights in the shape of SmolLM2-135M, random words |" in text
    assert "`python benchmarks/gpu_run.py --parts inner_step_1024.bf16 inner_step_16.bf16`" in text


def test_what_was_measured_on_a_cpu_is_kept(folder, tmp_path):
    output = tmp_path / "performance.md"
    kept = {"peft_loop": {"cpu": {"bf16": {"not_measured": "a reason", "quick": False, "date": "2026-01-01"}}}}
    kept["peft_loop"]["cpu"]["bf16"] |= {"device_name": "a CPU", "cores": 2, "threads": 1, "seed": 1, "repeats": 2}
    kept["peft_loop"]["cpu"]["bf16"] |= {"model": "a-model", "python": "3.11", "versions": {"torch": "2.13.0"}}
    output.with_suffix(".json").write_text(json.dumps(kept))
    assert bench.main(["--take-in", str(folder), "--output", str(output)]) == 0
    results = json.loads(output.with_suffix(".json").read_text())
    assert results["peft_loop"]["cpu"] == kept["peft_loop"]["cpu"] and "bf16" in results["peft_loop"]["cuda"]


@pytest.mark.parametrize(("part", "section"), [("meta_step.fp32", "peft_loop"), ("fomaml.bf16", "fomaml")])
def test_sections_have_the_form_of_those_of_the_benchmark(folder, tmp_path, part, section):
    published = report.read(ROOT / "docs" / "performance.md")[section]["cpu"][part.partition(".")[2]]["result"]
    put(folder, part, published)
    output = tmp_path / "performance.md"
    assert bench.main(["--take-in", str(folder), "--output", str(output)]) == 0
    assert f"**GPU, {part.partition('.')[2]}**" in output.read_text()
    assert report.read(output)[section]["cuda"][part.partition(".")[2]]["result"] == published


def test_a_real_model_and_its_data_are_named(folder, tmp_path):
    put(folder, "meta_step.bf16", meta_step(), model="/there/a-model", task_dir="/there/meta_train")
    output = tmp_path / "performance.md"
    assert bench.main(["--take-in", str(folder), "--output", str(output)]) == 0
    entry = json.loads(output.with_suffix(".json").read_text())["peft_loop"]["cuda"]["bf16"]
    assert (entry["model"], entry["tasks"]) == ("a-model", "meta_train")
    assert entry["command"].endswith("--parts meta_step.bf16 --model a-model --task-dir meta_train")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: [file.unlink() for file in f.iterdir()],
            "which holds no environment.json of a finished run on a GPU",
        ),
        (lambda f: put(f, "environment", MACHINE, device="cpu"), "which holds no environment.json"),
        (lambda f: [x.unlink() for x in f.iterdir() if "environment" not in x.name], "which holds no measurement of"),
        (lambda f: (f / "fomaml.bf16.json").write_text("{"), "fomaml.bf16.json is not readable JSON"),
        (lambda f: put(f, "inner_step_64.bf16", {}, threads=4), "inner_step_64.bf16 with 4: remove one"),
    ],
)
def test_an_unusable_folder_ends_in_one_line(folder, tmp_path, capsys, spoil, message):
    spoil(folder)
    output = tmp_path / "performance.md"
    assert bench.main(["--take-in", str(folder), "--output", str(output)]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1
    assert not output.exists()
