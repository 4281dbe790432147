"""The resume state ``global_step_<N>/``, the metrics that belong to it, and which state a run resumes from.

A folder holds one run: it is resumed from its newest complete state, and a run that is started over, or from an earlier
state, wants a folder without later ones. The state is veRL's (its files, its names, its tracker file), written so that
a crash at any moment leaves the last one intact: all ranks write into a temporary folder, which is flushed and renamed;
the tracker file moves last. The layout file in it says what wrote it and how large every file is, so that a damaged
copy is noticed. veRL's files are pickles, and reading a pickle can run code: a state is only read from the run's own
folder.
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

from metasft.checkpoint.tensors import read_tensors
from metasft.files.atomic import PARTIAL, flush, put_in_place, remove, replacing_file, write_json
from metasft.files.paths import user_path
from metasft.files.untrusted import is_inside, read_json
from metasft.training.faults import Divergence, DivergenceWatch, writing
from metasft.training.validation_tasks import Measured, better

LAYOUT_FILE = "layout.json"
RATES_FILE = "inner_rates.pt"
TASK_LORAS_FILE = "task_loras.pt"
TRACKER_FILE = "latest_checkpointed_iteration.txt"
STATE = "global_step_{step}"
SHARDS = ("model", "optim", "extra_state")
"""veRL's files of a rank."""

LAYOUT_KEYS = {
    "method": "the method",
    "world_size": "the number of processes",
    "task_group_size": "meta.task_group_size",
    "lora_rank": "model.lora_rank",
    "lora_alpha": "model.lora_alpha",
    "optimizer": "optim.optimizer",
    "learned_inner_lr": "meta.learned_inner_lr",
    "inner_rate_columns": "learned rates per tensor (meta.num_inner_steps)",
    "task_lora_rank": "meta.task_lora_rank",
    "seed": "trainer.seed",  # of the order in which examples are drawn, beyond the pass that was under way
    "custom_chat_template": "model.custom_chat_template (SHA-256)",
    "chat_template_kwargs": "data.apply_chat_template_kwargs",
    "base_model": "the files of model.path (SHA-256 of their ends)",
    "data": "the files of the tasks (SHA-256)",
}
"""What has to be equal on a resume, and what a user calls it."""

LATER_KEYS = ("lora_alpha", "optimizer", "seed", "custom_chat_template", "chat_template_kwargs", "base_model", "data")
"""Those that states of earlier releases do not hold."""
_BEFORE = {"learned_inner_lr": "none", "inner_rate_columns": 0, "task_lora_rank": None}
"""What states of earlier releases were saved with."""

logger = logging.getLogger(__name__)


# ---- writing --------------------------------------------------------------------------------------------------------


def save_state(
    run_dir: Path,
    step: int,
    *,
    engine: Any,
    sampler: Any,
    layout: Mapping[str, Any],
    learned: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write ``global_step_<step>/`` and let the tracker file point to it; called by every rank.

    Args:
        run_dir: ``trainer.default_local_dir``.
        step: meta-steps done.
        engine: writes model, optimizer, schedule and random states of this rank.
        sampler: its state dict is the position in every stream of examples.
        layout: what :func:`check_layout` and the trainer need again.
        learned: file name -> state of what is learned beside theta, the same on every rank.

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
            # What is kept is decided once the new state is complete, not before it is written.
            engine.save_checkpoint(str(partial), global_step=step, max_ckpt_to_keep=None)
            torch.save(sampler.state_dict(), partial / f"data_{rank}.pt")
            if rank == 0:
                for name, state in learned.items():
                    torch.save(dict(state), partial / name)
            for file in partial.rglob("*"):
                # Each rank flushes its own files (on a network drive nobody else can), rank 0 the rest.
                if rank == 0 or file.stem.endswith(f"_{rank}"):
                    flush(file)
        with writing(what, run_dir):
            if rank == 0:
                files = {str(file.relative_to(partial)): file.stat().st_size for file in _files(partial)}
                write_json(partial / LAYOUT_FILE, {**layout, "files": files})
                put_in_place(partial, target)
                with replacing_file(run_dir / TRACKER_FILE) as temporary:
                    temporary.write_text(str(step), encoding="utf-8")
    finally:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)


def read_learned(file: Path) -> dict[str, Any]:
    """A file of the ``learned`` of :func:`save_state`.

    Raises:
        ValueError: it is missing or damaged.
    """
    try:
        return read_tensors(file)
    except ValueError as error:
        raise ValueError(f"{file} cannot be read ({error}); delete {file.parent} to resume earlier") from error


def _files(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.rglob("*") if entry.is_file())


def prune(run_dir: Path, exports: Sequence[str], keep: int | None, best: int | None = None) -> None:
    """Delete all states and their exports but the newest ``keep`` (None or < 1 keeps all) and the best.

    Args:
        run_dir: ``trainer.default_local_dir``.
        exports: names of what one export consists of, with ``{step}`` in the place of the meta-step.
        keep: ``trainer.max_ckpt_to_keep``.
        best: the meta-step of the lowest loss on the validation tasks, where they are measured.
    """
    if keep is None or keep < 1:
        return
    for step in [step for step, _ in _states(run_dir)[keep:] if step != best]:
        for name in (*exports, STATE):  # the state last: without it nobody would know that the export may go
            entry = run_dir / name.format(step=step)
            if entry.exists():
                remove(entry)


def _states(run_dir: Path) -> list[tuple[int, Path]]:
    """(meta-step, folder) of all states in a folder, the newest first."""
    found = [(step, entry) for entry in run_dir.glob("global_step_*") if (step := step_of(entry)) is not None]
    return sorted(found, reverse=True)


# ---- finding --------------------------------------------------------------------------------------------------------


def find_state(run_dir: Path, mode: str, path: str | None) -> Path | None:
    """The state to resume from, the same on every rank: the newest complete one. None to start from the beginning.

    Args:
        run_dir: ``trainer.default_local_dir``.
        mode: ``trainer.resume_mode``, one of auto, disable, resume_path.
        path: ``trainer.resume_from_path``.

    Raises:
        ValueError: the mode is unknown; the path is not a complete state in ``run_dir``; the folder holds later states,
            or a run that is not to be resumed; or only damaged states are left.
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
        if any(run_dir.glob("*step_[0-9]*")):
            raise ValueError(
                f"trainer.resume_mode=disable, but trainer.default_local_dir={run_dir} holds checkpoints of an earlier "
                f"run, which would be mixed with those of this one; delete them (rm -r {run_dir}), or give another "
                "folder"
            )
        return None
    if mode == "resume_path" and path is None:
        raise ValueError("trainer.resume_from_path is not set; give a global_step_<N> folder, or set resume_mode=auto")
    if path is not None:
        return _named_state(run_dir, path)
    states = _states(run_dir)
    for _, folder in states:
        if (reason := _damage(folder, run_dir)) is None:
            return folder
        logger.warning("%s is not resumed from: %s", folder, reason)
    if states or (run_dir / TRACKER_FILE).exists():
        raise ValueError(
            f"{run_dir} holds no complete state of the run that was saved there; put one back, or delete the folder to "
            "start over"
        )
    return None


def _named_state(run_dir: Path, path: str) -> Path:
    """The state of ``trainer.resume_from_path``."""
    folder = user_path(path)
    named = step_of(folder)
    is_state = folder.is_dir() and named is not None
    reason = _damage(folder, run_dir) if is_state else "it is no global_step_<N> folder"
    if reason is not None:
        raise ValueError(f"trainer.resume_from_path={path} cannot be resumed from: {reason}")
    if later := [state.name for step, state in _states(run_dir) if named is not None and step > named]:
        raise ValueError(
            f"trainer.resume_from_path={path} is older than {', '.join(later)} in the same folder; delete those, or "
            "copy the folder and the exports up to it into another trainer.default_local_dir"
        )
    return folder


def step_of(folder: Path) -> int | None:
    """N of ``global_step_<N>``, None for another name."""
    match = re.fullmatch(r"global_step_([0-9]{1,18})", folder.name)
    return int(match.group(1)) if match else None


def _damage(folder: Path, run_dir: Path) -> str | None:
    """Why a state cannot be resumed from; None when it is whole (or of a writer that did not list its files)."""
    if folder.resolve().parent != run_dir.resolve():
        return (
            f"it is not in trainer.default_local_dir={run_dir}; its files are pickled, and reading those of somebody "
            "else can run their code: copy a state that you trust into that folder"
        )
    layout = folder / LAYOUT_FILE
    if not layout.is_file():
        return None  # check_layout() has the remedy
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
        if written.get("inner_rate_columns"):
            needed.append(RATES_FILE)
        if written.get("task_lora_rank"):
            needed.append(TASK_LORAS_FILE)
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
    """Check that a state was written by this layout of processes (veRL's files hold one shard per rank) and settings.

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
            "trainer.default_local_dir"
        )
    saved = read_json(path, "use another state")
    for key, name in LAYOUT_KEYS.items():
        found = saved.get(key, layout[key] if key in LATER_KEYS else _BEFORE.get(key))
        if found != layout[key]:
            raise ValueError(
                f"{folder} was saved with {name} = {found}, this run has {layout[key]}; resume with the same, "
                "or give another trainer.default_local_dir"
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
    """``metrics.jsonl``, one line per meta-step, cut back to the meta-step that a run resumes from.

    A line that cannot be written (a full disk) waits in memory for the next one; a checkpoint, which comes with
    :meth:`flush`, needs them all on the disk.

    Args:
        path: the file, created where it is missing.
        step: the meta-step that is resumed from; later lines are dropped, with 0 all of them.

    Attributes:
        costs: of each meta-step. Whole records, with several numbers per task, would make a long run grow by hundreds
            of megabytes.
        divergence: the watch over the losses; after a resume it knows those of the meta-steps before.
        best: the lowest loss on the validation tasks so far, likewise; None where none was measured.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        records = [record for record in read_metrics(path) if record["step"] <= step]
        with replacing_file(path) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        self.costs = [StepCost.of(record) for record in records]
        self.divergence = DivergenceWatch()
        self.best: Measured | None = None
        for record in records:
            self.divergence.add(record)
            self.best = better(self.best, record)
        self._size = path.stat().st_size
        self._waiting = ""

    def append(self, record: dict[str, Any]) -> list[Divergence]:
        """Add one meta-step's metrics; returns the losses that it shows to diverge for the first time."""
        self.costs.append(StepCost.of(record))
        self.best = better(self.best, record)
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
