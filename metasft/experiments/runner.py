"""Runs on Ray: what is ready is submitted, what ends is noted, and the suite continues after a crash."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from metasft.config.records import read_record
from metasft.experiments.process import END_NOW_FILE, leaving_seconds
from metasft.experiments.store import ExperimentStore, locked, now
from metasft.experiments.suites import ROOT

POLL_SECONDS = 1.0
OBJECT_STORE_BYTES = 80 * 1024**2  # close to the least that Ray takes: nothing but exit codes passes through it
ENDED = ("finished", "failed", "skipped", "interrupted")


def run_all(store: ExperimentStore, selected: Sequence[str], *, address: str | None) -> None:
    """Run what is waiting of the ``selected`` runs, as far as the runs they need finish.

    Args:
        address: of a Ray cluster; None starts one inside this process.

    Raises:
        ValueError: no Ray at ``address``, or a run asks for more than Ray has.
        KeyboardInterrupt: after everything under way has been ended.
    """
    waiting = [name for name in selected if store.records[name]["state"] == "waiting"]
    if not waiting:
        store.save()
        return
    with _ray(address) as ray:
        _check_resources(store, waiting, ray.cluster_resources())
        progress = Progress(store, selected)
        try:
            _schedule(store, selected, waiting, ray, progress)
        finally:
            progress.close()
            store.save()


def _schedule(
    store: ExperimentStore, selected: Sequence[str], waiting: list[str], ray: Any, progress: Progress
) -> None:
    execute = ray.remote(max_retries=0)(_execute)
    handed_over: dict[Any, str] = {}
    postponed: set[str] = set()  # to the next start, with the interrupted runs that they need
    try:
        store.save()
        while waiting or handed_over:
            for name in list(waiting):
                needed = {need: store.records[need]["state"] for need in store.records[name]["needs"]}
                lacking = next((need for need, state in needed.items() if state in ("failed", "skipped")), None)
                if lacking is not None:
                    waiting.remove(name)
                    store.update(name, state="skipped", error=f"{lacking} did not finish", finished=now())
                    progress.ended(name)
                elif any(state == "interrupted" or need in postponed for need, state in needed.items()):
                    waiting.remove(name)
                    postponed.add(name)
                elif all(state == "finished" for state in needed.values()):
                    waiting.remove(name)
                    store.update(name)
                    resources = store.plan.runs[name].resources
                    options = {"num_cpus": resources.cpus, "num_gpus": resources.gpus, "name": name}
                    handed_over[execute.options(**options).remote(str(store.run_folder(name)))] = name
            done, _ = ray.wait(list(handed_over), timeout=POLL_SECONDS) if handed_over else ([], [])
            for reference in done:
                name = handed_over.pop(reference)
                _note_end(store, name, reference, ray)
                progress.ended(name)
            started = [name for name in handed_over.values() if _has_started(store, name)]
            for name in started:
                progress.started(name)
            if done or started:
                store.save()
            progress.show()
    except BaseException:
        _stop(store, list(handed_over.values()), ray)
        raise


def _execute(folder: str) -> tuple[int, str]:
    """On a Ray worker: one run, in a session of its own, so that a signal to the worker's group leaves its cleanup be.

    Returns:
        The exit code of the run's process, and what that said itself.
    """
    command = [sys.executable, "-m", "metasft.experiments.process", folder, str(os.getpid())]
    # Not subprocess.run, which kills it without a chance to clean up when Ray asks this worker to exit.
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    _, said = process.communicate()
    return process.returncode, said


def _note_end(store: ExperimentStore, name: str, reference: Any, ray: Any) -> None:
    """Take over what the run's process wrote; where it could not, say what is known."""
    try:
        returncode, said = ray.get(reference)
    except ray.exceptions.RayError as error:
        returncode, said = -1, f"Ray: {' '.join(str(error).split())[:500]}"
        _wait_until_left(store, name)
    record = store.refresh(name)
    if record["state"] not in ENDED:
        error = said.strip()[-2000:] or f"its process ended with exit code {returncode} before it could say why"
        store.update(name, state="failed", error=error, finished=now())


def _has_started(store: ExperimentStore, name: str) -> bool:
    """Whether the process of a run that was submitted is seen at work for the first time; then its record is taken.

    Not before: until then an earlier attempt, whose runner was killed, may still write how that one ended.
    """
    record, found = store.records[name], read_record(store.run_folder(name))
    if record["state"] != "waiting" or found["state"] != "running" or found["attempts"] <= record["attempts"]:
        return False
    store.refresh(name)
    return True


def _stop(store: ExperimentStore, names: Sequence[str], ray: Any) -> None:
    """End what is under way; another signal meanwhile ends it at once."""

    def end_now(number: int, frame: Any) -> None:
        for name in names:
            (store.run_folder(name) / END_NOW_FILE).touch()

    previous = {number: signal.signal(number, end_now) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        trainings = [n for n in names if store.plan.runs[n].kind == "train" and store.records[n]["state"] == "running"]
        if trainings:
            tqdm.write(
                f"run_experiments: stopping; what trains saves first, at the end of the meta-step under way "
                f"({', '.join(trainings)}): Ctrl-C again ends it at once",
                file=sys.stderr,
            )
        ray.shutdown()
        for name in names:
            if _wait_until_left(store, name) and store.refresh(name)["state"] not in ENDED:
                store.update(name, state="waiting")
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait_until_left(store: ExperimentStore, name: str) -> bool:
    """Wait until the process of a run whose worker is gone has ended what it had started; False: it takes too long."""
    try:
        with locked(store.run_folder(name), wait=leaving_seconds(store.plan.runs[name].kind)):
            return True
    except BlockingIOError:
        return False


# ---- Ray ------------------------------------------------------------------------------------------------------------


@contextmanager
def _ray(address: str | None) -> Iterator[Any]:
    """Ray, embedded or at ``address``, quiet; SIGTERM ends the block as Ctrl-C does."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A run's process ends what is below it by itself, and needs the time to.
    os.environ.setdefault("RAY_kill_child_processes_on_worker_exit", "false")
    # On a full machine Ray would end workers, which hold nothing; the system's own choice falls on the largest process.
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
    # Ray's workers would hand on a lower priority to the runs, whose seconds are measured.
    os.environ.setdefault("RAY_worker_niceness", "0")
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
    if address is None:
        quiet |= {"num_cpus": os.cpu_count(), "object_store_memory": OBJECT_STORE_BYTES}
    else:
        del quiet["include_dashboard"]
    try:
        ray.init(address=address or "local", **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        where = f"--address is {address}, where no Ray can be reached" if address else "Ray does not start here"
        raise ValueError(
            f"{where} ({reason}): {'start one with `ray start --head`' if address else 'see its logs'}"
        ) from None
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield ray
    finally:
        signal.signal(signal.SIGTERM, previous)
        ray.shutdown()


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _check_resources(store: ExperimentStore, names: Sequence[str], there: Mapping[str, float]) -> None:
    for name in names:
        resources = store.plan.runs[name].resources
        for key, count in (("CPU", resources.cpus), ("GPU", resources.gpus)):
            if count > there.get(key, 0):
                raise ValueError(
                    f"{name} asks for {count} {key}s, Ray has {there.get(key, 0):g}: lower `runs` of the scale "
                    f"{store.plan.scale.name}, choose another --scale, or give a larger cluster with --address"
                )


# ---- progress -------------------------------------------------------------------------------------------------------


class Progress:
    """A bar on a terminal, and a line per start and end everywhere."""

    def __init__(self, store: ExperimentStore, selected: Sequence[str]) -> None:
        self.store, self.selected = store, list(selected)
        self.bar = tqdm(
            total=len(self.selected), initial=self._count(*ENDED), desc="runs", unit="run",
            bar_format="{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}{postfix}", disable=not sys.stderr.isatty(),
        )  # fmt: skip

    def started(self, name: str) -> None:
        self._say(f"{name} started")

    def ended(self, name: str) -> None:
        record = self.store.records[name]
        took = f" after {_duration(record['seconds'])}" if record["seconds"] is not None else ""
        lines = [f"{name} {record['state']}{took}"]
        if record["state"] in ("skipped", "interrupted"):
            lines[0] += f": {record['error']}"
        if record["state"] == "failed":
            lines += [f"    {line}" for line in (record["error"] or "").splitlines()]
            lines.append(f"    log: {Path(self.store.plan.output) / 'runs' / name / 'log.txt'}")
        self._say("\n".join(lines))

    def show(self) -> None:
        self.bar.n = self._count(*ENDED)
        running = [n for n in self.selected if self.store.records[n]["state"] == "running"]
        self.bar.set_postfix_str(f"{self._left()}; running: {', '.join(running) or '-'}")

    def close(self) -> None:
        self.bar.close()

    def _say(self, text: str) -> None:
        ended = self._count(*ENDED)
        clock = datetime.now().strftime("%H:%M:%S")
        tqdm.write(f"{clock} [{ended}/{len(self.selected)}, {self._left()}] {text}", file=sys.stdout)
        sys.stdout.flush()

    def _left(self) -> str:
        seconds = time_left([self.store.records[name] for name in self.selected], time.time())
        return "time left unknown" if seconds is None else f"about {_duration(seconds)} left"

    def _count(self, *states: str) -> int:
        return sum(self.store.records[name]["state"] in states for name in self.selected)


def time_left(records: Sequence[Mapping[str, Any]], clock: float) -> float | None:
    """Seconds until all records have ended, from the median of finished runs of the same sort; None: nothing to go by.

    A sort is an arm's runs of one kind, else all runs of one kind, else all. As many run at a time as do now.

    Args:
        records: of all selected runs.
        clock: seconds since the epoch.
    """
    finished = [record for record in records if record["state"] == "finished" and record["seconds"] is not None]
    left = [record for record in records if record["state"] in ("waiting", "running")]
    if not left:
        return 0.0
    total = 0.0
    for record in left:
        sorts = (
            [r["seconds"] for r in finished if r["kind"] == record["kind"] and r["arm"] == record["arm"]],
            [r["seconds"] for r in finished if r["kind"] == record["kind"]],
        )
        seconds = next((median(sort) for sort in sorts if sort), None)
        if seconds is None:
            return None
        if record["state"] == "running":
            seconds = max(seconds - (clock - datetime.fromisoformat(record["started"]).timestamp()), 0.0)
        total += seconds
    return total / max(sum(record["state"] == "running" for record in left), 1)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
