"""``benchmarks/gpu_run.py`` rehearsed on a CPU: parts, resuming, limits, and the pieces for an offline machine."""

from __future__ import annotations

import json
import os

import pytest
from script_runner import must_run, run_script

from benchmarks import gpu_run

SCRIPT = ("benchmarks/gpu_run.py", "--device", "cpu", "--tiny")


def record(folder, part):
    return json.loads((folder / f"{part}.json").read_text())


@pytest.mark.slow
def test_finished_parts_are_skipped_and_failed_ones_tried_again(tiny_model, task_dir, tmp_path):
    out, parts = tmp_path / "out", ("--parts", "tests_products", "memory.meta_lora_fp32")
    (tmp_path / "no_tasks").mkdir()
    first = run_script(*SCRIPT, "--output", out, *parts, "--model", tiny_model, "--task-dir", tmp_path / "no_tasks")
    assert first.returncode == 1
    assert record(out, "tests_products")["state"] == "finished" and record(out, "tests_products")["result"]["skipped"]
    assert record(out, "memory.meta_lora_fp32")["state"] == "failed"
    assert "no_tasks" in record(out, "memory.meta_lora_fp32")["error"]
    before = (out / "tests_products.json").stat().st_mtime_ns

    again = must_run(
        *SCRIPT, "--output", out, *parts, "--model", tiny_model, "--task-dir", task_dir, "--copy-to", tmp_path / "copy"
    )
    assert "tests_products" not in again.stdout
    assert (out / "tests_products.json").stat().st_mtime_ns == before
    assert record(out, "memory.meta_lora_fp32")["result"]["peak_bytes"] > 50e6
    assert {"tests_products.json", "memory.meta_lora_fp32.log", "table.md"} <= set(os.listdir(tmp_path / "copy"))
    table = (out / "table.md").read_text()
    assert "# A rehearsal on a CPU" in table and "| memory.meta_lora_fp32 | finished |" in table


@pytest.mark.slow
def test_the_budget_ends_a_part_which_is_then_left(tmp_path, monkeypatch):
    """Whatever it has started ends with it."""

    def sleep(run):
        run.command("-c", f"open({str(tmp_path / 'pid')!r}, 'w').write(str(__import__('os').getpid())); {SLEEP}")

    monkeypatch.setitem(gpu_run.PARTS, "environment", sleep)
    monkeypatch.setattr(gpu_run, "LEAST_SECONDS", 1)
    assert (
        gpu_run.main(["--device", "cpu", "--output", str(tmp_path), "--parts", "environment", "--budget-seconds", "3"])
        == 0
    )
    assert record(tmp_path, "environment")["state"] == "cut short"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    limit = ("--part-seconds", "3", "--budget-seconds", "100")
    assert gpu_run.main(["--device", "cpu", "--output", str(tmp_path), "--parts", "environment", *limit]) == 1
    assert record(tmp_path, "environment")["error"] == "it took longer than 3 seconds"


SLEEP = "__import__('time').sleep(60)"


def test_pieces_become_the_folder_again(tmp_path):
    folder, there = tmp_path / "a model", tmp_path / "there"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "weights").write_bytes(os.urandom(100_000))
    there.mkdir()
    gpu_run.cut(folder, there / "model.tar", 30_000)
    pieces = sorted(os.listdir(there))
    assert pieces == [f"model.tar.{n:02d}" for n in range(len(pieces))] and len(pieces) == 4
    assert all((there / piece).stat().st_size <= 30_000 for piece in pieces)
    gpu_run.unpack(there)
    assert (there / "model" / "deep" / "weights").read_bytes() == (folder / "deep" / "weights").read_bytes()


@pytest.mark.slow
def test_every_part_runs(tmp_path):
    """Random weights and words, as on a machine that has nothing else."""
    must_run(*SCRIPT, "--output", tmp_path, timeout=1800)
    states = {part: record(tmp_path, part)["state"] for part in gpu_run.choose_parts(None, model=None)}
    assert set(states.values()) == {"finished"}, states
    errors = record(tmp_path, "gradients")["result"]
    assert all(errors[case]["relative_error"] < 1e-5 for case in errors if "fp32" in case)
    table = (tmp_path / "table.md").read_text()
    assert "| meta_step.fp32 | peft_loop |" in table and "| memory_05b.fomaml_bf16_autocast |" in table
