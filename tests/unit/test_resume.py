"""Which state a run goes on from, and the metrics that belong to it."""

from __future__ import annotations

import errno
import json
import logging
import shutil
import tracemalloc
from pathlib import Path

import pytest

from metasft.training.resume import MetricsLog, _find_state, check_layout, prune, read_metrics

EARLIEST = {"method": "fomaml", "world_size": 1, "task_group_size": 1, "lora_rank": 0}
LATER = {
    "seed": 1,
    "lora_alpha": None,
    "optimizer": "torch.optim.AdamW",
    "learned_inner_lr": "none",
    "inner_rate_columns": 0,
    "task_lora_rank": None,
    "base_model": None,
    "data": "ab12",
    "custom_chat_template": None,
    "chat_template_kwargs": {},
}
LAYOUT = {**EARLIEST, **LATER}
MODEL = "model_world_size_1_rank_0.pt"
FILES = (MODEL, "optim_world_size_1_rank_0.pt", "extra_state_world_size_1_rank_0.pt", "data_0.pt")


def make_state(run: Path, step: int, tracker: bool = True) -> Path:
    folder = run / f"global_step_{step}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).write_text("x" * step)
    layout = {**LAYOUT, "skipped_steps": 3, "files": dict.fromkeys(FILES, step)}
    (folder / "layout.json").write_text(json.dumps(layout))
    if tracker:
        (run / "latest_checkpointed_iteration.txt").write_text(str(step))
    return folder


def test_a_run_is_resumed_from_its_newest_state(tmp_path):
    assert _find_state(tmp_path, "auto", None) is None
    make_state(tmp_path, 2)
    four = make_state(tmp_path, 4, tracker=False)  # killed before the tracker file moved
    assert _find_state(tmp_path, "auto", None) == four


@pytest.mark.parametrize("left", ["global_step_2", "step_2", "adapter_step_2", "meta_lora_checkpoint_step_2.pt"])
def test_a_fresh_start_wants_a_folder_without_checkpoints(left, tmp_path):
    assert _find_state(tmp_path, "disable", None) is None
    (tmp_path / left).mkdir()
    with pytest.raises(ValueError, match=rf"trainer\.resume_mode=disable, .*delete them \(rm -r {tmp_path}\)"):
        _find_state(tmp_path, "disable", None)


@pytest.mark.parametrize("damage", ["missing folder", "missing file", "short file", "torn layout", "no files listed"])
def test_a_damaged_state_gives_way_to_the_one_before_it(damage, tmp_path, caplog):
    two, four = make_state(tmp_path, 2), make_state(tmp_path, 4)
    if damage == "missing folder":
        four.rename(tmp_path / "elsewhere")
    elif damage == "missing file":
        (four / MODEL).unlink()
    elif damage == "short file":
        (four / MODEL).write_text("x")
    elif damage == "torn layout":
        (four / "layout.json").write_text('{"method": "fom')
    else:
        (four / "layout.json").write_text(json.dumps({**LAYOUT, "files": {}}))
    with caplog.at_level(logging.WARNING):
        assert _find_state(tmp_path, "auto", None) == two
    assert ("global_step_4 is not resumed from" in caplog.text) == (damage != "missing folder")
    (two / MODEL).unlink()
    with pytest.raises(ValueError, match=r"holds no complete state .* delete the folder to start over"):
        _find_state(tmp_path, "auto", None)


def test_a_torn_tracker_file_of_another_writer_is_survived(tmp_path):
    make_state(tmp_path, 2)
    four = make_state(tmp_path, 4)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("")
    assert _find_state(tmp_path, "auto", None) == four


def test_a_path_to_resume_from_is_checked(tmp_path):
    two, four = make_state(tmp_path, 2), make_state(tmp_path, 4)
    with pytest.raises(ValueError, match=r"global_step_2 is older than global_step_4 in the same folder; delete"):
        _find_state(tmp_path, "auto", str(two))
    for mode in ("auto", "resume_path"):
        assert _find_state(tmp_path, mode, str(four)) == four
    (four / MODEL).write_text("x")
    for path, words in (
        (four, "has 1 of 4 bytes"),
        (tmp_path / "global_step_9", "no global_step_<N> folder"),
        (tmp_path, "no global_step_<N> folder"),
    ):
        with pytest.raises(ValueError, match=f"trainer.resume_from_path={path} cannot be resumed from.*{words}"):
            _find_state(tmp_path, "resume_path", str(path))
    with pytest.raises(ValueError, match=r"trainer\.resume_from_path is not set"):
        _find_state(tmp_path, "resume_path", None)
    with pytest.raises(ValueError, match=r"trainer\.resume_mode='newest' is unknown"):
        _find_state(tmp_path, "newest", None)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("method", "the method"),
        ("world_size", "the number of processes"),
        ("seed", r"trainer\.seed"),
        ("lora_alpha", r"model\.lora_alpha"),
        ("optimizer", r"optim\.optimizer"),
        ("learned_inner_lr", r"meta\.learned_inner_lr"),
        ("inner_rate_columns", r"learned rates per tensor \(meta\.num_inner_steps\)"),
        ("task_lora_rank", r"meta\.task_lora_rank"),
        ("base_model", r"the files of model\.path \(SHA-256 of their ends\)"),
        ("data", r"the files of the tasks \(SHA-256\)"),
        ("custom_chat_template", r"model\.custom_chat_template \(SHA-256\)"),
        ("chat_template_kwargs", r"data\.apply_chat_template_kwargs"),
    ],
)
def test_another_layout_is_refused(key, words, tmp_path):
    folder = make_state(tmp_path, 2)
    assert check_layout(folder, LAYOUT)["skipped_steps"] == 3
    with pytest.raises(ValueError, match=rf"{words} = .* this run has other; .*trainer\.default_local_dir"):
        check_layout(folder, {**LAYOUT, key: "other"})


def test_states_of_earlier_releases_hold_less_and_list_no_files(tmp_path):
    folder = make_state(tmp_path, 2)
    (folder / "layout.json").write_text(json.dumps(EARLIEST))
    assert _find_state(tmp_path, "auto", None) == folder
    assert "skipped_steps" not in check_layout(folder, LAYOUT)
    with pytest.raises(ValueError, match=r"was saved with meta.learned_inner_lr = none, this run has per_tensor;"):
        check_layout(folder, {**LAYOUT, "learned_inner_lr": "per_tensor", "inner_rate_columns": 1})


def test_the_newest_states_and_their_exports_are_kept(tmp_path):
    exports = ("step_{step}", "run_checkpoint_step_{step}.pt")
    for step in (2, 4, 6):
        make_state(tmp_path, step)
        (tmp_path / f"step_{step}").mkdir()
        (tmp_path / f"run_checkpoint_step_{step}.pt").write_text("")
    for keep, best, left in ((None, 2, {2, 4, 6}), (0, None, {2, 4, 6}), (1, 2, {2, 6}), (1, 6, {6}), (1, None, {6})):
        prune(tmp_path, exports, keep, best)
        for name in ("global_step_{step}", *exports):
            assert {step for step in (2, 4, 6) if (tmp_path / name.format(step=step)).exists()} == left


# ---- metrics --------------------------------------------------------------------------------------------------------


def measured(step: int, **more) -> dict:
    return {"step": step, "perf/step_seconds": 1.5, "perf/tokens": 10 * step, "perf/peak_memory_gb": 0.5, **more}


def test_metrics_are_cut_back_to_the_state(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(measured(step)) for step in (1, 2, 3)]
    path.write_text("\n".join([*lines, "7", '{"step": "2"}', '{"step": 0}', '{"st']))
    log = MetricsLog(path, 2)
    log.append(measured(3, again=True))
    assert read_metrics(path) == [measured(1), measured(2), measured(3, again=True)]
    assert log.costs == [(1.5, 10, 2**29), (1.5, 20, 2**29), (1.5, 30, 2**29)] and log.costs[0].seconds == 1.5
    assert MetricsLog(path, 0).costs == [] and path.read_text() == ""


def test_a_resumed_run_compares_its_losses_with_those_at_its_start_and_warns_once(tmp_path):
    path, metric = tmp_path / "metrics.jsonl", "meta/query_loss_after"
    losses = [1.0] * 10 + [9.0] * 15
    found = []
    for step, loss in enumerate(losses, start=1):  # as if it were resumed behind every meta-step
        found += MetricsLog(path, step - 1).append(measured(step, **{metric: loss}))
    assert [(one.metric, one.step, one.factor) for one in found] == [(metric, 20, 9.0)]
    assert MetricsLog(path, 25).divergence.found == found
    assert MetricsLog(path, 15).divergence.found == []  # gone back to a state before


def test_the_best_measured_meta_step_is_known_after_a_resume(tmp_path):
    path, losses = tmp_path / "metrics.jsonl", {2: 3.0, 4: float("nan"), 6: 1.0, 8: 2.0}
    for step in range(1, 9):  # as if it were resumed behind every meta-step
        MetricsLog(path, step - 1).append(measured(step, **({"valid/loss": losses[step]} if step in losses else {})))
    assert MetricsLog(path, 8).best == (6, 1.0)
    assert MetricsLog(path, 5).best == (2, 3.0)  # gone back to a state before
    assert MetricsLog(path, 1).best is None


def test_a_long_run_does_not_keep_its_metrics_in_memory(tmp_path):
    """With several numbers for each of 64 tasks, a meta-step's record is some ten kilobytes."""
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    tracemalloc.start()
    for step in range(1, 301):
        names = (f"{key}/{task}" for key in ("inner/support_loss", "meta/query_loss_after") for task in range(64))
        log.append(measured(step, **{name: step / 7 for name in names}))
        if step == 100:
            before = tracemalloc.get_traced_memory()[0]
    grown = (tracemalloc.get_traced_memory()[0] - before) / 200
    tracemalloc.stop()
    assert grown < 500, f"{grown:.0f} bytes per meta-step"


def test_lines_that_find_no_room_wait_for_the_next_one(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    log.append(measured(1))
    write = MetricsLog._write

    def half(self):
        with path.open("ab") as file:
            file.write(self._waiting.encode()[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(MetricsLog, "_write", half)
    log.append(measured(2))
    with pytest.raises(OSError, match="No space"):
        log.flush()
    monkeypatch.setattr(MetricsLog, "_write", write)
    log.append(measured(3))
    log.flush()
    assert path.read_text() == "".join(json.dumps(measured(step)) + "\n" for step in (1, 2, 3))
