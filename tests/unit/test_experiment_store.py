"""What is in the output folder decides what is run: restarts, changed settings, searches."""

from __future__ import annotations

import errno
import json
import os

import pytest
from experiment_files import ARMS, BASE, META_LORA, SEARCH, SEARCHED, SLOWER, flag, opened, plan_of

import run_experiments
from metasft.config.records import read_experiments, read_record, write_record
from metasft.experiments.store import locked
from metasft.files.atomic import PARTIAL


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
    names = ("data", "train-a-seed1", "train-f-seed1", "evaluate-a-seed1", "evaluate-f-seed1")
    left = ("finished", "running", "failed", "interrupted", "skipped")
    leave(tmp_path, dict(zip(names, left, strict=True)))
    now = ("finished", "waiting", "failed", "waiting", "waiting")
    assert states_of(opened(tmp_path)) == {name: (state, 1) for name, state in zip(names, now, strict=True)}
    retried = opened(tmp_path, retry_failed=True)
    assert states_of(retried)["train-f-seed1"] == ("waiting", 1) and retried.records["train-f-seed1"]["error"] is None


def test_the_file_of_a_run_is_newer_than_the_list_of_all(tmp_path):
    """A run that finished while the scheduler was dying counts as finished."""
    store = leave(tmp_path, {"data": "running"})
    record = read_record(store.run_folder("data"))
    write_record(store.run_folder("data"), {**record, "state": "finished", "returncode": 0})
    assert json.loads((tmp_path / "out" / "experiments.json").read_text())["runs"]["data"]["state"] == "running"
    assert opened(tmp_path).records["data"]["state"] == "finished"


def test_what_a_killed_runner_was_writing_is_cleared_away(tmp_path):
    leave(tmp_path, {"data": "finished"})
    half = tmp_path / "out" / f".experiments.json.abc{PARTIAL}"
    half.write_text("{")
    opened(tmp_path)
    assert not half.exists() and (tmp_path / "out" / "experiments.json").is_file()


def test_a_folder_that_can_no_longer_be_written_ends_in_one_sentence(tmp_path, monkeypatch, capsys):
    leave(tmp_path, dict.fromkeys(("data", "evaluate-base-seed1"), "finished"), {"base": BASE})

    def full(path, value):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("metasft.experiments.store.write_json", full)
    files = ["--suite", tmp_path / "try.yaml", "--scale", tmp_path / "small.yaml", "--output-dir", tmp_path / "out"]
    assert run_experiments.main([*map(str, files)]) == 1
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'out' / 'experiments.json'} cannot be used (No space left on device): make room "
        "or give access, the same command resumes here\n"
    )


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


def test_a_folder_holds_one_model_and_one_evaluation(tmp_path):
    leave(tmp_path, {name: "finished" for name in ("data", "train-a-seed1", "evaluate-a-seed1")})
    for changes, words in (
        ({"model": "some/model"}, "another model .*/model' there, 'some/model' now.: give another --output-dir"),
        ({"evaluate/all/limit": 2}, "have changed since .*evaluate-a-seed1 .finished, --limit 4 there, --limit 2 now"),
    ):
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
        ("[]", "is not readable JSON .it holds list, no object"),
        ('{"format": 2}', "is not what run_experiments.py writes .format=2 must be 1"),
    ):
        (tmp_path / "out" / "experiments.json").write_text(content)
        with pytest.raises(ValueError, match=f"experiments.json {words}.*: move it away"):
            opened(tmp_path)
    (tmp_path / "out" / "experiments.json").unlink()
    (tmp_path / "out" / "experiments.json").mkdir()
    with pytest.raises(ValueError, match=r"experiments.json is not readable JSON .*: move it away"):
        opened(tmp_path)


RUN = {"kind": "train", "state": "finished", "attempts": 1, "command": ["python"]}
ARM = {"method": "fomaml", "overrides": {}, "replicates": [{"seed": 1, "task": None, "train": "t", "evaluate": "e"}]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"runs": [1]}, r"runs=\[1\]"),
        ({"runs": {"a": 5}}, "runs.a=5"),
        ({"runs": {"a": {}}}, "runs.a.kind is missing"),
        ({"runs": {"a": {**RUN, "command": [5]}}}, r"runs.a.command\[0\]=5"),
        ({"runs": {"a": {**RUN, "state": "done"}}}, "runs.a.state='done'"),
        ({"runs": {"a": {**RUN, "seconds": float("nan")}}}, "runs.a.seconds=nan"),
        *(
            ({"runs": {name: RUN}}, f"runs has the key '{name}', which must be a name of")
            for name in ("../x", "..", "a/b", "")
        ),
        ({"searches": ["x"]}, r"searches=\['x'\]"),
        ({"searches": {"base": "../.."}}, "searches.base='../..'"),
        ({"arms": [1]}, r"arms=\[1\]"),
        ({"arms": {"a": {}}}, "arms.a.method is missing"),
        ({"arms": {"a": {**ARM, "replicates": [{"seed": 1, "evaluate": "../e"}]}}}, "arms.a.*evaluate='../e'"),
        ({"suites": {"s": {"axis": 5}}}, "suites.s.axis=5"),
    ],
)
def test_what_the_runner_would_not_write_is_refused(changes, words, tmp_path):
    good = {"format": 1, "runs": {"t": RUN, "e": RUN}, "arms": {"a": ARM}, "searches": {"base": "e"}}
    (tmp_path / "experiments.json").write_text(json.dumps(good))
    assert read_experiments(tmp_path, whole=True) == good
    (tmp_path / "experiments.json").write_text(json.dumps({**good, **changes}))
    with pytest.raises(ValueError, match=f"is not what run_experiments.py writes .{words}"):
        read_experiments(tmp_path, whole=True)


BAD_RECORDS = {
    "[1]": "it holds list, no object",
    "{}": "state is missing",
    '{"state": "finished", "attempts": "1"}': "attempts='1'",
    '{"state": "finished", "attempts": 1, "environment": {"A": 1}}': "environment.A=1",
}


def test_a_record_that_the_runner_would_not_write_is_refused(tmp_path):
    file = tmp_path / "run.json"
    for content, words in BAD_RECORDS.items():
        file.write_text(content)
        with pytest.raises(ValueError, match=f"run.json is not .*{words}.*: delete its folder to run it again"):
            read_record(tmp_path)
    file.unlink()
    file.mkdir()
    with pytest.raises(ValueError, match=r"run.json is not .*it is no regular file.*: delete its folder"):
        read_record(tmp_path)


def test_a_run_that_starts_over_is_gone_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    """Killed while its folder is deleted, no result files are left that lack their record."""
    store = leave(tmp_path, {"evaluate-a-seed1": "interrupted"})
    folder = store.run_folder("evaluate-a-seed1")
    (folder / "meta_lora_cells.jsonl").write_text("of other settings\n")

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("metasft.files.atomic.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path, changes={"evaluate/all/n_runs": 3})
    assert not folder.exists()
    monkeypatch.undo()
    opened(tmp_path, changes={"evaluate/all/n_runs": 3})
    assert [entry.name for entry in folder.parent.iterdir() if entry.name.endswith(PARTIAL)] == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match=r"--output-dir leads to .*file/out, which cannot be written .*: give another"),
        locked(tmp_path / "file" / "out"),
    ):
        pass


# ---- one search per model type --------------------------------------------------------------------------------------


def test_the_named_arm_searches_and_the_others_of_its_type_wait_for_it(tmp_path):
    plan = plan_of(tmp_path, SEARCHED, {**SEARCH, "seeds": [4, 5]})
    searching = [name for name, run in plan.runs.items() if "--search-adaptation" in run.command]
    assert searching == ["evaluate-b-seed4", "evaluate-f-seed4"]
    assert flag(plan.runs["evaluate-b-seed4"].command, "--search-limit") == "2"
    chosen = str(tmp_path / "out" / "runs" / "evaluate-b-seed4" / "meta_lora_search.json")
    assert chosen in plan.runs["evaluate-b-seed4"].results
    for name in ("evaluate-a-seed4", "evaluate-a-seed5", "evaluate-b-seed5"):
        run = plan.runs[name]
        assert run.needs[-1] == "evaluate-b-seed4" and flag(run.command, "--adaptation-settings") == chosen
        assert "--adaptation-lr" not in run.command
    assert plan.searches["fomaml"].reason == "elsewhere, which the scale names, is in none of these suites"
    # A type that the scale does not search for keeps the scale's own settings.
    assert flag(plan.runs["evaluate-base-seed4"].command, "--adaptation-lr") == "0.001"
    assert {"train-a-seed5", "train-b-seed4", "evaluate-b-seed4"} <= set(plan.needed_by(["a"]))


def test_a_speed_curve_has_shots_that_the_search_chooses_for(tmp_path):
    speed = {"arms": ["a"], "steps": [0, 1], "shots": 2}
    assert plan_of(tmp_path, SEARCHED, {**SEARCH, "speed": speed})
    with pytest.raises(ValueError, match=r"arm a: speed.shots is 3, for which evaluate.search chooses nothing: add it"):
        plan_of(tmp_path, SEARCHED, {**SEARCH, "speed": {**speed, "shots": 3}})


def test_a_finished_search_serves_arms_that_come_later(tmp_path):
    store = opened(tmp_path, SEARCHED, SEARCH)
    store.save()
    for name in ("evaluate-b-seed1", "evaluate-a-seed1"):
        store.update(name, state="finished", attempts=1)
    assert opened(tmp_path, SEARCHED, SEARCH).records["evaluate-a-seed1"]["state"] == "finished"
    later = opened(tmp_path, {"c": {**META_LORA, "overrides": {"meta.inner_lr": 0.5}}}, SEARCH, name="later")
    command = later.plan.runs["evaluate-c-seed1"].command
    assert "--search-adaptation" not in command
    assert flag(command, "--adaptation-settings").endswith("runs/evaluate-b-seed1/meta_lora_search.json")
    assert later.plan.searches["meta_lora"].reason == "has searched in this output folder already"


def test_dry_run_shows_which_search_an_arm_waits_for(tmp_path, capsys):
    opened(tmp_path, SEARCHED, SEARCH).save()
    files = ["--suite", tmp_path / "try.yaml", "--scale", tmp_path / "small.yaml", "--output-dir", tmp_path / "out"]
    assert run_experiments.main([*map(str, files), "--dry-run", "--arms", "a"]) == 0
    printed = capsys.readouterr().out
    assert "evaluate-b-seed1/meta_lora_search.json" in printed
    assert "# adaptation of every meta_lora arm: optimizer and rate that evaluate-b-seed1 finds" in printed
    assert "fomaml" not in printed and "evaluate-base" not in printed


def test_one_search_does_not_serve_lora_and_all_parameters(tmp_path):
    reptile = {"label": "R", "method": "reptile"}
    arms = {"r": reptile, "rl": {**reptile, "overrides": {"model.lora_rank": 4, "model.lora_alpha": 8}}}
    with pytest.raises(ValueError, match="arm rl adapts LoRA, another arm of reptile does not: one search cannot"):
        plan_of(tmp_path, arms, {"evaluate/search": {"limit": 2, "arms": {"reptile": "r"}}})
