"""One run as a process: what it records, what it measures, and that nothing of it is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from script_runner import ROOT

from metasft.config.records import read_record, write_record
from metasft.experiments.process import END_NOW_FILE, SAVING_SECONDS, _last_lines, _logged, _write_summary
from metasft.experiments.store import locked

PYTHON = sys.executable
PATIENCE = 120  # seconds, for a machine that does much else


def prepare(folder, command, **record):
    """What the runner writes before it hands a run over."""
    entries = {"state": "waiting", "attempts": 0, "environment": {}, "gpus": 0, "summary": None, "results": []}
    write_record(folder, {**entries, "command": list(map(str, command)), **record})
    return [PYTHON, "-m", "metasft.experiments.process", str(folder), str(os.getpid())]


def run(folder, command, **record):
    """Run a command to its end. Returns its record."""
    environment = {**os.environ, "RANK": "3", "MASTER_PORT": "1"}
    subprocess.run(prepare(folder, command, **record), cwd=ROOT, env=environment, check=False, timeout=PATIENCE)
    return read_record(folder)


def started(folder, command, launch=None, **record):
    """A run under way whose script has written its process ids to ``pids``. Returns (process, those of the script)."""
    words = prepare(folder, command, **record)
    process = launch(words) if launch else subprocess.Popen(words, cwd=ROOT)
    wait_for(lambda: (folder / "pids").is_file() and (folder / "pids").read_text().endswith(".\n"))
    script = [psutil.Process(int(pid)) for pid in (folder / "pids").read_text().split()[:-1]]
    assert all(map(alive, script))
    return process, script


def alive(process):
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def wait_for(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def a_tree(folder):
    """A script with a child that has left its session, as a command."""
    return ["sh", "-c", f"setsid sleep 1000 & echo $$ $! . > {folder}/pids; sleep 1000"]


def test_a_run_is_recorded_with_its_log_and_costs(tmp_path):
    code = (
        "import os; block = bytearray(64_000_000); block[::4096] = block[::4096]\n"
        "print(os.getcwd(), os.environ['FLAVOUR'], repr(os.environ['CUDA_VISIBLE_DEVICES']), os.environ.get('RANK'))"
    )
    record = run(tmp_path, ["python", "-c", code], environment={"FLAVOUR": "vanilla"}, attempts=1)
    assert (record["state"], record["returncode"], record["attempts"], record["error"]) == ("finished", 0, 2, None)
    assert 0 < record["seconds"] < PATIENCE and 64e6 < record["peak_memory_bytes"] < 200e6
    assert record["started"] <= record["finished"]
    log = (tmp_path / "log.txt").read_text().splitlines()
    assert log[0].startswith("--- attempt 2, 20") and log[-1] == f"{ROOT} vanilla '' None"


def test_a_failure_is_recorded_with_the_end_of_the_log_of_this_attempt(tmp_path):
    (tmp_path / "log.txt").write_text("of an earlier attempt\n")
    record = run(tmp_path, ["sh", "-c", "seq 100; echo it broke >&2; exit 7"])
    assert (record["state"], record["returncode"]) == ("failed", 7)
    assert record["error"].splitlines() == [*map(str, range(82, 101)), "it broke"]
    assert "of an earlier attempt" in (tmp_path / "log.txt").read_text()
    record = run(tmp_path, ["sh", "-c", "kill -9 $$"])
    assert record["state"] == "failed", "it may have been a lack of memory"
    assert (record["returncode"], record["error"]) == (-9, "exit code -9, nothing was logged")


def test_a_run_that_ends_without_its_results_was_interrupted(tmp_path):
    """As a trainer that saves on SIGTERM does."""
    results = [tmp_path / name for name in ("run_summary.json", "more.json")]
    saving = f"trap 'touch {tmp_path}/saved; exit 0' TERM; echo $$ . > {tmp_path}/pids; while :; do sleep 0.1; done"
    process, (script,) = started(tmp_path, ["sh", "-c", saving], results=list(map(str, results)))
    script.terminate()
    assert process.wait(PATIENCE) == 1 and (tmp_path / "saved").is_file()
    record = read_record(tmp_path)
    assert (record["state"], record["returncode"]) == ("interrupted", 0)
    assert record["error"] == "it ended without run_summary.json"
    record = run(tmp_path, ["touch", results[0]], results=list(map(str, results)))
    assert (record["state"], record["error"]) == ("interrupted", "it ended without more.json")
    record = run(tmp_path, ["touch", results[1]], results=list(map(str, results)))
    assert (record["state"], record["error"]) == ("finished", None)


@pytest.mark.parametrize(
    ("command", "state", "error"),
    [
        ("kill -TERM $$", "interrupted", "it was ended by SIGTERM"),
        # What torchrun says when it is asked to stop itself, and when a worker was while it was not.
        ("echo '...api.SignalException: Process 7 got signal: 15'; exit 1", "interrupted", "it was ended by SIGTERM"),
        ("echo '  traceback : Signal 15 (SIGTERM) received by PID 8'; exit 1", "failed", None),
    ],
)
def test_a_run_that_is_asked_to_stop_was_interrupted(command, state, error, tmp_path):
    record = run(tmp_path, ["sh", "-c", command])
    assert record["state"] == state and (error is None or record["error"] == error)


def test_a_command_that_is_not_there_is_a_failure(tmp_path):
    record = run(tmp_path, ["no-such-program", "--flag"])
    assert (record["state"], record["error"]) == ("failed", "no-such-program: No such file or directory")


def test_a_run_that_ends_leaves_no_process_behind(tmp_path):
    record = run(tmp_path, ["sh", "-c", f"setsid sleep 1000 & echo $! > {tmp_path}/pid"])
    assert record["state"] == "finished"
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_a_run_that_is_stopped_is_interrupted_and_leaves_no_process_behind(tmp_path):
    process, script = started(tmp_path, a_tree(tmp_path))
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 1
    assert not any(map(alive, script))
    record = read_record(tmp_path)
    assert (record["state"], record["attempts"]) == ("interrupted", 1)


def test_a_run_that_is_stopped_while_it_starts_leaves_no_process_behind(tmp_path):
    words = prepare(tmp_path, a_tree(tmp_path))
    changes = f"""
start, pids = subprocess.Popen, Path({str(tmp_path)!r}) / "pids"
def stopped_in(*arguments, **options):
    start(*arguments, **options)
    while not (pids.exists() and pids.read_text().endswith(".\\n")):
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)
subprocess.Popen = stopped_in
"""
    assert subprocess.run(changed(words, changes), cwd=ROOT, check=False, timeout=PATIENCE).returncode == 1
    assert not any(psutil.pid_exists(int(pid)) for pid in (tmp_path / "pids").read_text().split()[:-1])
    assert read_record(tmp_path)["state"] == "interrupted"


def changed(words, changes):
    """The command of :func:`prepare` with lines of Python that run before it, where ``p`` is the module."""
    lines = (
        "import os, signal, subprocess, sys, time",
        "from pathlib import Path",
        "import metasft.experiments.process as p",
        changes,
        "sys.exit(p.main(Path(sys.argv[1]), os.getppid()))",
    )
    return [PYTHON, "-c", "\n".join(lines), words[3]]


def test_a_run_ends_when_its_caller_is_killed(tmp_path):
    """The caller stands for a Ray worker that was killed with its driver."""
    code = (
        "import os, subprocess, sys\n"
        "subprocess.run([*sys.argv[1:-1], str(os.getpid())])  # in place of the process id of the test"
    )
    caller, script = started(
        tmp_path, a_tree(tmp_path), lambda words: subprocess.Popen([PYTHON, "-c", code, *words], cwd=ROOT)
    )
    (between,) = psutil.Process(caller.pid).children()
    caller.kill()
    caller.wait(PATIENCE)
    wait_for(lambda: not any(map(alive, [between, *script])))
    wait_for(lambda: read_record(tmp_path)["state"] == "interrupted")


def test_a_run_is_cleaned_up_when_its_worker_is_asked_to_exit(tmp_path):
    """As Ray does after Ctrl-C."""
    code = (
        "import signal, sys\n"
        "from metasft.experiments.runner import _execute\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))\n"
        "_execute(sys.argv[1])"
    )
    worker, script = started(
        tmp_path, a_tree(tmp_path), lambda words: subprocess.Popen([PYTHON, "-c", code, str(tmp_path)], cwd=ROOT)
    )
    worker.terminate()
    assert worker.wait(PATIENCE) == 1
    wait_for(lambda: read_record(tmp_path)["state"] == "interrupted")
    assert not any(map(alive, script))


def a_trainer(folder, on_stop):
    """A script that does ``on_stop`` when it is asked to stop, as a command."""
    return ["sh", "-c", f"trap '{on_stop}' TERM; echo $$ . > {folder}/pids; while :; do sleep 0.1; done"]


@pytest.mark.parametrize(("kind", "saves"), [("train", True), ("evaluate", False)])
def test_a_training_has_the_time_to_save(kind, saves, tmp_path):
    command = a_trainer(tmp_path, f"sleep 2; echo $TORCH_ELASTIC_SHUTDOWN_TIMEOUT > {tmp_path}/saved; exit 0")
    process, script = started(
        tmp_path,
        command,
        lambda words: subprocess.Popen(changed(words, "p.GRACE_SECONDS = 0.5"), cwd=ROOT),
        kind=kind,
    )
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 1 and not any(map(alive, script))
    assert read_record(tmp_path)["state"] == "interrupted"
    assert (tmp_path / "saved").is_file() == saves
    if saves:
        assert float((tmp_path / "saved").read_text()) == SAVING_SECONDS, "torchrun ends its workers no earlier"


def test_a_training_that_saves_is_ended_at_once_when_the_runner_asks_again(tmp_path):
    (tmp_path / END_NOW_FILE).touch()  # of an earlier attempt
    process, script = started(tmp_path, a_trainer(tmp_path, f"touch {tmp_path}/asked"), kind="train")
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: (tmp_path / "asked").is_file())
    (tmp_path / END_NOW_FILE).touch()
    assert process.wait(30) == 1 and not any(map(alive, script))
    assert read_record(tmp_path)["state"] == "interrupted"


def test_two_processes_do_not_work_in_one_folder(tmp_path):
    words = prepare(tmp_path, ["sh", "-c", f"touch {tmp_path}/ran"])
    with locked(tmp_path):
        subprocess.run(changed(words, "p.GRACE_SECONDS = 0.1"), cwd=ROOT, check=False, timeout=PATIENCE)
    record = read_record(tmp_path)
    assert record["state"] == "failed" and record["error"] == f"another process still works in {tmp_path.name}"
    assert not (tmp_path / "ran").exists()


def test_progress_bars_and_what_torchrun_adds_are_left_out_of_the_last_lines(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text(
        "before\nstep 1\rstep 2\rstep 3\n\nValueError: too long\n"
        "E1124 api.py:1 torch/distributed/elastic/multiprocessing/api.py:984] failed (exitcode: 1) local_rank: 0\n"
        "Traceback of torchrun\n"
    )
    assert _last_lines(_logged(log, len("before\n"))).splitlines() == ["step 3", "ValueError: too long"]


# ---- the summary of a trainer that writes none ----------------------------------------------------------------------


def fake_training(folder, steps, *, gpu=False):
    """What veRL's trainer leaves: a line per step, with other lines between, and a checkpoint."""
    lines = [{"step": 0, "data": {"val/loss": 3.0}}]
    for step in range(1, steps + 1):
        data = {"train/loss": 2.0, "train/global_tokens": 100 * step}
        lines.append({"step": step, "data": {**data, **({"perf/max_memory_allocated_gb": step / 4} if gpu else {})}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "latest_checkpointed_iteration.txt").write_text(f"{steps}\n")
    (folder / f"global_step_{steps}").mkdir()
    for rank in range(2):
        (folder / f"global_step_{steps}" / f"model_world_size_2_rank_{rank}.pt").write_bytes(b"x" * 1000)
    (folder / f"global_step_{steps}" / "optim_world_size_2_rank_0.pt").write_bytes(b"x" * 5000)


def summary_of(folder, ends, *, gpus=0, seconds=60.0):
    record = {"summary": {"method": "lora", "seed": 4}, "gpus": gpus, "environment": {"OMP_NUM_THREADS": "1"}}
    _write_summary(folder, record, {"seconds": seconds, "peak_memory_bytes": 123}, ends)
    return json.loads((folder / "run_summary.json").read_text())


def test_the_costs_of_a_training_are_measured_from_outside(tmp_path):
    fake_training(tmp_path, 4)
    summary = summary_of(tmp_path, [20.0, 22.0, 25.0, 27.0])
    assert (summary["method"], summary["seed"], summary["steps"], summary["tokens"]) == ("lora", 4, 4, 1000)
    assert summary["seconds_per_step_median"] == 2.0  # of 2, 3, 2
    assert summary["seconds_total"] == 60.0 - 20.0 + 2.0  # from the start of the first step
    assert summary["seconds_process"] == 60.0
    assert (summary["peak_memory_bytes"], summary["peak_memory_kind"]) == (123, "rss")
    assert (summary["checkpoint"], summary["checkpoint_bytes"], summary["world_size"]) == ("global_step_4", 2000, 2)
    assert summary["device_name"].endswith(", 1 threads per process") and summary["versions"]["verl"]


def test_steps_that_were_seen_together_share_their_time(tmp_path):
    fake_training(tmp_path, 5)
    assert summary_of(tmp_path, [10.0, 14.0])["seconds_per_step_median"] == 1.0


def test_memory_on_a_gpu_is_what_the_trainer_logs(tmp_path):
    fake_training(tmp_path, 3, gpu=True)
    summary = summary_of(tmp_path, [1.0, 2.0, 3.0], gpus=1)
    assert (summary["peak_memory_bytes"], summary["peak_memory_kind"]) == (int(0.75 * 1024**3), "device")
    assert "threads" not in summary["device_name"]


@pytest.mark.parametrize("ends", [[], [5.0], [5.0, 6.0]])
def test_what_cannot_be_told_is_null(ends, tmp_path):
    """One step, whose line may be seen in two parts."""
    fake_training(tmp_path, 1)
    summary = summary_of(tmp_path, ends)
    assert summary["steps"] == 1 and summary["seconds_per_step_median"] is None and summary["seconds_total"] is None
    assert summary["peak_memory_bytes"] == 123
    for file in (tmp_path / "metrics.jsonl", tmp_path / "latest_checkpointed_iteration.txt"):
        file.unlink()  # an arm may tell the trainer to write neither
    summary = summary_of(tmp_path, ends)
    assert [summary[key] for key in ("steps", "tokens", "checkpoint", "checkpoint_bytes", "world_size")] == [None] * 5


def test_steps_are_timed_while_the_trainer_runs(tmp_path):
    fake_training(tmp_path, 3)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()[1:]
    code = (
        "import sys, time\n"
        f"for line in {lines!r}:\n"
        "    time.sleep(0.5)\n"
        f"    print(line, file=open('{tmp_path}/metrics.jsonl', 'a'), flush=True)\n"
    )
    record = run(tmp_path, ["python", "-c", code], summary={"method": "lora"})
    assert record["state"] == "finished", record["error"]
    summary = json.loads((tmp_path / "run_summary.json").read_text())
    assert summary["steps"] == 3  # the lines of an earlier attempt are not among them
    assert summary["seconds_per_step_median"] >= 0.4
    assert summary["seconds_per_step_median"] * 3 <= summary["seconds_total"] <= record["seconds"]
