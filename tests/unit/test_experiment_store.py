"""What is in the output folder decides what is run: restarts, changed settings, searches, failures, time left."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from experiment_files import BASE, FOMAML, META_LORA, MIXED, model_folder, plan_of, write_scale, write_suite

import run_experiments
from metasft.experiments.plan import make_plan
from metasft.experiments.runner import Progress, _check_resources, _schedule, time_left
from metasft.experiments.search import fill_in, read_choice
from metasft.experiments.store import (
    ExperimentStore,
    command_of,
    finished_searches,
    known_runs,
    locked,
    read_record,
    write_record,
)
from metasft.experiments.suites import read_scale, read_suites

ARMS = {"a": META_LORA, "f": FOMAML}
SLOWER = {**META_LORA, "overrides": {"meta.num_inner_steps": 3}}


def opened(folder, arms=ARMS, changes=None, *, retry_failed=False, name="try"):
    """The store of a plan made with what the folder knows, as ``run_experiments.py`` opens it."""
    out = folder / "out"
    suite = write_suite(folder, arms, name=name)
    scale = write_scale(folder, changes, model=model_folder(folder / "model"))
    plan = make_plan(read_suites([str(suite)]), read_scale(str(scale)), out, known_runs(out), finished_searches(out))
    store = ExperimentStore(plan, ["python", "run_experiments.py"])
    store.open(retry_failed=retry_failed)
    return store


def leave(folder, states, arms=ARMS, changes=None):
    """Let runs end in these states: run -> state. Returns the store."""
    store = opened(folder, arms, changes)
    store.save()
    for name, state in states.items():
        ended = {"seconds": 5.0, "started": "2030-01-01T00:00:00+00:00", "attempts": 1}
        store.update(name, state=state, **ended)
    store.save()
    return store


def states_of(store):
    return {name: (record["state"], record["attempts"]) for name, record in store.records.items()}


# ---- restart --------------------------------------------------------------------------------------------------------


def test_what_finished_stays_and_what_was_interrupted_waits_again(tmp_path):
    leave(
        tmp_path,
        {"data": "finished", "train-a-seed1": "running", "train-f-seed1": "failed", "evaluate-f-seed1": "skipped"},
    )
    assert states_of(opened(tmp_path)) == {
        "data": ("finished", 1),
        "train-a-seed1": ("waiting", 1),
        "train-f-seed1": ("failed", 1),
        "evaluate-a-seed1": ("waiting", 0),
        "evaluate-f-seed1": ("waiting", 1),
    }
    retried = opened(tmp_path, retry_failed=True)
    assert states_of(retried)["train-f-seed1"] == ("waiting", 1) and retried.records["train-f-seed1"]["error"] is None


def test_the_file_of_a_run_is_newer_than_the_list_of_all(tmp_path):
    """A run that finished while the scheduler was dying counts as finished."""
    store = leave(tmp_path, {"data": "running"})
    record = read_record(store.run_folder("data"))
    write_record(store.run_folder("data"), {**record, "state": "finished", "returncode": 0})
    assert json.loads((tmp_path / "out" / "experiments.json").read_text())["runs"]["data"]["state"] == "running"
    assert opened(tmp_path).records["data"]["state"] == "finished"


def test_a_later_command_adds_to_the_folder(tmp_path):
    leave(tmp_path, {"data": "finished", "train-a-seed1": "finished", "evaluate-a-seed1": "finished"})
    store = opened(tmp_path, {"b": BASE, "twin": META_LORA}, {"seeds": [1, 2]}, name="more")
    store.save()
    document = json.loads((tmp_path / "out" / "experiments.json").read_text())
    assert list(document["suites"]) == ["try", "more"] and list(document["arms"]) == ["a", "f", "b", "twin"]
    assert document["runs"]["evaluate-a-seed1"]["state"] == "finished" and "train-f-seed1" in document["runs"]
    twin = document["arms"]["twin"]
    assert [r["train"] for r in twin["replicates"]] == ["train-a-seed1", "train-twin-seed2"]
    again = opened(tmp_path, {"twin": META_LORA}, {"seeds": [3]}, name="more")
    again.save()
    assert json.loads((tmp_path / "out" / "experiments.json").read_text())["arms"]["twin"]["seeds"] == [1, 2, 3]


# ---- changed settings -----------------------------------------------------------------------------------------------


def test_finished_runs_of_other_settings_are_named_with_what_to_delete(tmp_path):
    leave(tmp_path, {"data": "finished", "train-a-seed1": "finished"})
    folder = tmp_path / "out" / "runs" / "train-a-seed1"
    with pytest.raises(ValueError) as caught:
        opened(tmp_path, changes={"train/meta_lora": {"meta.inner_lr": 0.5}})
    assert str(caught.value).startswith(
        f"the settings have changed since these runs in {tmp_path / 'out'}: train-a-seed1 (finished, nothing else "
        f"there, meta.inner_lr=0.5 now); to run them again delete their folders (rm -r {folder})"
    )
    assert read_record(folder)["state"] == "finished"
    with pytest.raises(ValueError, match=r"holds an arm a with other settings .*rename the arm, or give another"):
        opened(tmp_path, {**ARMS, "a": SLOWER})


def test_unfinished_runs_of_other_settings_start_over_unless_they_hold_a_training(tmp_path):
    leave(tmp_path, {"data": "finished", "train-a-seed1": "finished", "evaluate-a-seed1": "running"})
    half_way = tmp_path / "out" / "runs" / "evaluate-a-seed1" / "meta_lora_cells.jsonl"
    half_way.write_text("{}")
    faster = {"evaluate/all/adaptation_steps": 1}
    with pytest.raises(ValueError, match="holds experiments with another evaluation"):
        leave(tmp_path, {"evaluate-f-seed1": "finished"})
        opened(tmp_path, {"a": META_LORA}, faster)
    (tmp_path / "out" / "runs" / "evaluate-f-seed1" / "run.json").unlink()
    leave(tmp_path, {"evaluate-f-seed1": "waiting"})
    store = opened(tmp_path, changes=faster)
    assert states_of(store)["evaluate-a-seed1"] == ("waiting", 1) and not half_way.exists()
    assert "--adaptation-steps 1" in " ".join(store.records["evaluate-a-seed1"]["command"])
    leave(tmp_path, {"train-f-seed1": "running"}, changes=faster)
    with pytest.raises(ValueError, match=r"train-f-seed1 \(running, trainer.total_training_steps=1 there, .*=2 now\)"):
        opened(tmp_path, changes={**faster, "train/fomaml": {"trainer.total_training_steps": 2}})


def test_a_failed_run_is_mended_by_other_settings_and_retry_failed(tmp_path):
    leave(tmp_path, {"data": "finished", "train-a-seed1": "failed", "evaluate-a-seed1": "skipped"})
    mended = {**ARMS, "a": SLOWER}
    with pytest.raises(ValueError, match=r"train-a-seed1 \(failed, .*, what has failed, give --retry-failed"):
        opened(tmp_path, mended)
    store = opened(tmp_path, mended, retry_failed=True)
    assert states_of(store)["train-a-seed1"] == ("waiting", 1)
    assert "meta.num_inner_steps=3" in store.records["train-a-seed1"]["command"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "some/model"}, "another model .*/model' there, 'some/model' now.: give another --output-dir"),
        (
            {"evaluate/all/limit": 2},
            "the settings have changed since these runs .*evaluate-a-seed1 .finished, --limit 4 there, --limit 2 now",
        ),
    ],
)
def test_a_folder_holds_one_model_and_one_evaluation(changes, words, tmp_path):
    leave(tmp_path, {name: "finished" for name in ("data", "train-a-seed1", "evaluate-a-seed1")})
    with pytest.raises(ValueError, match=words):
        opened(tmp_path, changes=changes)


def test_files_that_cannot_be_read_are_named(tmp_path):
    store = leave(tmp_path, {"data": "finished"})
    (store.run_folder("data") / "run.json").write_text("{")
    with pytest.raises(
        ValueError, match=r"runs/data/run.json is not readable JSON .*: delete its folder to run it again"
    ):
        opened(tmp_path)
    for content, words in (
        ("{", "is not readable JSON"),
        ("[]", "has the format None"),
        ('{"format": 2}', "has the format 2"),
    ):
        (tmp_path / "out" / "experiments.json").write_text(content)
        with pytest.raises(ValueError, match=f"experiments.json {words}"):
            opened(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match=r"--output-dir leads to .*file/out, which cannot be written .*: give another"),
        locked(tmp_path / "file" / "out"),
    ):
        pass


# ---- one search per model type --------------------------------------------------------------------------------------

SEARCH = {"evaluate/search": {"limit": 2, "arms": {"meta_lora": "b", "fomaml": "elsewhere"}}}
SEARCHED = {"a": META_LORA, "b": SLOWER, "f": FOMAML, "base": BASE}


def flag(command, name):
    return command[command.index(name) + 1]


def test_the_named_arm_searches_and_the_others_of_its_type_wait_for_it(tmp_path):
    plan = plan_of(tmp_path, SEARCHED, {**SEARCH, "seeds": [4, 5]})
    searching = [name for name, run in plan.runs.items() if "--search-adaptation" in run.command]
    assert searching == ["evaluate-b-seed4", "evaluate-f-seed4"]
    assert flag(plan.runs["evaluate-b-seed4"].command, "--search-limit") == "2"
    assert "--adaptation-lr" not in plan.runs["evaluate-b-seed4"].command
    for name in ("evaluate-a-seed4", "evaluate-a-seed5", "evaluate-b-seed5"):
        run = plan.runs[name]
        assert run.searched_by == "evaluate-b-seed4" and run.needs[-1] == "evaluate-b-seed4"
        assert flag(run.command, "--adaptation-lr") == "<learning rate of evaluate-b-seed4>"
    assert plan.searches["fomaml"].reason == "elsewhere, which the scale names, is in none of these suites"
    # A type that the scale does not search for keeps the scale's own settings.
    assert flag(plan.runs["evaluate-base-seed4"].command, "--adaptation-lr") == "0.001"
    assert {"train-a-seed5", "train-b-seed4", "evaluate-b-seed4"} <= set(plan.needed_by(["a"]))


def finish_search(store, name, choice):
    store.update(name, state="finished", attempts=1)
    (store.run_folder(name) / "meta_lora_search.json").write_text(json.dumps({"choice": choice}))


def test_what_the_search_chose_is_filled_in_when_the_next_evaluation_starts(tmp_path):
    store = opened(tmp_path, SEARCHED, SEARCH)
    store.save()
    waiting = store.plan.runs["evaluate-a-seed1"]
    assert not store.has_choice("evaluate-a-seed1") and command_of(store.plan, waiting.name) == waiting.command
    finish_search(store, "evaluate-b-seed1", {"optimizer": "sgd", "lr": 0.25})
    assert store.has_choice("evaluate-a-seed1") and store.has_choice("evaluate-base-seed1")
    command = store.records["evaluate-a-seed1"]["command"]
    assert (flag(command, "--adaptation-optimizer"), flag(command, "--adaptation-lr")) == ("sgd", "0.25")
    assert command == list(fill_in(waiting.command, "evaluate-b-seed1", {"optimizer": "sgd", "lr": 0.25}))
    store.update("evaluate-a-seed1", state="finished", attempts=1)
    # Started again, nothing has changed; an arm that comes later takes over the choice without searching.
    assert opened(tmp_path, SEARCHED, SEARCH).records["evaluate-a-seed1"]["state"] == "finished"
    later = opened(tmp_path, {"c": {**META_LORA, "overrides": {"meta.inner_lr": 0.5}}}, SEARCH, name="later")
    assert "--search-adaptation" not in later.plan.runs["evaluate-c-seed1"].command
    assert flag(command_of(later.plan, "evaluate-c-seed1"), "--adaptation-lr") == "0.25"
    assert later.plan.searches["meta_lora"].reason == "has searched in this output folder already"


def test_dry_run_shows_what_an_earlier_search_chose(tmp_path, capsys):
    store = opened(tmp_path, SEARCHED, SEARCH)
    store.save()
    files = ["--suite", tmp_path / "try.yaml", "--scale", tmp_path / "small.yaml", "--output-dir", tmp_path / "out"]
    command = [*map(str, files), "--dry-run", "--arms", "a"]
    assert run_experiments.main(command) == 0
    printed = capsys.readouterr().out
    assert "--adaptation-lr '<learning rate of evaluate-b-seed1>'" in printed
    assert "# adaptation of every meta_lora arm: optimizer and rate that evaluate-b-seed1 finds" in printed
    assert "fomaml" not in printed and "evaluate-base" not in printed
    finish_search(store, "evaluate-b-seed1", {"optimizer": "sgd", "lr": 0.25})
    assert run_experiments.main(command) == 0
    assert "--adaptation-optimizer sgd --adaptation-lr 0.25" in capsys.readouterr().out


def test_a_search_of_other_settings_chooses_nothing(tmp_path):
    store = opened(tmp_path, SEARCHED, SEARCH)
    store.save()
    finish_search(store, "evaluate-b-seed1", {"optimizer": "sgd", "lr": 0.25})
    store.update("evaluate-b-seed1", command=["something", "else"])
    assert not store.has_choice("evaluate-a-seed1")


@pytest.mark.parametrize(
    "content", ["", "{}", '{"choice": {"optimizer": "sgd"}}', '{"choice": {"optimizer": "sgd", "lr": "x"}}']
)
def test_a_choice_that_cannot_be_read_is_none(content, tmp_path):
    (tmp_path / "meta_lora_search.json").write_text(content)
    assert read_choice(tmp_path) is None


def test_one_search_does_not_serve_lora_and_all_parameters(tmp_path):
    reptile = {"label": "R", "method": "reptile"}
    arms = {"r": reptile, "rl": {**reptile, "overrides": {"model.lora_rank": 4, "model.lora_alpha": 8}}}
    with pytest.raises(ValueError, match="arm rl adapts LoRA, another arm of reptile does not: one search cannot"):
        plan_of(tmp_path, arms, {"evaluate/search": {"limit": 2, "arms": {"reptile": "r"}}})


# ---- scheduling -----------------------------------------------------------------------------------------------------


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
        if outcome in ("finished", "failed"):
            record = {**self.store.records[name], "state": outcome, "seconds": 1.0, "attempts": 1}
            write_record(self.store.run_folder(name), record)
            if outcome == "finished" and "--search-adaptation" in record["command"]:
                choice = {"choice": {"optimizer": "sgd", "lr": 0.25}}
                (self.store.run_folder(name) / "meta_lora_search.json").write_text(json.dumps(choice))
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
    assert flag(store.records["evaluate-a-seed1"]["command"], "--adaptation-lr") == "0.25"
    assert scheduled(opened(tmp_path, SEARCHED, SEARCH)) == []


def test_the_rest_goes_on_past_a_crash(tmp_path, capsys):
    arms = {"a": META_LORA, "m": MIXED, "base": BASE}
    store = opened(tmp_path, arms)
    order = scheduled(store, {"train-a-seed1": "failed", "evaluate-m-seed1": OSError("the worker died")})
    assert "evaluate-a-seed1" not in order and "evaluate-base-seed1" in order
    states = {name: record["state"] for name, record in store.records.items()}
    assert states == {
        "data": "finished",
        "train-a-seed1": "failed",
        "train-m-seed1": "finished",
        "evaluate-a-seed1": "skipped",
        "evaluate-m-seed1": "failed",
        "evaluate-base-seed1": "finished",
    }
    assert store.records["evaluate-a-seed1"]["error"] == "train-a-seed1 did not finish"
    assert store.records["evaluate-m-seed1"]["error"] == "Ray: the worker died"
    document = json.loads((tmp_path / "out" / "experiments.json").read_text())
    assert {name: run["state"] for name, run in document["runs"].items()} == states
    assert "evaluate-a-seed1 skipped: train-a-seed1 did not finish" in capsys.readouterr().out
    retried = opened(tmp_path, arms, retry_failed=True)
    assert scheduled(retried) == ["train-a-seed1", "evaluate-m-seed1", "evaluate-a-seed1"]


def test_a_process_that_could_not_say_why_it_ended_is_a_failure(tmp_path):
    store = opened(tmp_path)
    scheduled(store, {"train-a-seed1": "Traceback: out of files", "train-f-seed1": ""})
    assert store.records["train-a-seed1"]["error"] == "Traceback: out of files"
    assert store.records["train-f-seed1"]["error"] == "its process ended with exit code 1 before it could say why"


def test_nothing_takes_over_from_a_search_that_left_no_choice(tmp_path):
    store = opened(tmp_path, SEARCHED, {"evaluate/search": {"limit": 2, "arms": {"meta_lora": "b"}}})
    ray_order = scheduled(store, {"evaluate-b-seed1": "no file"})
    assert store.records["evaluate-a-seed1"]["state"] == "skipped"
    store.update("evaluate-b-seed1", state="finished")
    store.update("evaluate-a-seed1", state="waiting", error=None)
    assert scheduled(store) == [] and "evaluate-a-seed1" not in ray_order
    assert (
        store.records["evaluate-a-seed1"]["error"] == "evaluate-b-seed1 finished, but left no optimizer and rate behind"
    )


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
