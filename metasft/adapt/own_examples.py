"""A user's own examples: one file is one task, read word for word in the layouts that fine-tuning data have.

JSONL, a JSON list, CSV or parquet; columns as of :mod:`metasft.data.sources.column_layouts` (``prompt`` and
``response``, ``messages``, ShareGPT, Alpaca). Needs no torch.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metasft.data.sources.column_layouts import COLUMNS, Turn, prompt_text, read_conversation
from metasft.files.untrusted import DataFile, check_data_file, printable, reason

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
ADVISED = 1_000
"""Examples from which on ordinary fine-tuning, which passes over all of them, is the better tool."""


@dataclass(frozen=True)
class OwnTask:
    """One task: its conversations, each ending with the assistant's response.

    Attributes:
        name: of its adapter, from the file.
        path: of the file, for messages; ``examples`` for a list.
        conversations: in the order of the file.
    """

    name: str
    path: Path
    conversations: Sequence[Sequence[Turn]]

    def take(self) -> io.BytesIO:
        """As a parquet file, which tokenised sets are made of."""
        import pandas as pd

        content = io.BytesIO()
        pd.DataFrame({"messages": [list(turns) for turns in self.conversations]}).to_parquet(content)
        content.seek(0)
        return content

    @property
    def sha256(self) -> str:
        """Of the conversations, hexadecimal: the same examples in another layout have the same."""
        return hashlib.sha256(json.dumps(self.conversations, ensure_ascii=False).encode()).hexdigest()

    @property
    def system(self) -> str | None:
        """The system turn that all conversations open with; None where they differ or have none."""
        opened = {turns[0]["content"] if turns[0]["role"] == "system" else None for turns in self.conversations}
        return opened.pop() if len(opened) == 1 else None

    @property
    def responses(self) -> list[str]:
        """What the assistant is to say, of every example."""
        return [turns[-1]["content"] for turns in self.conversations]

    def remarks(self) -> list[str]:
        """What a user may want to know about these examples, in sentences."""
        said = []
        answers: dict[str, set[str]] = {}
        for turns in self.conversations:
            answers.setdefault(prompt_text(turns[:-1]), set()).add(turns[-1]["content"])
        if several := sum(len(responses) > 1 for responses in answers.values()):
            said.append(f"{several} prompts have more than one response; all of them are learned from")
        if repeated := len(self.conversations) - len({json.dumps(turns) for turns in self.conversations}):
            said.append(
                f"{repeated} examples are there more than once, so that figures from held-out examples are too good"
            )
        if len(self.conversations) >= ADVISED:
            said.append(
                f"of {len(self.conversations):,} examples the update steps see a part; ordinary fine-tuning learns "
                "from all (verl.trainer.sft_trainer, --start as model.lora_adapter_path its rank as model.lora_rank)"
            )
        return said


def read_tasks(examples: Sequence[Mapping[str, Any]] | Mapping[str, Any], flag: str) -> list[OwnTask]:
    """The task of a list of rows, or the tasks of several of these lists by name.

    Args:
        examples: the rows.
        flag: what the caller calls them, for messages.

    Raises:
        ValueError: nothing is there, or a name is that of no folder.
    """
    if isinstance(examples, Mapping):
        for name in examples:
            if not isinstance(name, str) or Path(name).name != name or name.startswith("."):
                raise ValueError(f"{flag} names a task {name!r}: give the name of a folder, not hidden and without /")
        return [_task_of(rows, name, Path(f"{flag}[{name!r}]")) for name, rows in examples.items()]
    return [_task_of(examples, "examples", Path(flag))]


def files_of(path: Path, flag: str) -> list[Path]:
    """The file itself, or the data files of a folder in alphabetical order.

    Raises:
        ValueError: there is none, or two have the same name but for the ending.
    """
    if not path.exists():
        raise ValueError(f"{flag} is {path}, which does not exist: give a file or a folder of files")
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and not file.name.startswith("."))
    if not files:
        raise ValueError(f"{flag} is {path}, a folder without {', '.join(SUFFIXES)} files: put one per task there")
    name, times = Counter(file.stem for file in files).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{flag} is {path}, where {times} files are called {printable(name)}: give each its own name")
    return files


def read_task(path: Path) -> OwnTask:
    """The task in a file.

    Raises:
        ValueError: it cannot be read, holds no example, or one of its rows has no question or no response.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} is of no known kind: give {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise ValueError(f"{path} is no file: give a file of examples")
    check_data_file(path)
    try:
        rows = _READERS[path.suffix](path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({reason(error)}): save it in that encoding") from error
    except Exception as error:  # the readers have exceptions of their own, and the bytes may lead them into any other
        raise ValueError(f"{path} cannot be read ({reason(error)}): correct it") from error
    return _task_of(rows, path.stem, path)


def _task_of(rows: Any, name: str, path: Path) -> OwnTask:
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        raise ValueError(f"{path} is {type(rows).__name__}, not a list of examples: give rows with prompt and response")
    if not rows:
        raise ValueError(f"{path} holds no example: write at least one, with prompt and response")
    conversations = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise ValueError(f"{path} row {number} is {type(row).__name__}: give a prompt and a response by name")
        where = f"{path} row {number}"
        turns = read_conversation(dict(row), {}, where, remedy="give prompt and response")
        if turns is None:
            raise ValueError(f"{path} row {number} has no question or no response: complete or remove it")
        conversations.append(turns)
    return OwnTask(name, path, conversations)


def parse_jsonl(text: str) -> list[Any]:
    """The value of every line that is not blank.

    Raises:
        ValueError: naming the first line that is no JSON.
    """
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number} is no JSON: {reason(error)}") from error
    return rows


def _read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        rows = list(reader)
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise ValueError(f"row {number} has not as many fields as the first line names: quote values with commas")
    return rows


_READERS: dict[str, Any] = {
    ".jsonl": lambda path: parse_jsonl(path.read_text(encoding="utf-8-sig")),
    ".json": lambda path: json.loads(path.read_text(encoding="utf-8-sig")),
    ".csv": _read_csv,
    ".parquet": lambda path: DataFile(path).rows((), COLUMNS, remedy="give the columns prompt and response"),
}
