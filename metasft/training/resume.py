"""The resume state ``global_step_<N>/``, the metrics that belong to it, and which state a run goes on from.

The state is veRL's (its files, its names, its tracker file), written so that a crash at any moment leaves the last
complete one in charge: all ranks write into a temporary folder, which is flushed and renamed; the tracker file moves
last. The layout file in it says what wrote it and how large every file is, so that a damaged copy is noticed.
veRL's files are pickles, and reading a pickle can run code: a state is only read from the run's own folder.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from metasft.files.atomic import PARTIAL, flush, put_in_place, remove, replacing_file, write_json
from metasft.files.paths import user_path
from metasft.files.untrusted import is_inside, read_json
from metasft.training.faults import Divergence, DivergenceWatch, writing
from metasft.training.lineage import Lineage, Start

LAYOUT_FILE = "layout.json"
TRACKER_FILE = "latest_checkpointed_iteration.txt"
STATE = "global_step_{step}"
SHARDS = ("model", "optim", "extra_state")
"""veRL's files of a rank."""

UNKNOWN = "unknown"
"""Start of a state whose layout cannot be read: no start has this id."""

LAYOUT_KEYS = {
    "method": "the method",
    "world_size": "the number of processes",
    "task_group_size": "meta.task_group_size",
    "lora_rank": "model.lora_rank",
    "lora_alpha": "model.lora_alpha",
    "optimizer": "optim.optimizer",
    "seed": "trainer.seed",  # of the order in which examples are drawn, beyond the pass that was under way
    "custom_chat_template": "model.custom_chat_template (SHA-256)",
    "chat_template_kwargs": "data.apply_chat_template_kwargs",
    "base_model": "the files of model.path (SHA-256 of their ends)",
    "data": "the files of the tasks (SHA-256)",
}
"""What has to be equal on a resume, and what a user calls it."""

LATER_KEYS = ("lora_alpha", "optimizer", "seed", "custom_chat_template", "chat_template_kwargs", "base_model", "data")
"""Those that states of earlier releases do not hold."""

logger = logging.getLogger(__name__)


# ---- writing --------------------------------------------------------------------------------------------------------


def save_state(run_dir: Path, step: int, *, engine: Any, sampler: Any, layout: Mapping[str, Any]) -> None:
    """Write ``global_step_<step>/`` and let the tracker file point to it; called by every rank.

    Args:
        run_dir: ``trainer.default_local_dir``.
        step: meta-steps done.
        engine: writes model, optimizer, schedule and random states of this rank.
        sampler: its state dict is the position in every stream of examples.
        layout: what :func:`check_layout` and the trainer need again.

    Raises:
        RunFault: a rank could not write; nothing is left behind.
    """
    rank = dist.get_rank()
    what, target = f"the resume state of meta-step {step}", run_dir / STATE.format(step=step)
    partial = run_dir / f".{target.name}{PARTIAL}"
    try:
        with writing(what, run_dir):
            if rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        with writing(what, run_dir):
            # What is kept is decided once the new state is in charge, not before it is written.
            engine.save_checkpoint(str(partial), global_step=step, max_ckpt_to_keep=None)
            torch.save(sampler.state_dict(), partial / f"data_{rank}.pt")
            for file in partial.rglob("*"):
                # Each rank flushes its own files (on a network drive nobody else can), rank 0 the rest.
                if rank == 0 or file.stem.endswith(f"_{rank}"):
                    flush(file)
        with writing(what, run_dir):
            if rank == 0:
                files = {str(file.relative_to(partial)): file.stat().st_size for file in _files(partial)}
                write_json(partial / LAYOUT_FILE, {**layout, "files": files})
                put_in_place(partial, target)
                _track(run_dir, step)
    finally:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)


def _files(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.rglob("*") if entry.is_file())


def take_charge(run_dir: Path, state: Path | None) -> Lineage:
    """Put the state that a start goes on from in charge, and whatever else the folder holds out of it.

    A crash before the first save must not bring back an earlier run that was started over, nor later meta-steps than
    those that are gone on from.

    Args:
        state: from :func:`find_state`; None to start over.
    """
    if state is None:
        (run_dir / TRACKER_FILE).unlink(missing_ok=True)  # first: a lineage without a state is none to go on from
        lineage = Lineage(()).next_start(0)
        lineage.write(run_dir)
        return lineage
    step, start = step_of(state), _start_of(state)
    earlier = Lineage.read(run_dir)
    if earlier is None or not earlier.holds(start, step):
        earlier = Lineage((Start(start, step),))
    lineage = earlier.next_start(step)
    lineage.write(run_dir)
    newest = _tracked(run_dir)
    if newest != step:
        if newest is not None and newest > step:
            logger.warning(
                "going back from meta-step %d to %d, whose later states belong to this run no more; leave "
                "trainer.resume_from_path out when this run is started again, or it goes back again",
                newest,
                step,
            )
        _track(run_dir, step)
    return lineage


def _track(run_dir: Path, step: int) -> None:
    with replacing_file(run_dir / TRACKER_FILE) as temporary:
        temporary.write_text(str(step), encoding="utf-8")


def _tracked(run_dir: Path) -> int | None:
    """What the tracker file names; None where it names nothing."""
    try:
        text = (run_dir / TRACKER_FILE).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def prune(run_dir: Path, exports: Sequence[str], lineage: Lineage, keep: int | None) -> None:
    """Of what a run saved, states and exports, delete all but the newest ``keep`` (None or < 1 keeps all).

    Args:
        run_dir: ``trainer.default_local_dir``. What other runs saved there is left alone.
        exports: names of what one export consists of, with ``{step}`` in the place of the meta-step.
        lineage: of the run.
        keep: ``trainer.max_ckpt_to_keep``.
    """
    if keep is None or keep < 1:
        return
    saved = [step for step, folder in _states(run_dir) if lineage.holds(_start_of(folder), step)]
    for step in saved[keep:]:
        for name in (*exports, STATE):  # the state last: without it nobody would know that the export may go
            entry = run_dir / name.format(step=step)
            if entry.exists():
                remove(entry)


def _states(run_dir: Path) -> list[tuple[int, Path]]:
    """(meta-step, folder) of all states in a folder, the newest first."""
    found = [(step, entry) for entry in run_dir.glob("global_step_*") if (step := step_of(entry)) is not None]
    return sorted(found, reverse=True)


def _start_of(state: Path) -> str | None:
    """Id of the start that saved a state; None for releases that wrote none."""
    try:
        return read_json(state / LAYOUT_FILE, "").get("start")
    except ValueError:
        return UNKNOWN


# ---- finding --------------------------------------------------------------------------------------------------------


def find_state(run_dir: Path, mode: str, path: str | None) -> Path | None:
    """The state to go on from, the same on every rank; None to start from the beginning.

    That is the one the tracker file names, or where it is missing or damaged the newest complete one before it.

    Args:
        run_dir: ``trainer.default_local_dir``.
        mode: ``trainer.resume_mode``, one of auto, disable, resume_path.
        path: ``trainer.resume_from_path``.

    Raises:
        ValueError: the mode is unknown, the path is not a complete state in ``run_dir``, or the tracker file promises a
            state that is not there.
    """
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = _find_state(run_dir, mode, path)
        except ValueError as error:
            found[1] = str(error)
    dist.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise ValueError(found[1])
    return found[0]


def _find_state(run_dir: Path, mode: str, path: str | None) -> Path | None:
    if mode not in ("auto", "disable", "resume_path"):
        raise ValueError(f"trainer.resume_mode={mode!r} is unknown; choose one of auto, disable, resume_path")
    if mode == "disable":
        return None
    if mode == "resume_path" and path is None:
        raise ValueError("trainer.resume_from_path is not set; give a global_step_<N> folder, or set resume_mode=auto")
    if path is not None:
        folder = user_path(path)
        is_state = folder.is_dir() and step_of(folder) is not None
        reason = _damage(folder) if is_state else "it is no global_step_<N> folder"
        if reason is not None:
            raise ValueError(f"trainer.resume_from_path={path} cannot be resumed from: {reason}; choose another")
        if not _is_own(folder, run_dir):
            raise ValueError(
                f"trainer.resume_from_path={path} is not in the run's own folder, trainer.default_local_dir={run_dir}: "
                "resume state is pickled, and reading that of somebody else can run their code; to go on from a state "
                "you trust, copy it into that folder"
            )
        return folder
    tracker = run_dir / TRACKER_FILE
    if not tracker.is_file():
        return None
    newest, lineage = _tracked(run_dir), Lineage.read(run_dir)
    for step, folder in _states(run_dir):
        if newest is not None and step > newest:
            continue  # saved, but killed before the tracker file moved; or of a longer run
        reason = _damage(folder) if _is_own(folder, run_dir) else "it lies outside the run's own folder"
        if reason is None and lineage is not None and not lineage.holds(_start_of(folder), step):
            reason = "it is of another run in this folder, which was started over or gone on with from an earlier state"
        if reason is None:
            if step != newest:
                logger.warning("%s names %s, which is not complete: going on from %s", tracker, newest, folder)
            return folder
        logger.warning("%s is passed over: %s", folder, reason)
    raise ValueError(
        f"{tracker} names meta-step {newest}, but {run_dir} holds no complete state up to it; put it back, or set "
        "trainer.resume_mode=disable to start over"
    )


def step_of(folder: Path) -> int | None:
    """N of ``global_step_<N>``, None for another name."""
    match = re.fullmatch(r"global_step_([0-9]{1,18})", folder.name)
    return int(match.group(1)) if match else None


def _is_own(folder: Path, run_dir: Path) -> bool:
    """Whether a state lies in the folder of the run, links followed: veRL unpickles it, which runs what it holds."""
    return folder.resolve().parent == run_dir.resolve()


def _damage(folder: Path) -> str | None:
    """What is missing from a state, None when it is whole (or of a writer that did not list its files)."""
    layout = folder / LAYOUT_FILE
    if not layout.is_file():
        return None  # check_layout refuses it with the remedy
    try:
        written = read_json(layout, "")
    except ValueError:
        return f"its {LAYOUT_FILE} is damaged"
    files, size = written.get("files", {}), written.get("world_size")
    if not isinstance(files, dict) or not all(map(is_inside, files)) or type(size) is not int:
        return f"its {LAYOUT_FILE} is damaged"
    if "files" in written:
        ranks = [(f"_world_size_{size}_rank_{rank}.pt", f"data_{rank}.pt") for rank in range(size)]
        needed = [name for shard, data in ranks for name in (*(part + shard for part in SHARDS), data)]
        lacking = next((name for name in needed if name not in files), None)
        if lacking is not None:
            return f"its {LAYOUT_FILE} does not list {lacking}"
    for name, size in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} of {size} bytes"
    return None


def check_layout(folder: Path, layout: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse to resume from state that another layout of processes wrote: veRL's files hold one shard per rank.

    Args:
        folder: a ``global_step_<N>`` folder.
        layout: of this run, with the keys of :data:`LAYOUT_KEYS`.

    Returns:
        What the layout file of the state holds.

    Raises:
        ValueError: naming the first difference and the two ways on.
    """
    path = folder / LAYOUT_FILE
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no {LAYOUT_FILE}: it was not written by one of the episodic trainers; use another "
            "trainer.default_local_dir, or trainer.resume_mode=disable to start over"
        )
    saved = read_json(path, "use another state, or trainer.resume_mode=disable to start over")
    for key, name in LAYOUT_KEYS.items():
        if saved.get(key, layout[key] if key in LATER_KEYS else None) != layout[key]:
            raise ValueError(
                f"{folder} was saved with {name} = {saved.get(key)}, this run has {layout[key]}; resume with the same, "
                "or set trainer.resume_mode=disable to start over"
            )
    return saved


# ---- metrics --------------------------------------------------------------------------------------------------------


_MEASURED = {"perf/step_seconds", "perf/tokens", "perf/peak_memory_gb"}


class StepCost(NamedTuple):
    """What a meta-step cost.

    Attributes:
        seconds: wall-clock.
        tokens: in forwards that were followed by a backward.
        peak_bytes: of memory, since the process began to train.
    """

    seconds: float
    tokens: int
    peak_bytes: int

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> StepCost:
        return cls(record["perf/step_seconds"], record["perf/tokens"], int(record["perf/peak_memory_gb"] * 1024**3))


class MetricsLog:
    """``metrics.jsonl``, one line per meta-step, cut back to the meta-step that a run goes on from.

    A line that cannot be written (a full disk) waits in memory for the next one; a checkpoint, which comes with
    :meth:`flush`, needs them all on the disk.

    Args:
        path: the file, created where it is missing.
        step: the meta-step that is resumed from; later lines are dropped, with 0 all of them.

    Attributes:
        costs: of each meta-step. Whole records, with several numbers per task, would make a long run grow by hundreds
            of megabytes.
        divergence: the watch over the losses; after a resume it knows those of the meta-steps before.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        records = [record for record in read_metrics(path) if record["step"] <= step]
        with replacing_file(path) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        self.costs = [StepCost.of(record) for record in records]
        self.divergence = DivergenceWatch()
        for record in records:
            self.divergence.add(record)
        self._size = path.stat().st_size
        self._waiting = ""

    def append(self, record: dict[str, Any]) -> list[Divergence]:
        """Add one meta-step's metrics; returns the losses that it shows to diverge for the first time."""
        self.costs.append(StepCost.of(record))
        self._waiting += json.dumps(record) + "\n"
        try:
            self._write()
        except OSError as error:
            logger.warning("%s: %s; its newest lines wait in memory", self._path, error.strerror)
        return self.divergence.add(record)

    def flush(self) -> None:
        """Have everything on the disk. Raises OSError where that is impossible."""
        self._write()
        flush(self._path)

    def _write(self) -> None:
        with self._path.open("r+b") as file:
            file.truncate(self._size)  # part of a line that did not fit
            file.seek(self._size)
            file.write(self._waiting.encode())
        self._size += len(self._waiting.encode())
        self._waiting = ""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``; without the last line where a run was killed while writing it."""
    records = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line)
                if isinstance(record, dict) and type(record.get("step")) is int and record.keys() >= _MEASURED:
                    records.append(record)
    return records
