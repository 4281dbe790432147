"""``run_experiments.py`` as a user runs it: killed in the middle, started again, past a crash, to the report."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time

import psutil
import pytest
from experiment_files import BASE, META_LORA, MIXED, SINGLE, write_scale, write_suite
from script_runner import ROOT, must_run, run_script, script_environment

import run_experiments

PATIENCE = 600  # seconds, for a machine that does much else
TOO_MANY = {"meta.query_samples": 1000}  # more than there are, which only the trainer finds out
SAME_AS_PLAIN = {"trainer.project_name": "other"}  # another command that computes the same


class Runner:
    """``run_experiments.py`` on one output folder."""

    def __init__(self, folder, model, scale=None):
        self.folder, self.out = folder, folder / "all experiments"  # a path with a space
        self.scale = write_scale(folder, scale, model=model)
        self.held, self.worker, self.started = [], None, []

    def words(self, *flags):
        return [
            "run_experiments.py",
            *("--suite", self.folder / "try.yaml", "--scale", self.scale, "--output-dir", self.out),
            *flags,
        ]

    def run(self, *flags):
        return run_script(*self.words(*flags), timeout=PATIENCE)

    def start(self):
        command = [sys.executable, *map(str, self.words())]
        log = (self.folder / "runner.txt").open("a")
        process = subprocess.Popen(
            command, cwd=ROOT, env=script_environment(), stdout=log, stderr=log, start_new_session=True
        )
        self.started.append(process)
        return process

    def close(self):
        """End what a failed test has left."""
        for process in self.started:
            process.terminate()
            process.wait(PATIENCE)

    def said(self):
        return (self.folder / "runner.txt").read_text()

    def record(self, name):
        try:
            return json.loads((self.out / "runs" / name / "run.json").read_text())
        except FileNotFoundError:
            return {"state": "waiting", "attempts": 0}

    def in_state(self, state):
        runs = self.out / "runs"
        names = sorted(path.name for path in runs.iterdir()) if runs.is_dir() else []
        return [name for name in names if self.record(name)["state"] == state]

    def document(self):
        return json.loads((self.out / "experiments.json").read_text())

    def report(self):
        return json.loads((self.out / "report" / "report.json").read_text())

    def files(self, names):
        """Path -> time of the last change, of every file in these runs' folders."""
        return {
            path: path.stat().st_mtime_ns
            for name in names
            for path in (self.out / "runs" / name).rglob("*")
            if path.is_file()
        }

    def hold(self, name, process, file="log.txt"):
        """Suspend a run once it has written a file, so that it does not end before it is interrupted."""
        wait_for(lambda: (self.out / "runs" / name / file).exists() and self._scripts(name), process)
        self.held, self.worker = self._scripts(name), self._processes(name)[0].parent()
        for script in self.held:
            script.suspend()
        assert self.record(name)["state"] == "running"

    def ask_to_stop(self, name, process, file, *, rank=None):
        """SIGTERM to a rank of a run under torchrun, or to torchrun itself, once the run has written a file."""
        wait_for(lambda: (self.out / "runs" / name / file).exists() and len(self._scripts(name)) > 1, process)
        torchrun, *ranks = self._scripts(name)
        (torchrun if rank is None else ranks[rank]).terminate()
        wait_for(lambda: self.record(name)["state"] != "running", process)

    def next_state(self, name):
        """The folder that a training saves to next."""
        tracker = self.out / "runs" / name / "latest_checkpointed_iteration.txt"
        return f"global_step_{int(tracker.read_text()) + 1 if tracker.exists() else 1}"

    def _scripts(self, name):
        return [p for p in self._processes(name) if "metasft.experiments.process" not in _command_line(p)]

    def _processes(self, name):
        """The run's process, which Ray's worker has started, and those of its script."""
        return [p for p in psutil.process_iter() if str(self.out / "runs" / name) in _command_line(p)]

    def end(self, process, number):
        """Signal the process, and wait until nothing that it started is left but Ray's agents, which take a minute."""
        below = psutil.Process(process.pid).children(recursive=True)
        below = [p for p in below if not _command_line(p).startswith(("ray::DashboardAgent", "ray::RuntimeEnvAgent"))]
        assert below
        process.send_signal(number)
        if self.held:  # they hear of no signal but SIGKILL, and must not end before they are sent one
            wait_for(lambda: not _alive(self.worker))
        for script in self.held:
            with contextlib.suppress(psutil.NoSuchProcess):
                script.resume()
        self.held = []
        code = process.wait(PATIENCE)
        wait_for(lambda: not any(map(_alive, below)))
        assert not [line for line in map(_command_line, psutil.process_iter()) if str(self.out) in line]
        return code


def _command_line(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _alive(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition, process=None):
    """Wait until it happens, which it will not once the process has ended."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline and (process is None or process.poll() is None), "it did not happen"
        time.sleep(0.1)


def measured(report, arm):
    """What a report says of an arm's answers, losses and training, without times."""
    return {key: report["arms"][arm][key] for key in ("status", "scores", "training")}


@pytest.fixture(scope="module")
def runner(tmp_path_factory, tiny_model):
    with contextlib.closing(Runner(tmp_path_factory.mktemp("experiments"), tiny_model)) as made:
        yield made


def write_arms(runner, mended):
    arms = {"plain": META_LORA, "mended": {**META_LORA, "label": "Mended", "overrides": mended}}
    write_suite(runner.folder, arms, comparisons=[{"a": "plain", "b": "mended", "margin": 0.03}])


@pytest.fixture(scope="module")
def killed(runner):
    """The first start: one training crashes, the runner is killed during the other. What is known of that moment."""
    write_arms(runner, {**SAME_AS_PLAIN, **TOO_MANY})
    process = runner.start()
    runner.hold("train-plain-seed1", process)
    nice = [script.nice() for script in runner.held]
    with contextlib.redirect_stderr(io.StringIO()) as refusal:
        second = run_experiments.main([str(word) for word in runner.words()[1:]])
    wait_for(lambda: "evaluate-mended-seed1 skipped" in runner.said(), process)
    code = runner.end(process, signal.SIGKILL)
    finished = runner.in_state("finished")
    return {
        "code": code,
        "nice": nice,
        "second": (second, refusal.getvalue()),
        "states": {name: runner.record(name)["state"] for name in ("train-plain-seed1", "train-mended-seed1")},
        "finished": finished,
        "files": runner.files(finished),
    }


@pytest.fixture(scope="module")
def again(runner, killed):
    """The arm that crashed mended, everything started again with ``--retry-failed``."""
    write_arms(runner, SAME_AS_PLAIN)
    return runner.run("--retry-failed")


def test_a_second_runner_is_refused(runner, killed):
    assert killed["second"] == (
        2,
        f"error: another run_experiments.py works in {runner.out}: wait for it, or give another --output-dir\n",
    )


def test_the_suite_goes_on_past_a_crash_and_shows_the_end_of_its_log(runner, killed):
    said = runner.said()
    log = (runner.out / "runs" / "train-mended-seed1" / "log.txt").read_text().split("--- attempt 2")[0]
    last = log.splitlines()[-1]
    assert "meta.query_samples" in last
    shown = said[said.index("train-mended-seed1 failed after") :].splitlines()
    assert f"    {last}" in shown and any(line.endswith("train-mended-seed1/log.txt") for line in shown)
    assert "evaluate-mended-seed1 skipped: train-mended-seed1 did not finish" in said


def test_runs_have_the_priority_of_their_runner(killed):
    assert killed["nice"] == [os.getpriority(os.PRIO_PROCESS, 0)]


def test_killed_and_started_again_no_finished_run_is_repeated(runner, killed, again):
    assert killed["code"] == -signal.SIGKILL and killed["finished"] == ["data"]
    assert killed["states"] == {"train-plain-seed1": "interrupted", "train-mended-seed1": "failed"}
    assert runner.files(["data"]) == killed["files"]
    assert again.returncode == 0, again.stdout + again.stderr
    runs = runner.document()["runs"]
    assert {name: (run["state"], run["attempts"]) for name, run in runs.items()} == {
        "data": ("finished", 1),
        "train-plain-seed1": ("finished", 2),
        "train-mended-seed1": ("finished", 2),
        "evaluate-plain-seed1": ("finished", 1),
        "evaluate-mended-seed1": ("finished", 1),
    }
    for run in runs.values():
        assert run["seconds"] > 0 and run["peak_memory_bytes"] > 20e6 and run["returncode"] == 0
    assert "5 runs: 5 finished" in again.stdout


def test_progress_tells_what_started_what_ended_and_the_time_left(again):
    lines = again.stdout.splitlines()
    assert any("train-mended-seed1 started" in line for line in lines)
    ended = next(line for line in lines if "evaluate-mended-seed1 finished after" in line)
    assert "/5, " in ended and "left]" in ended
    assert "\r" not in again.stdout and "runs 0/5" not in again.stderr  # no bar where there is no terminal


def test_an_interrupted_arm_has_the_numbers_of_an_undisturbed_one(runner, again):
    """``plain`` was killed, ``mended`` computes the same and was not."""
    report = runner.report()
    assert measured(report, "plain") == measured(report, "mended")
    assert measured(report, "plain")["status"] == "measured" and measured(report, "plain")["scores"]
    (comparison,) = report["suites"]["try"]["comparisons"]
    assert comparison["a"] == "plain" and "0.0" in json.dumps(comparison)


def test_the_report_is_there(runner, again):
    assert again.stdout.splitlines()[-1] == f"report: {runner.out / 'report'}"
    page = (runner.out / "report" / "index.html").read_text()
    assert "Mended" in page and "figures/try-few-shot.svg" in page
    assert (runner.out / "report" / "figures" / "try-few-shot.svg").is_file()
    provenance = runner.report()["experiments"]["provenance"]
    manifest = json.loads((runner.out / "data" / "math_science_meta" / "manifest.json").read_text())
    assert provenance["data_sha256"] == {name: entry["sha256"] for name, entry in manifest["files"].items()}
    assert provenance["versions"]["verl"] and provenance["cores"] == os.cpu_count()


def test_dry_run_prints_what_was_run(runner, again, capsys):
    assert run_experiments.main([*map(str, runner.words("--dry-run")[1:])]) == 0
    assert commands_in(capsys.readouterr().out) == [run["command"] for run in runner.document()["runs"].values()]


def commands_in(printed):
    lines = [line for line in printed.splitlines() if line and not line.startswith(("#", "export "))]
    return [shlex.split(line) for line in lines]


# ---- minutes --------------------------------------------------------------------------------------------------------

SEARCHING = {
    "runs/train": {"cpus": 2, "processes": 2},
    "train/meta_learners/trainer.total_training_steps": 16,
    "train/meta_learners/trainer.save_freq": 1,
    "train/lora/engine.full_determinism": True,  # else veRL seeds the order of examples, but no fresh LoRA
    "evaluate/search": {"limit": 2, "arms": {"base": "base", "meta_lora": "plain", "lora": "single"}},
}
EVERY_SORT = {"plain": META_LORA, "single": SINGLE, "mixed": MIXED, "base": BASE}


@pytest.mark.slow
def test_a_suite_that_is_killed_again_and_again_reports_what_an_undisturbed_one_does(tmp_path, tiny_model, request):
    """SIGKILL, SIGTERM and Ctrl-C while trainings and evaluations are under way, under torchrun and without."""
    runners = []
    for name in ("undisturbed", "disturbed"):
        (tmp_path / name).mkdir()
        runners.append(Runner(tmp_path / name, tiny_model, SEARCHING))
        write_suite(tmp_path / name, EVERY_SORT)
    undisturbed, disturbed = runners
    request.addfinalizer(disturbed.close)
    finished = undisturbed.run()
    assert finished.returncode == 0, finished.stdout + finished.stderr

    # A trainer that is asked to stop saves; torchrun then exits with 1, or with 0 where only a rank was asked.
    training = disturbed.out / "runs" / "train-plain-seed1"
    for rank, error in ((None, "it was ended by SIGTERM"), (1, "it ended without run_summary.json")):
        process = disturbed.start()
        disturbed.ask_to_stop(training.name, process, disturbed.next_state(training.name), rank=rank)
        record = disturbed.record(training.name)
        assert (record["state"], record["error"]) == ("interrupted", error)
        assert "stopped by SIGTERM: meta-step" in (training / "log.txt").read_text().split("--- attempt")[-1]
        assert disturbed.end(process, signal.SIGINT) == 130
    moments = {
        "train-plain-seed1": (disturbed.next_state(training.name), signal.SIGKILL),  # resumes
        "train-single-algebra-seed1": ("log.txt", signal.SIGINT),
        "train-mixed-seed1": ("log.txt", signal.SIGKILL),
        "evaluate-plain-seed1": ("meta_lora_cells.jsonl", signal.SIGKILL),  # continues
        "evaluate-base-seed1": ("log.txt", signal.SIGINT),
    }
    for name, (file, number) in moments.items():
        process = disturbed.start()
        disturbed.hold(name, process, file)
        code = disturbed.end(process, number)
        assert code == (130 if number == signal.SIGINT else -number)
        assert disturbed.record(name)["state"] == "interrupted"
    finished = disturbed.run()
    assert finished.returncode == 0, finished.stdout + finished.stderr
    one, other = undisturbed.report(), disturbed.report()
    assert list(one["arms"]) == list(other["arms"]) == list(EVERY_SORT)
    for arm in EVERY_SORT:
        assert measured(one, arm) == measured(other, arm)
    attempts = {name: record["attempts"] for name, record in disturbed.document()["runs"].items()}
    assert attempts["data"] == 1 and attempts["train-plain-seed1"] == 4 and all(attempts[name] > 1 for name in moments)
    for name in ("single-algebra", "mixed"):
        summary = json.loads((disturbed.out / "runs" / f"train-{name}-seed1" / "run_summary.json").read_text())
        assert summary["steps"] == 2 and summary["seconds_per_step_median"] > 0 and summary["checkpoint_bytes"] > 0
    before = disturbed.files(attempts)
    assert disturbed.run().returncode == 0 and disturbed.files(attempts) == before


@pytest.mark.slow
def test_every_suite_runs_at_the_smallest_scale(tmp_path, capsys):
    out = tmp_path / "smoke"
    began = time.monotonic()
    command = ("run_experiments.py", "--suite", "all", "--scale", "smoke", "--output-dir", out)
    printed = must_run(*command, "--dry-run").stdout
    finished = must_run(*command, timeout=7200)
    with capsys.disabled():
        print(f"\n--suite all --scale smoke: {time.monotonic() - began:.0f} s")
    runs = json.loads((out / "experiments.json").read_text())["runs"]
    assert {run["state"] for run in runs.values()} == {"finished"}
    assert f"{len(runs)} runs: {len(runs)} finished" in finished.stdout
    assert commands_in(printed) == [run["command"] for run in runs.values()]
    report = json.loads((out / "report" / "report.json").read_text())
    assert {arm["status"] for arm in report["arms"].values()} == {"measured"}
    assert set(report["suites"]) == {path.stem for path in (ROOT / "data" / "experiments").glob("*.yaml")}
    assert (out / "report" / "index.html").stat().st_size > 10_000
