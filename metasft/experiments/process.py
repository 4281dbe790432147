"""One run: the script as a subprocess with its log and its costs, and nothing of it outlives the scheduler.

    python -m metasft.experiments.process <run folder> <process id of the caller>

does what ``run.json`` in the folder says and writes there how it went. It stands between a Ray worker and the script
because a worker may be killed without a chance to clean up: this process hears of that from the kernel and ends the
whole tree below it.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import psutil

from metasft.checkpoint.exports import size_bytes
from metasft.config.records import read_record, write_record
from metasft.experiments.provenance import device_name, package_versions
from metasft.experiments.store import LOG_FILE, locked, now
from metasft.experiments.suites import ROOT
from metasft.files.atomic import write_json

LOG_LINES = 20
GRACE_SECONDS = 10.0
SAVING_SECONDS = 600.0  # a trainer that is asked to stop saves at the end of its meta-step, which may take minutes
END_NOW_FILE = ".end-now"  # in a run's folder: who stops it waits for no saving
POLL_SECONDS = 0.05
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
# Sent by whoever takes a machine back or stops a run; SIGKILL is not among them, it may be a lack of memory.
_ASKED_TO_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# torchrun, which exits with 1 then, whether or not its workers have saved.
_TORCHRUN_SIGNALLED = re.compile(r"SignalException: Process \d+ got signal: (\d+)")
# Of an enclosing torchrun or Ray worker: they would make the script part of a world that it does not belong to.
_NOT_INHERITED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def grace_seconds(kind: str | None) -> float:
    """What a run of this kind gets between being asked to stop and being ended by force."""
    return SAVING_SECONDS if kind == "train" else GRACE_SECONDS


def leaving_seconds(kind: str | None) -> float:
    """Until a run that has been asked to stop is gone for sure."""
    return grace_seconds(kind) + 2 * GRACE_SECONDS


class Stopped(BaseException):
    """The caller is gone, or asks to stop."""


def main(folder: Path, caller: int) -> int:
    """Returns the exit code: 0 when the run finished."""
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what the script leaves behind becomes a child of this process
    record = read_record(folder)
    if record is None or os.getppid() != caller:  # it died before the kernel was asked to tell
        return 1
    try:
        # Processes of an interrupted attempt may need a moment to die.
        with locked(folder, wait=leaving_seconds(record.get("kind"))) as lock:
            (folder / END_NOW_FILE).unlink(missing_ok=True)
            record = {**record, "state": "running", "attempts": record["attempts"] + 1, "started": now(), "error": None}
            try:
                write_record(folder, record)
                outcome = {**_execute(folder, record, lock), "finished": now()}
                _heed_no_signals()
            except Stopped:
                outcome = {"state": "interrupted", "error": "it was stopped with its runner"}
            write_record(folder, {**record, **outcome})
            return 0 if outcome["state"] == "finished" else 1
    except BlockingIOError:
        error = f"another process still works in {folder.name}"
        write_record(folder, {**record, "state": "failed", "error": error, "finished": now()})
        return 1
    except Stopped:  # while it waited for the lock: nothing has been started
        return 1


def _execute(folder: Path, record: Mapping[str, Any], lock: IO[str]) -> dict[str, Any]:
    """Run the command to its end. Returns what changes in the record."""
    environment = {key: value for key, value in os.environ.items() if key not in _NOT_INHERITED}
    if record.get("kind") == "train":  # after which torchrun ends its workers by force
        environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", f"{SAVING_SECONDS:.0f}")
    environment |= {"PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "10", **record["environment"]}
    # `python` and `torchrun` of a command are those of this environment, activated or not.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    if not record["gpus"]:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    log_path, metrics = folder / LOG_FILE, folder / "metrics.jsonl"
    if record["summary"]:
        metrics.unlink(missing_ok=True)  # of an earlier attempt, which starts over
    started = time.monotonic()
    with log_path.open("ab") as log:
        log.write(f"--- attempt {record['attempts']}, {record['started']}: {' '.join(record['command'])}\n".encode())
        log.flush()
        begin = log.tell()
        try:  # Popen as well: a signal may come when the script is there and Popen has not returned
            process = subprocess.Popen(
                record["command"], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, pass_fds=(lock.fileno(),), preexec_fn=_end_with_parent,
            )  # fmt: skip
            returncode, peak, step_times = _wait(process.pid, metrics if record["summary"] else None)
        except OSError as error:
            return {
                "state": "failed",
                "returncode": None,
                "seconds": 0.0,
                "error": f"{record['command'][0]}: {error.strerror}",
            }
        except Stopped:
            _end_descendants(grace_seconds(record.get("kind")), at_once=folder / END_NOW_FILE)
            raise
        finally:
            _end_descendants(GRACE_SECONDS)
    state, error = _how_it_ended(returncode, record["results"], _logged(log_path, begin))
    outcome = {
        "returncode": returncode,
        "seconds": round(time.monotonic() - started, 3),
        "peak_memory_bytes": peak,
        "state": state,
        "error": error,
    }
    if record["summary"] and state == "finished":
        _write_summary(folder, record, outcome, [moment - started for moment in step_times])
    return outcome


def _how_it_ended(returncode: int, results: Sequence[str], logged: str) -> tuple[str, str | None]:
    """State and error of a run whose script has ended.

    Args:
        results: files that a finished run leaves; a trainer that was asked to stop saves, exits with 0 and leaves none.
    """
    if returncode == 0:
        missing = [file for file in results if not (ROOT / file).is_file()]
        return ("interrupted", f"it ended without {Path(missing[0]).name}") if missing else ("finished", None)
    signals = {-returncode, *map(int, _TORCHRUN_SIGNALLED.findall(logged))} & set(_ASKED_TO_STOP)
    if signals:
        return "interrupted", f"it was ended by {signal.Signals(signals.pop()).name}"
    return "failed", _last_lines(logged) or f"exit code {returncode}, nothing was logged"


def _wait(pid: int, metrics: Path | None) -> tuple[int, int, list[float]]:
    """Wait for a child.

    Args:
        metrics: a file that grows by a line per step, whose growth is timed; None: none is.

    Returns:
        Its exit code (negative: the signal), the peak resident bytes of its largest process, and when steps ended.
    """
    times: list[float] = []
    size = 0
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if metrics is not None and metrics.is_file() and (current := metrics.stat().st_size) > size:
            size = current
            times.append(time.monotonic())
        if ended:
            # Of the child and of those of its descendants that were waited for, the largest.
            unit = 1 if sys.platform == "darwin" else 1024
            return os.waitstatus_to_exitcode(status), usage.ru_maxrss * unit, times
        time.sleep(POLL_SECONDS)


def _end_descendants(grace: float, at_once: Path | None = None) -> None:
    """End whatever is left below this process: first by asking, then by force.

    Args:
        grace: seconds between the two.
        at_once: a file that ends the grace when it appears.
    """
    for end, seconds, early in (
        (psutil.Process.terminate, grace, at_once),
        (psutil.Process.kill, GRACE_SECONDS, None),
    ):
        left = psutil.Process().children(recursive=True)
        for process in left:
            try:
                end(process)
            except psutil.NoSuchProcess:
                continue
        deadline = time.monotonic() + seconds
        while left and time.monotonic() < deadline and not (early is not None and early.exists()):
            _, left = psutil.wait_procs(left, timeout=0.5)
        if not left and not psutil.Process().children():
            return


def _end_with_parent() -> None:
    """In the child: should even this process be killed, torchrun hears of it and ends its workers, Python just ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":  # elsewhere an ended scheduler leaves its runs to finish
        ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), 0, 0, 0)


def _stop(number: int, frame: Any) -> None:
    _heed_no_signals()  # once is enough: what has been started is now ended
    raise Stopped


def _heed_no_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _logged(path: Path, begin: int) -> str:
    """The end of what this attempt logged."""
    with path.open("rb") as log:
        log.seek(max(begin, path.stat().st_size - 100_000))
        return log.read().decode("utf-8", errors="replace")


def _last_lines(text: str) -> str:
    """The last lines of a log, without states of progress bars that were written over."""
    # torchrun says at length that a worker failed, after the worker has said why.
    text = re.split(r"\n.*elastic/multiprocessing/.*failed \(exitcode", text)[0]
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.split("\n")]
    return "\n".join([line for line in lines if line.strip()][-LOG_LINES:])


# ---- a trainer that writes no summary -------------------------------------------------------------------------------


def _write_summary(folder: Path, record: Mapping[str, Any], outcome: Mapping[str, Any], ends: list[float]) -> None:
    """``run_summary.json`` for veRL's trainer: measured from outside and from its metrics, null where neither can tell.

    ``seconds_total`` counts from the start of the first step, which is taken to last as long as the median step, to the
    end of the process: like that of the episodic trainers, it leaves imports and loading out.

    Args:
        ends: when a step's end was seen, in seconds from the start of the process.
    """
    lines = _text(folder / "metrics.jsonl").splitlines()
    steps = [line["data"] for line in map(json.loads, lines) if "train/loss" in line["data"]]
    between = [later - earlier for earlier, later in pairwise(ends)]
    # Steps shorter than a look at the file are seen several at once: then the mean is all that can be told.
    seen_all = len(ends) == len(steps)
    per_step = None
    if between and len(steps) > 1:
        per_step = statistics.median(between) if seen_all else sum(between) / (len(steps) - 1)
    peaks = [step["perf/max_memory_allocated_gb"] for step in steps if "perf/max_memory_allocated_gb" in step]
    on_gpu = bool(record["gpus"])
    latest = f"global_step_{_text(folder / 'latest_checkpointed_iteration.txt').strip()}"
    weights = list((folder / latest).glob("model_world_size_*.pt"))
    threads = record["environment"].get("OMP_NUM_THREADS")
    device = device_name()
    write_json(
        folder / "run_summary.json",
        {
            **record["summary"],
            "world_size": len(weights) or None,
            "device_name": f"{device}, {threads} threads per process" if threads and not on_gpu else device,
            "steps": len(steps) or None,
            "tokens": int(sum(step.get("train/global_tokens", 0) for step in steps)) or None,
            "seconds_total": None if per_step is None else outcome["seconds"] - ends[0] + per_step,
            "seconds_process": outcome["seconds"],
            "seconds_per_step_median": per_step,
            "peak_memory_bytes": (int(max(peaks) * 1024**3) if peaks else None)
            if on_gpu
            else outcome["peak_memory_bytes"],
            "peak_memory_kind": "device" if on_gpu else "rss",
            "checkpoint": latest if weights else None,
            "checkpoint_bytes": sum(map(size_bytes, weights)) or None,
            "versions": package_versions(),
        },
    )


def _text(path: Path) -> str:
    """What a file holds; empty where it is missing: the arm may have told the trainer not to write it."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
