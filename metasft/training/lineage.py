"""Which resume states in a folder are ancestors of the run that works there.

A folder may also hold states of a run that was started over, or that went on past the state another one goes on from.
They must neither be gone on from nor count as this run's newest ones. Every start of a trainer therefore has an id,
which the states it saves carry, and ``lineage.json`` says up to which meta-step the states of each start belong.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from metasft.files.atomic import write_json
from metasft.files.untrusted import read_json

LINEAGE_FILE = "lineage.json"


class Start(NamedTuple):
    """One start of a trainer.

    Attributes:
        id: in the layout file of its states; None for states of releases that wrote none.
        last: the last meta-step that belongs; None for the start that is under way.
    """

    id: str | None
    last: int | None


@dataclass(frozen=True)
class Lineage:
    """The starts whose states belong to a run, the earliest first."""

    starts: tuple[Start, ...]

    @classmethod
    def read(cls, run_dir: Path) -> Lineage | None:
        """That of the run in a folder; None where none is written or it cannot be read."""
        try:
            entries = read_json(run_dir / LINEAGE_FILE, "")["starts"]
            return cls(tuple(Start(entry["id"], entry["last"]) for entry in entries))
        except (ValueError, KeyError, TypeError):
            return None

    def write(self, run_dir: Path) -> None:
        """Put it in charge of a folder."""
        write_json(run_dir / LINEAGE_FILE, {"starts": [start._asdict() for start in self.starts]})

    @property
    def id(self) -> str | None:
        """Of the start that is under way."""
        return self.starts[-1].id

    def holds(self, start: str | None, step: int) -> bool:
        """Whether the state that a start saved behind meta-step ``step`` belongs to the run."""
        return any(known.id == start and (known.last is None or step <= known.last) for known in self.starts)

    def next_start(self, step: int) -> Lineage:
        """That of a start which goes on from meta-step ``step``: what came later belongs no more."""
        kept: list[Start] = []
        for start in self.starts:
            last = step if start.last is None else min(start.last, step)
            if last > (kept[-1].last if kept else 0):  # else it saved nothing that belongs
                kept.append(Start(start.id, last))
        return Lineage((*kept, Start(secrets.token_hex(8), None)))
