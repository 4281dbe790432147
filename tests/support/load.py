"""Many tasks with many examples, and what a run that uses them reads, tokenises and keeps in memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from script_runner import ROOT, script_environment


def write_tasks(folder: Path, names: Sequence[str], *, support: int, query: int) -> Path:
    """Tasks of distinct one-line sums, with prompts of different lengths. Returns ``folder``."""
    folder.mkdir(parents=True)
    for offset, name in enumerate(names):
        for part, numbers in (("support", range(support)), ("query", range(support, support + query))):
            messages = [
                [
                    {"role": "user", "content": f"{name}: {number} + {offset}?" + " Please." * (number % 4)},
                    {"role": "assistant", "content": f"Answer: {number + offset}"},
                ]
                for number in numbers
            ]
            pq.write_table(pa.table({"messages": messages}), folder / f"{name}_{part}.parquet")
    return folder


def memory_by_step(command: Sequence[object], run: Path, *, timeout: float) -> dict[int, float]:
    """Run a trainer as a user does, and look at its process meanwhile.

    Args:
        command: the script and its arguments.
        run: its ``trainer.default_local_dir``.
        timeout: in seconds.

    Returns:
        Meta-steps done -> resident memory in MiB, the median of what was seen while the next one was under way.
    """
    log = run.with_suffix(".log")
    seen: dict[int, list[float]] = {}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=ROOT, env=script_environment(), stdout=output, stderr=output
        )
        deadline, watched = time.monotonic() + timeout, psutil.Process(process.pid)
        try:
            while process.poll() is None:
                assert time.monotonic() < deadline, log.read_text()[-2000:]
                try:
                    memory = watched.memory_info().rss / 2**20
                except psutil.Error:
                    break
                seen.setdefault(_steps(run), []).append(memory)
                time.sleep(0.02)
        finally:
            process.kill()
    assert process.wait() == 0, log.read_text()[-3000:]
    return {step: sorted(values)[len(values) // 2] for step, values in seen.items()}


def _steps(run: Path) -> int:
    try:
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def count_reads(script: str, config_name: str, overrides: list[str], counts: str) -> None:
    """A whole run of a trainer, in a process of ``forked_ranks``; writes what it has read to the file ``counts``.

    That is ``files`` (name of a data file -> how often it was opened) and ``tokenised`` (examples), both up to the end
    of the run, and ``seconds`` up to the first meta-step.
    """
    from fault_ranks import train
    from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset

    from metasft.training.trainer import EpisodicSFTTrainer

    files: Counter[str] = Counter()
    tokenised, started, first = 0, time.perf_counter(), None

    open_file = Path.open

    def counted(path, *arguments, **options):
        if path.suffix == ".parquet":
            files[path.name] += 1
        return open_file(path, *arguments, **options)

    Path.open = counted
    tokenise, step = MultiTurnSFTDataset.__getitem__, EpisodicSFTTrainer.train_step

    def one_more(self, item):
        nonlocal tokenised
        tokenised += 1
        return tokenise(self, item)

    def note_the_first(self, number):
        nonlocal first
        first = first or time.perf_counter()
        return step(self, number)

    MultiTurnSFTDataset.__getitem__, EpisodicSFTTrainer.train_step = one_more, note_the_first
    train(script, config_name, overrides)
    Path(counts).write_text(json.dumps({"files": files, "tokenised": tokenised, "seconds": first - started}))
