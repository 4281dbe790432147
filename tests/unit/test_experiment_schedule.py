"""What is handed over when, what follows from how a run ended, and the time left."""

from __future__ import annotations

import json
import signal
from types import SimpleNamespace

import pytest
from experiment_files import BASE, META_LORA, MIXED, SEARCH, SEARCHED, opened

from metasft.config.records import read_record, write_record
from metasft.experiments import command
from metasft.experiments.process import END_NOW_FILE
from metasft.experiments.runner import Progress, _check_resources, _schedule, _stop, time_left


class FakeRay:
    """Runs what is handed over at once, in order; ``outcomes``: run -> what its process writes (default: finished)."""

    exceptions = SimpleNamespace(RayError=OSError)

    def __init__(self, store, outcomes=()):
        self.store, self.outcomes, self.order = store, dict(outcomes), []

    def remote(self, **options):
        assert options == {"max_retries": 0}
        return lambda function: SimpleNamespace(options=self.options)

    def options(self, *, num_cpus, num_gpus, name):
        return SimpleNamespace(remote=lambda folder: self.execute(name))

    def execute(self, name):
        self.order.append(name)
        outcome = self.outcomes.get(name, "finished")
        if outcome in ("finished", "failed", "interrupted"):
            record = {**self.store.records[name], "state": outcome, "seconds": 1.0, "attempts": 1}
            record["error"] = None if outcome == "finished" else f"it {outcome}"
            write_record(self.store.run_folder(name), record)
        return name

    def wait(self, references, timeout):
        return references[:1], references[1:]

    def get(self, name):
        outcome = self.outcomes.get(name, "finished")
        if isinstance(outcome, OSError):
            raise outcome
        return (0, "") if outcome == "finished" else (1, outcome)


def scheduled(store, outcomes=()):
    """The order in which runs were handed over."""
    ray = FakeRay(store, outcomes)
    selected = list(store.plan.runs)
    waiting = [name for name in selected if store.records[name]["state"] == "waiting"]
    _schedule(store, selected, waiting, ray, Progress(store, selected))
    return ray.order


def test_runs_start_when_what_they_need_has_finished(tmp_path):
    store = opened(tmp_path, SEARCHED, SEARCH)
    order = scheduled(store)
    assert sorted(order) == sorted(store.plan.runs)
    for name, run in store.plan.runs.items():
        assert all(order.index(need) < order.index(name) for need in run.needs)
    assert scheduled(opened(tmp_path, SEARCHED, SEARCH)) == []


def test_the_rest_goes_on_past_a_crash(tmp_path, capsys):
    arms = {"a": META_LORA, "m": MIXED, "base": BASE}
    store = opened(tmp_path, arms)
    order = scheduled(store, {"train-a-seed1": "failed", "evaluate-m-seed1": OSError("the worker died")})
    assert "evaluate-a-seed1" not in order and "evaluate-base-seed1" in order
    states = {name: record["state"] for name, record in store.records.items()}
    ended = {"train-a-seed1": "failed", "evaluate-a-seed1": "skipped", "evaluate-m-seed1": "failed"}
    assert states == {**dict.fromkeys(store.plan.runs, "finished"), **ended}
    assert store.records["evaluate-a-seed1"]["error"] == "train-a-seed1 did not finish"
    assert store.records["evaluate-m-seed1"]["error"] == "Ray: the worker died"
    document = json.loads((tmp_path / "out" / "experiments.json").read_text())
    assert {name: run["state"] for name, run in document["runs"].items()} == states
    assert "evaluate-a-seed1 skipped: train-a-seed1 did not finish" in capsys.readouterr().out
    retried = opened(tmp_path, arms, retry_failed=True)
    assert scheduled(retried) == ["train-a-seed1", "evaluate-m-seed1", "evaluate-a-seed1"]


def test_what_was_interrupted_and_what_needs_it_is_left_to_the_next_start(tmp_path, capsys):
    """Also what needs it over others: ``a`` waits for what ``b`` searches, which waits for its training."""
    store = opened(tmp_path, SEARCHED, SEARCH)
    order = scheduled(store, {"train-b-seed1": "interrupted", "train-f-seed1": "failed"})
    assert order == ["data", "train-b-seed1", "train-f-seed1", "train-a-seed1", "evaluate-base-seed1"]
    states = {name: record["state"] for name, record in store.records.items()}
    assert (states["train-b-seed1"], states["evaluate-b-seed1"]) == ("interrupted", "waiting")
    assert (states["evaluate-a-seed1"], states["evaluate-f-seed1"]) == ("waiting", "skipped")
    assert "train-b-seed1 interrupted after 1 s: it interrupted\n" in capsys.readouterr().out
    assert command._summary(store, list(store.records)) == 1
    assert capsys.readouterr().out.splitlines()[1:] == [
        "8 runs: 3 finished, 1 interrupted, 1 failed, 2 waiting, 1 skipped",  # in the order of the plan
        *("", "train-f-seed1 failed:", "    it failed"),
        *("", "the same command resumes what was interrupted, and runs what waits for it"),
        *("", "--retry-failed runs them again"),
    ]
    assert scheduled(opened(tmp_path, SEARCHED, SEARCH)) == ["train-b-seed1", "evaluate-b-seed1", "evaluate-a-seed1"]


class LateRay(FakeRay):
    """Where an earlier attempt of ``late`` still ends when it is handed over again; its new process waits for that."""

    def __init__(self, store, late, looks):
        super().__init__(store)
        self.late, self.looks = late, list(looks)

    def execute(self, name):
        return super().execute(name) if name != self.late else name

    def wait(self, references, timeout):
        if self.late in references and self.looks:
            folder = self.store.run_folder(self.late)
            write_record(folder, {**read_record(folder), **self.looks.pop(0)})
            return [], references
        if references[0] == self.late:
            super().execute(self.late)
        return super().wait(references, timeout)


@pytest.mark.parametrize("end", ["interrupted", "failed"])
def test_the_end_of_an_earlier_attempt_is_not_taken_for_that_of_the_new_one(end, tmp_path, capsys):
    store = opened(tmp_path)
    of_earlier = {"state": end, "error": "it was stopped with its runner"}
    begin = {"state": "running", "attempts": 2, "error": None, "started": "2030-01-01T00:00:00+00:00"}
    store.update("train-a-seed1", attempts=1)
    ray, selected = LateRay(store, "train-a-seed1", [of_earlier, begin]), list(store.plan.runs)
    _schedule(store, selected, list(selected), ray, Progress(store, selected))
    assert {record["state"] for record in store.records.values()} == {"finished"}
    assert sorted(ray.order) == sorted(selected)
    assert capsys.readouterr().out.count("train-a-seed1 started") == 1


def test_a_process_that_could_not_say_why_it_ended_is_a_failure(tmp_path):
    store = opened(tmp_path)
    scheduled(store, {"train-a-seed1": "Traceback: out of files", "train-f-seed1": ""})
    assert store.records["train-a-seed1"]["error"] == "Traceback: out of files"
    assert store.records["train-f-seed1"]["error"] == "its process ended with exit code 1 before it could say why"


def test_a_second_ctrl_c_ends_running_trainings_at_once(tmp_path, capsys):
    store = opened(tmp_path)
    store.update("train-a-seed1", state="running")
    hit = SimpleNamespace(shutdown=lambda: signal.raise_signal(signal.SIGINT))
    _stop(store, ["train-a-seed1"], hit)
    assert (store.run_folder("train-a-seed1") / END_NOW_FILE).is_file()
    assert store.records["train-a-seed1"]["state"] == "waiting"
    said = capsys.readouterr().err
    assert "train-a-seed1" in said and "Ctrl-C again" in said
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_run_larger_than_the_machine_is_refused(tmp_path):
    store = opened(tmp_path, changes={"runs/train": {"cpus": 2, "gpus": 4}})
    _check_resources(store, ["data"], {"CPU": 1.0})
    with pytest.raises(ValueError, match="train-a-seed1 asks for 4 GPUs, Ray has 0: lower `runs` of the scale small"):
        _check_resources(store, ["data", "train-a-seed1"], {"CPU": 2.0})


# ---- time left ------------------------------------------------------------------------------------------------------


def entry(state, kind, arm=None, seconds=None, started="2030-01-01T00:00:00+00:00"):
    return {"state": state, "kind": kind, "arm": arm, "seconds": seconds, "started": started}


NEW_YEAR = 1893456000.0  # 2030-01-01T00:00:00+00:00


def test_time_left_follows_from_runs_of_the_same_sort():
    finished = [entry("finished", "train", "a", 10.0), entry("finished", "train", "b", 40.0)]
    left = time_left
    assert left(finished, NEW_YEAR) == 0.0
    assert left([*finished, entry("waiting", "train", "a")], NEW_YEAR) == 10.0  # its own arm
    assert left([*finished, entry("waiting", "train", "c")], NEW_YEAR) == 25.0  # else its kind: the median
    assert left([*finished, entry("waiting", "evaluate", "a")], NEW_YEAR) is None
    running = entry("running", "train", "a")
    assert left([*finished, running], NEW_YEAR + 4) == 6.0
    assert left([*finished, running], NEW_YEAR + 60) == 0.0  # longer than expected
    # Two at a time: 6 + 36 of what runs, 25 of what waits.
    both = [running, entry("running", "train", "b"), entry("waiting", "train", "c")]
    assert left([*finished, *both], NEW_YEAR + 4) == (6 + 36 + 25) / 2
    failed = [entry("failed", "train", "a", 1.0), entry("skipped", "evaluate", "a")]
    assert left([*finished, *failed], NEW_YEAR) == 0.0
