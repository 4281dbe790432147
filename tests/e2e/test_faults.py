"""A run is never lost: killed at any moment, told to stop, out of disk, poisoned with NaN, or with a rank gone astray.

The trainers run as their scripts run them, in processes that a server forks (tests/support/forked_ranks.py).
"""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from forked_ranks import ForkServer, Ranks
from resume_state import assert_complete, assert_same_run, metrics, read_state, same, saved_step
from safetensors.torch import load_file, save_file
from script_runner import ROOT, must_run, script_environment

STEPS, SAVE_EVERY = 9, 2
LORA = ["model.lora_rank=4", "model.lora_alpha=8", "meta.inner_lr=0.3"]
META_LORA = ("meta_lora_trainer.py", "config_meta_lora_guide", LORA)
FOMAML = ("maml_sft_trainer.py", "config_fomaml_math_science", ["meta.inner_lr=0.05", "optim.lr=1e-3"])
REPTILE = ("reptile_sft_trainer.py", "config_reptile_math_science", ["meta.inner_lr=0.05"])
LORA_ML = ("lora_ml_trainer.py", "config_lora_ml", [*LORA[:2], "meta.task_lora_rank=2"])
RATES = "meta.inner_lr_meta_lr=0.1"
RUNS = {
    # Schedules that depend on the meta-step, moments inside, random masks: everything that a resume could get wrong.
    "meta_lora": (META_LORA, 1, ["optim.lr_scheduler_type=cosine", "meta.adaptation_gain_freq=2"]),
    "meta_lora_dropout": (META_LORA, 1, ["+model.override_config.attention_dropout=0.2"]),
    "meta_lora_2": (
        META_LORA,
        2,
        ["meta.inner_optimizer=adamw", "meta.inner_lr=0.01", "meta.learned_inner_lr=per_tensor", RATES],
    ),
    "fomaml": (FOMAML, 1, ["meta.inner_optimizer=adamw", "meta.inner_lr=1e-3"]),
    "fomaml_2": (FOMAML, 2, ["optim.lr_scheduler_type=cosine", "meta.learned_inner_lr=per_tensor_per_step", RATES]),
    "reptile": (REPTILE, 1, []),
    "reptile_2": (REPTILE, 2, ["meta.reptile_update=pseudo_gradient", "optim.lr=1e-3"]),
    "lora_ml_2": (LORA_ML, 2, ["optim.lr_scheduler_type=cosine"]),
    "reptile_lora_2": (REPTILE, 2, [*LORA, "meta.inner_optimizer=adamw", "meta.inner_lr=0.01"]),
}


def slow(*values):
    """A case for `make test-all`: one of each kind is enough in between."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with ForkServer(tmp_path_factory.mktemp("logs"), ("fault_ranks",)) as started:
        yield started


@dataclass
class Run:
    """One command, started as often as it takes."""

    server: ForkServer
    name: str
    folder: Path
    data: list[str]
    changes: dict = field(default_factory=dict)

    @property
    def processes(self) -> int:
        return RUNS[self.name][1]

    @property
    def command(self) -> tuple[str, str, list[str]]:
        (script, config, overrides), _, more = RUNS[self.name]
        values = {
            "meta.support_samples": 24,
            "meta.num_inner_steps": 2,
            "meta.meta_batch_size": 2,
            "trainer.total_training_steps": STEPS,
            "trainer.save_freq": SAVE_EVERY,
            "trainer.max_ckpt_to_keep": 2,
            "trainer.logger": "[]",
            "trainer.default_local_dir": self.folder,
            **self.changes,
        }
        return script, config, [*overrides, *more, *self.data, *(f"{key}={value}" for key, value in values.items())]

    def start(self, **faults) -> Ranks:
        script, config, overrides = self.command
        arguments = {"script": script, "config_name": config, "overrides": overrides}
        return self.server.start("fault_ranks:train", processes=self.processes, **arguments, **faults)

    def finish(self, **faults) -> Ranks:
        ranks = self.start(**faults)
        assert ranks.wait() == [0] * self.processes, ranks.output[-6000:]
        return ranks

    @property
    def steps_done(self) -> int:
        file = self.folder / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def wait_for_steps(self, ranks: Ranks, more: int) -> None:
        """Until so many meta-steps are logged that were not when the run was started."""
        lines, deadline = 0, time.monotonic() + 300
        known = saved_step(self.folder)
        while lines < known + more and None in ranks.ended() and time.monotonic() < deadline:
            time.sleep(0.002)
            lines = self.steps_done


@pytest.fixture
def make_run(server, tiny_model, task_dir, tmp_path):
    def make(name: str, folder: str = "run", **changes) -> Run:
        data = [f"model.path={tiny_model}", f"meta.task_dir={task_dir}"]
        return Run(server, name, tmp_path / folder, data, {key.replace("__", "."): v for key, v in changes.items()})

    return make


@pytest.fixture
def uninterrupted(make_run):
    def folder(name: str, **changes) -> Path:
        run = make_run(name, "uninterrupted", **changes)
        run.finish()
        return run.folder

    return folder


# ---- kill -9 --------------------------------------------------------------------------------------------------------


def kill_at_random(run: Run, draw: random.Random) -> bool:
    """One life of a run, ended at a random moment or file operation. Returns whether it was killed."""
    before = saved_step(run.folder)
    if draw.random() < 0.5:
        crash = {"rank": draw.randrange(run.processes), "operation": draw.randint(1, 60), "torn": draw.random() < 0.5}
        ranks = run.start(crash=crash)
    else:
        ranks = run.start()
        run.wait_for_steps(ranks, draw.randint(0, 3))
        time.sleep(draw.uniform(0, 0.3))
        ranks.kill()
    killed = -signal.SIGKILL in ranks.wait()
    assert_complete(run.folder)
    assert saved_step(run.folder) >= before, "the tracker file never moves back"
    return killed


def survive(run: Run, uninterrupted: Path, kills: int, seed: int) -> int:
    """Kill a run so many times, starting it over whenever it got through, then let it finish. Returns the kills."""
    draw, survived = random.Random(seed), 0
    for _ in range(4 * kills):
        if survived == kills:
            break
        if saved_step(run.folder) == STEPS:
            run.finish()
            assert_same_run(uninterrupted, run.folder)
            run.folder = run.folder.with_name(f"{run.folder.name}_again")
        survived += kill_at_random(run, draw)
    last = run.finish()
    assert_same_run(uninterrupted, run.folder)
    assert "Traceback" not in last.output
    return survived


def test_a_run_killed_again_and_again_ends_as_if_it_never_was(make_run, uninterrupted, record_property):
    kills = 6
    survived = survive(make_run("meta_lora"), uninterrupted("meta_lora"), kills, seed=1)
    record_property("kills_survived", survived)
    assert survived == kills


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_many_kills_of_every_trainer(name, make_run, uninterrupted, record_property):
    kills = 8
    survived = survive(make_run(name), uninterrupted(name), kills, seed=len(name))
    record_property("kills_survived", survived)
    assert survived == kills


@pytest.mark.slow
def test_killed_at_every_file_operation_of_a_save(make_run, uninterrupted, record_property):
    """One save from its first operation to its last, each with a crash in front of it and one behind it."""
    straight = uninterrupted("fomaml", trainer__total_training_steps=2, trainer__save_freq=1)
    kills = 0
    for operation in range(1, 500, 3):
        run = make_run("fomaml", f"crash_{operation}", trainer__total_training_steps=2, trainer__save_freq=1)
        ranks = run.start(crash={"rank": 0, "operation": operation, "torn": bool(operation % 2)})
        codes = ranks.wait()
        assert_complete(run.folder)
        run.finish()
        assert_same_run(straight, run.folder)
        if codes == [0]:
            break
        kills += 1
    record_property("kills_survived", kills)
    assert kills > 10


# ---- SIGTERM --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["meta_lora_2", slow("fomaml_2"), slow("reptile")])
def test_sigterm_saves_and_the_run_goes_on(name, make_run, uninterrupted):
    """One rank alone gets the signal; all stop behind the same meta-step, at which no save was due, with code 0."""
    run = make_run(name, trainer__save_freq=-1)
    for step, behind, stopped in ((2, False, 2), (4, True, 5)):
        ranks = run.finish(stop={"rank": run.processes - 1, "step": step, "behind": behind})
        assert f"stopped by SIGTERM: meta-step {stopped} is saved" in ranks.output
        assert saved_step(run.folder) == stopped == run.steps_done
        assert not (run.folder / "run_summary.json").exists()
    run.finish()
    assert_same_run(uninterrupted(name, trainer__save_freq=-1), run.folder)


@pytest.mark.slow
def test_torchrun_hands_sigterm_on(make_run, uninterrupted):
    changes = {"trainer__save_freq": -1, "trainer__total_training_steps": 60}
    run = make_run("meta_lora_2", **changes)
    script, config, overrides = run.command
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    command += ["--config-name", config, *overrides]
    process = subprocess.Popen(
        command, cwd=ROOT, env=script_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while run.steps_done < 1 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    stopped = saved_step(run.folder)
    assert 0 < stopped < 60 and f"stopped by SIGTERM: meta-step {stopped} is saved" in output, output[-4000:]
    must_run(script, "--config-name", config, *overrides, processes=2)
    assert_same_run(uninterrupted("meta_lora_2", **changes), run.folder)


# ---- disks ----------------------------------------------------------------------------------------------------------


def the_error(ranks: Ranks) -> str:
    """The one sentence that a run ended with."""
    (line,) = [line for line in ranks.output.splitlines() if line.startswith("error:")]
    assert "Traceback" not in ranks.output, ranks.output[-4000:]
    return line


@pytest.mark.parametrize(
    ("name", "rank", "what", "words"),
    [
        slow("meta_lora", 0, ".global_step_4.partial", "the resume state of meta-step 4"),
        slow("meta_lora_2", 1, "rank_1.pt", "the resume state of meta-step 2"),
        ("reptile", 0, ".step_4.", "the export of meta-step 4"),
    ],
)
def test_a_full_disk_ends_the_run_in_one_sentence(name, rank, what, words, make_run, uninterrupted):
    run = make_run(name)
    ranks = run.start(full={"rank": rank, "what": what})
    assert ranks.wait() == [1] * run.processes, ranks.output[-6000:]
    error = the_error(ranks)
    assert words in error and "No space left on device" in error and "trainer.default_local_dir" in error
    assert_complete(run.folder)
    assert saved_step(run.folder) == (0 if name == "meta_lora_2" else 2)
    run.finish()
    assert_same_run(uninterrupted(name), run.folder)


@pytest.mark.slow
def test_a_file_system_that_fills_up(make_run, tmp_path):
    """The real thing, where file systems may be mounted: torch, safetensors and Python report it differently."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(small)], check=False)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs privileges that this machine does not give")
    try:
        run = make_run("fomaml", trainer__save_freq=1, trainer__max_ckpt_to_keep=100)
        run.folder = small / "run"
        ranks = run.start()
        assert ranks.wait() == [1], ranks.output[-6000:]
        error = the_error(ranks)
        assert "could not be written" in error and "MiB are free there" in error
        assert_complete(run.folder)
        saved = saved_step(run.folder)
        assert saved > 0
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        run.finish()
        assert saved_step(run.folder) == STEPS
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        ranks = run.start()
        assert ranks.wait() == [2]
        error = the_error(ranks)
        assert "trainer.default_local_dir" in error and "Read-only file system" in error
    finally:
        subprocess.run(["umount", str(small)], check=False)


def test_a_folder_that_cannot_be_written_is_named_at_once(make_run, tmp_path):
    run = make_run("meta_lora_2")
    (tmp_path / "file").write_text("")
    run.folder = tmp_path / "file" / "run"
    ranks = run.start()
    assert ranks.wait() == [2, 2], ranks.output[-4000:]
    assert "trainer.default_local_dir is" in the_error(ranks) and "is a file: give a folder" in the_error(ranks)


def test_nodes_that_do_not_share_the_output_folder_are_told_at_once(make_run, tmp_path):
    run = make_run("meta_lora_2")
    name = f"{tmp_path.name}-apart"
    run.folder = Path("results") / name  # from where a rank works
    (tmp_path / run.folder).mkdir(parents=True)
    (tmp_path / run.folder / ".trainer.lock").write_text("")  # of a run that was killed there
    ranks = run.start(apart={"rank": 1, "folder": str(tmp_path)})
    assert ranks.wait() == [2, 2], ranks.output[-4000:]
    error = the_error(ranks)
    assert f"trainer.default_local_dir is {run.folder}" in error and "rank 1" in error and "nodes share" in error
    assert not (ROOT / run.folder).exists()


# ---- losses and gradients that are not finite -----------------------------------------------------------------------

NUMERICAL = [
    # name, poison, its inner step, where the sentence sees it
    slow("meta_lora", "support_loss", 2, "the support loss of task 'mul' is nan at inner step 2 of 2"),
    ("meta_lora", "support_gradient", 1, "'mul' is nan at inner step 2 of 2, after the update of inner step 1"),
    slow("meta_lora_2", "query_loss", 1, "the query loss of task 'mul' is nan after inner step 2"),
    slow("meta_lora", "query_gradient", 1, "contribution to the meta-step of task 'mul' is nan after inner step 2"),
    slow("fomaml", "query_gradient", 1, "contribution to the meta-step of task 'mul' is nan after inner step 2"),
    slow("fomaml_2", "support_loss", 1, "the support loss of task 'mul' is nan at inner step 1 of 2"),
    ("reptile", "support_gradient", 2, "the query loss of task 'mul' is nan after inner step 2"),
    slow("lora_ml_2", "query_gradient", 1, "contribution to the meta-step of task 'mul' is nan"),
    slow("reptile_2", "support_loss", 2, "the support loss of task 'mul' is nan at inner step 2 of 2"),
]


@pytest.mark.parametrize(("name", "what", "inner_step", "words"), NUMERICAL)
def test_a_number_that_is_not_finite_costs_its_meta_step_alone(name, what, inner_step, words, make_run):
    changes = {"meta__meta_batch_size": 4, "trainer__total_training_steps": 3, "trainer__save_freq": 1}
    run = make_run(name, trainer__max_ckpt_to_keep="null", **changes)
    ranks = run.finish(poison={"what": what, "task": "mul", "step": 2, "inner_step": inner_step})
    (warning,) = [line for line in ranks.output.splitlines() if "counts as skipped" in line]
    assert "meta-step 2: " in warning and words in warning and "(1 of at most 10)" in warning
    states = {step: read_state(run.folder, step) for step in (1, 2, 3)}
    for file in states[1]:
        if file.startswith(("model", "optim", "inner_rates", "task_loras")):
            unmoved = {k: states[s][file] for k, s in (("before", 1), ("after", 2))}
            if file.startswith(("model", "inner_rates", "task_loras")):
                assert same(unmoved["before"], unmoved["after"]), "theta and learned rates are left as they were"
                assert not same(states[2][file], states[3][file]), "and goes on to move"
            elif unmoved["before"]["state"]:
                assert same(unmoved["before"]["state"], unmoved["after"]["state"])
    assert ("inner_rates.pt" in states[1]) is (name in ("meta_lora_2", "fomaml_2"))
    assert [record["meta/skipped_steps"] for record in metrics(run.folder)] == [0, 1, 1]
    last = metrics(run.folder)[-1]
    assert all(value == value for value in last.values()), "nothing of it is left in the meta-step behind"


def test_saves_of_skipped_meta_steps_do_not_push_out_the_last_good_one(make_run):
    """An outer rate that throws theta far off: every meta-step behind the first is skipped, and saved."""
    run = make_run("meta_lora", optim__lr=1e4, meta__max_skipped_steps=4, trainer__save_freq=1)
    run.changes["trainer.max_ckpt_to_keep"] = 1
    ranks = run.start()
    assert ranks.wait() == [1]
    error = the_error(ranks)
    assert "optim.lr" in error and error.endswith("the last checkpoint is that of meta-step 5")
    kept = {int(state.name.rpartition("_")[2]) for state in run.folder.glob("global_step_*")}
    assert kept == {1, 2, 3, 4, 5} and (run.folder / "meta_lora_checkpoint_step_1.pt").exists()


def test_too_many_skipped_meta_steps_end_the_run_also_across_a_resume(make_run):
    run = make_run("meta_lora", meta__meta_batch_size=4, meta__max_skipped_steps=2, trainer__save_freq=1)
    poison = {"what": "query_loss", "task": "cat", "step": -2, "value": "inf"}
    stopped = make_run("meta_lora", meta__meta_batch_size=4, meta__max_skipped_steps=2, trainer__save_freq=1)
    stopped.changes["trainer.total_training_steps"] = 3
    stopped.finish(poison=poison)
    ranks = run.start(poison=poison)
    assert ranks.wait() == [1]
    error = the_error(ranks)
    assert "meta-step 4: the query loss of task 'cat' is inf after inner step 2" in error
    assert "meta.max_skipped_steps=2" in error and saved_step(run.folder) == 3


# ---- ranks that differ ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "found", "saved"), [slow(3, 3, 0), (100, 4, 0)])
def test_a_rank_that_trains_another_model_ends_the_run(every, found, saved, make_run):
    run = make_run("meta_lora_2", meta__theta_check_freq=every, trainer__save_freq=4)
    ranks = run.start(drift={"rank": 1, "step": 2})
    assert ranks.wait() == [1, 1], ranks.output[-4000:]
    error = the_error(ranks)
    assert f"meta-step {found}: theta on rank 1 is no longer bit for bit that of rank 0" in error
    assert saved_step(run.folder) == saved and re.search(rf"since meta-step {saved}\b", error)
    run.finish()


def test_shards_of_one_model_are_not_compared_with_each_other(make_run):
    make_run("fomaml_2", meta__theta_check_freq=1, trainer__total_training_steps=2).finish()


# ---- exact resume ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [slow(name) for name in RUNS])
def test_several_resumes_equal_an_uninterrupted_run(name, make_run, uninterrupted):
    """Stopped three times, twice behind a meta-step that is no save step; every stream, moment and mask goes on."""
    straight = uninterrupted(name)
    run = make_run(name)
    for step in (3, 4, 7):
        run.finish(stop={"rank": 0, "step": step})
        assert saved_step(run.folder) == step
    run.finish()
    assert_same_run(straight, run.folder)


# ---- other commands in the same folder ------------------------------------------------------------------------------


def summary(run: Run) -> dict:
    return json.loads((run.folder / "run_summary.json").read_text())


def started_again(run: Run, **changes) -> Run:
    more = {key.replace("__", "."): value for key, value in changes.items()}
    return replace(run, changes={**run.changes, **more})


@pytest.mark.slow
def test_a_summary_is_that_of_the_run_in_the_folder(make_run):
    run = make_run("meta_lora", trainer__total_training_steps=4)
    run.finish()
    first, config = summary(run), (run.folder / "config.yaml").read_text()
    nothing = started_again(run, optim__lr=0.7)
    assert "nothing to do" in nothing.finish().output
    assert (run.folder / "config.yaml").read_text() == config and summary(run) == first
    longer = started_again(run, trainer__total_training_steps=6)
    longer.finish(stop={"rank": 0, "step": 5})
    assert not (run.folder / "run_summary.json").exists()
    longer.finish()
    peaks = [line["perf/peak_memory_gb"] for line in map(json.loads, (run.folder / "metrics.jsonl").open())]
    assert summary(run)["meta_steps"] == 6 and summary(run)["peak_memory_bytes"] >= max(peaks) * 2**30
    over = started_again(run, meta__num_inner_steps=1, trainer__resume_mode="disable")
    ranks = over.start()
    assert ranks.wait() == [2] and "holds checkpoints of an earlier run" in the_error(ranks)
    shutil.rmtree(run.folder)
    over.finish()
    (run.folder / "run_summary.json").rename(run.folder / "kept.json")
    tokens = json.loads((run.folder / "kept.json").read_text())["tokens"]
    assert tokens < first["tokens"]
    started_again(over, trainer__resume_mode="auto").finish()
    assert summary(run)["tokens"] == tokens and summary(run)["peak_memory_bytes"] >= max(peaks[-4:]) * 2**30 * 0.5


def test_a_resumed_run_follows_the_schedule_of_its_command(make_run):
    """veRL's state brings back the learning rates it was saved with."""
    run = make_run("meta_lora", trainer__total_training_steps=4)
    run.finish()
    started_again(run, trainer__total_training_steps=8, optim__lr=0.02, optim__weight_decay=0.3).finish()
    rates = [line["train/lr"] for line in metrics(run.folder)]
    assert rates[4:] == pytest.approx([0.02 * (1 + math.cos(math.pi * step / 8)) / 2 for step in (4, 5, 6, 7)])
    (group,) = read_state(run.folder, 8)["optim_world_size_1_rank_0.pt"]["param_groups"]
    assert group["weight_decay"] == 0.3 and group["initial_lr"] == 0.02


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.lora_alpha": 64}, "model.lora_alpha = 8, this run has 64"),
        ({"optim.optimizer": "SGD"}, "optim.optimizer = torch.optim.AdamW, this run has torch.optim.SGD"),
        ({"meta.task_dir": "other tasks"}, "the files of the tasks (SHA-256) = "),
        ({"model.path": "other model"}, "the files of model.path (SHA-256 of their ends) = "),
    ],
)
def test_a_run_does_not_go_on_with_something_else(change, words, make_run, tiny_model, task_dir, tmp_path):
    run = make_run("meta_lora", trainer__total_training_steps=2)
    run.finish()
    shutil.copytree(task_dir, tmp_path / "other tasks")
    one, other = (tmp_path / "other tasks" / f"{task}_support.parquet" for task in ("add", "mul"))
    one.write_bytes(other.read_bytes())
    weights = shutil.copytree(tiny_model, tmp_path / "other model") / "model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    change = {key: tmp_path / value if key.endswith(("dir", "path")) else value for key, value in change.items()}
    changed = started_again(run, trainer__total_training_steps=4, **change)
    changed.data = [entry for entry in run.data if entry.partition("=")[0] not in change]
    ranks = changed.start()
    assert ranks.wait() == [2], ranks.output[-4000:]
    assert words in the_error(ranks) and saved_step(run.folder) == 2


def test_a_run_that_goes_back_wants_the_later_states_deleted(make_run):
    run = make_run("reptile", trainer__total_training_steps=6)
    run.finish()
    branch = started_again(
        run,
        trainer__resume_from_path=run.folder / "global_step_4",
        trainer__total_training_steps=9,
        meta__inner_lr=0.01,
    )
    ranks = branch.start()
    assert ranks.wait() == [2] and "is older than global_step_6" in the_error(ranks)
    shutil.rmtree(run.folder / "global_step_6")
    branch.changes["trainer.save_freq"] = 100
    ranks = branch.start(stop={"rank": 0, "step": 5}, crash={"rank": 0, "operation": 12, "torn": False})
    assert -signal.SIGKILL in ranks.wait()
    del branch.changes["trainer.resume_from_path"]
    branch.finish()
    assert [line["step"] for line in metrics(run.folder)] == list(range(1, 10)) and summary(run)["meta_steps"] == 9
