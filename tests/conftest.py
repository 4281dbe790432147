"""Fixtures shared by all tiers: a tiny random model, and a small task folder."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pandas as pd
import pytest
from tiny_model import build_tiny_model

OPERATIONS = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "cat": lambda a, b: f"{a}{b}",
}


def pytest_configure() -> None:
    """A shell starts the background jobs of a script with Ctrl-C ignored, which the runs under test would inherit."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture(scope="session")
def untied_model(tmp_path_factory) -> Path:
    """With an output layer of its own and biases in the attention: the loading path for non-zero ranks differs."""
    return build_tiny_model(tmp_path_factory.mktemp("untied"), architecture="qwen2", tie_word_embeddings=False)


def arithmetic_rows(task: str, count: int) -> list[dict]:
    """``count`` distinct examples in the columns of the prepared data, with prompts of different lengths."""
    draw, rows, seen = random.Random(task), [], set()
    while len(rows) < count:
        a, b = draw.randint(0, 99), draw.randint(0, 99)
        if (a, b) in seen:
            continue
        seen.add((a, b))
        prompt = f"{a} {task} {b}?" + " please" * (a % 4)
        answer = str(OPERATIONS[task](a, b))
        response = f"Answer: {answer}"
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        rows.append(
            {
                "messages": messages,
                "prompt": prompt,
                "response": response,
                "answer": answer,
                "task": task,
                "data_source": "arithmetic",
                "example_id": f"{task}-{len(rows)}",
            }
        )
    return rows


@pytest.fixture(scope="session")
def task_dir(tmp_path_factory) -> Path:
    """Four tasks with 24 support and 12 query examples each."""
    folder = tmp_path_factory.mktemp("tasks")
    for task in OPERATIONS:
        rows = arithmetic_rows(task, 36)
        pd.DataFrame(rows[:24]).to_parquet(folder / f"{task}_support.parquet")
        pd.DataFrame(rows[24:]).to_parquet(folder / f"{task}_query.parquet")
    return folder


def pytest_terminal_summary(terminalreporter):
    """Count the bad inputs of ``e2e/test_bad_input.py`` and the kills of ``e2e/test_faults.py``, over all workers."""
    ended = [
        (report, dict(report.user_properties))
        for kind in ("passed", "failed")
        for report in terminalreporter.stats.get(kind, ())
        if report.when == "call"
    ]
    refused = [report.passed for report, properties in ended if "bad_input" in properties]
    if refused:
        counted = f"{sum(refused)} of {len(refused)}"
        terminalreporter.write_line(f"bad inputs tried: {counted} refused in one sentence with code 2")
    kills = [
        (report.passed, properties["kills_survived"]) for report, properties in ended if "kills_survived" in properties
    ]
    if kills:
        survived, tried = sum(count for passed, count in kills if passed), sum(count for _, count in kills)
        terminalreporter.write_line(f"kills survived: {survived} of {tried}, nothing lost")
