"""Tasks that no method trains on: where they lie, which role each has, and the shots that are drawn from their pools.

Shared by the few-shot evaluation and by the measurements during training, so that both adapt on the same examples in
the same order.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from metasft.config.schema import Line, Record, Share, read_checked
from metasft.data.episodes import ShuffledStream

FOLDERS = {"test": "meta_test", "valid": "meta_valid", "search": "meta_valid"}
"""Split -> the folder of its tasks; those of meta_valid are told apart by their role in the manifest."""
TEST_SUFFIX = "_test.parquet"


class _Described(Record):
    role: Line = "valid"
    group: Line | None = None
    trivial: Annotated[dict[Line, Share], Field(min_length=1)] | None = None


class _Manifest(Record):
    tasks: dict[str, _Described] = Field({})


def describe_tasks(data_dir: Path) -> dict[str, dict[str, Any]]:
    """Task -> what the manifest says about it; nothing where there is no manifest.

    Raises:
        ValueError: the manifest cannot be read.
    """
    path = data_dir / "manifest.json"
    if not path.is_file():
        return {}
    script = "prepare_math_science_data.py"
    return read_checked(path, _Manifest, writer=script, remedy="prepare the data again").get("tasks", {})


def tasks_of(data_dir: Path, split: str, about: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names of the tasks of a split, in alphabetical order; none where the data have no such tasks.

    A task of meta_valid without a role in the manifest belongs to ``valid``.

    Args:
        data_dir: that holds the folders of the splits.
        split: of :data:`FOLDERS`.
        about: from :func:`describe_tasks`.
    """
    names = tasks_in(data_dir / FOLDERS[split])
    if split == "test":
        return names
    return [name for name in names if about.get(name, {}).get("role", "valid") == split]


def tasks_in(folder: Path) -> list[str]:
    """Names of the tasks with test items in a folder, in alphabetical order."""
    return sorted(file.name.removesuffix(TEST_SUFFIX) for file in folder.glob(f"*{TEST_SUFFIX}"))


def shot_indices(pool_size: int, n_shots: int, *, seed: int, task: str, run: int) -> list[int]:
    """The shots of one run as indices into the shot pool: the first N of a permutation that does not depend on N."""
    order = list(range(pool_size))
    # A string seeds random.Random through SHA-512: the same in every process and Python build.
    random.Random(f"{seed}/shots/{task}/{run}").shuffle(order)
    return order[:n_shots]


def order_of_shots(n_shots: int, *, seed: int, task: str, run: int) -> ShuffledStream:
    """Which of the N shots each update step takes, pass after pass."""
    return ShuffledStream(n_shots, f"{seed}/adaptation/{task}/{run}")
