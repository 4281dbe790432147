"""Which state a run goes on from, and the metrics that belong to it."""

from __future__ import annotations

import errno
import json
import logging
import tracemalloc
from pathlib import Path

import pytest

from metasft.resume import MetricsLog, _find_state, check_layout, read_metrics

LAYOUT = {"method": "fomaml", "world_size": 2, "task_group_size": 2, "lora_rank": 0, "seed": 1}


def make_state(run: Path, step: int, tracker: bool = True) -> Path:
    folder = run / f"global_step_{step}"
    folder.mkdir(parents=True)
    (folder / "model_world_size_1_rank_0.pt").write_text("x" * step)
    files = {"model_world_size_1_rank_0.pt": step}
    (folder / "layout.json").write_text(json.dumps({**LAYOUT, "skipped_steps": 3, "files": files}))
    if tracker:
        (run / "latest_checkpointed_iteration.txt").write_text(str(step))
    return folder


def test_the_tracker_file_is_in_charge(tmp_path):
    assert _find_state(tmp_path, "auto", None) is None
    make_state(tmp_path, 100)
    two = make_state(tmp_path, 2)
    assert _find_state(tmp_path, "auto", None) == two, "100 is of an earlier, longer run in the same folder"
    make_state(tmp_path, 4, tracker=False)
    assert _find_state(tmp_path, "auto", None) == two, "killed before the tracker file moved"
    assert _find_state(tmp_path, "disable", None) is None


@pytest.mark.parametrize("damage", ["missing folder", "missing file", "short file", "torn layout"])
def test_a_damaged_state_gives_way_to_the_one_before_it(damage, tmp_path, caplog):
    two, four = make_state(tmp_path, 2), make_state(tmp_path, 4)
    if damage == "missing folder":
        four.rename(tmp_path / "elsewhere")
    elif damage == "missing file":
        (four / "model_world_size_1_rank_0.pt").unlink()
    elif damage == "short file":
        (four / "model_world_size_1_rank_0.pt").write_text("x")
    else:
        (four / "layout.json").write_text('{"method": "fom')
    with caplog.at_level(logging.WARNING):
        assert _find_state(tmp_path, "auto", None) == two
    assert "which is not complete: going on from" in caplog.text
    (two / "model_world_size_1_rank_0.pt").unlink()
    with pytest.raises(ValueError, match=r"meta-step 4, but .* trainer\.resume_mode=disable"):
        _find_state(tmp_path, "auto", None)


def test_a_torn_tracker_file_of_another_writer_is_survived(tmp_path):
    make_state(tmp_path, 2)
    four = make_state(tmp_path, 4)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("")
    assert _find_state(tmp_path, "auto", None) == four


def test_a_path_to_resume_from_is_checked(tmp_path):
    four = make_state(tmp_path, 4)
    make_state(tmp_path, 6)
    for mode in ("auto", "resume_path"):
        assert _find_state(tmp_path, mode, str(four)) == four
    (four / "model_world_size_1_rank_0.pt").write_text("x")
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
    ("key", "words"), [("method", "the method"), ("world_size", "the number of processes"), ("seed", r"trainer\.seed")]
)
def test_another_layout_is_refused(key, words, tmp_path):
    folder = make_state(tmp_path, 2)
    assert check_layout(folder, LAYOUT)["skipped_steps"] == 3
    with pytest.raises(ValueError, match=rf"{words} = .* this run has other; .*trainer\.resume_mode=disable"):
        check_layout(folder, {**LAYOUT, key: "other"})


def test_states_of_earlier_releases_hold_no_seed_and_list_no_files(tmp_path):
    folder = make_state(tmp_path, 2)
    (folder / "layout.json").write_text(json.dumps({k: v for k, v in LAYOUT.items() if k != "seed"}))
    assert _find_state(tmp_path, "auto", None) == folder
    assert "skipped_steps" not in check_layout(folder, LAYOUT)


def measured(step: int, **more) -> dict:
    return {"step": step, "perf/step_seconds": 1.5, "perf/tokens": 10 * step, **more}


def test_metrics_are_cut_back_to_the_state(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(measured(step)) for step in (1, 2, 3)]
    path.write_text("\n".join([*lines, "7", '{"step": "2"}', '{"st']))
    log = MetricsLog(path, 2)
    log.append(measured(3, again=True))
    assert read_metrics(path) == [measured(1), measured(2), measured(3, again=True)]
    assert log.costs == [(1.5, 10), (1.5, 20), (1.5, 30)] and log.costs[0].seconds == 1.5
    assert MetricsLog(path, 0).costs == [] and path.read_text() == ""


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
