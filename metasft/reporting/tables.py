"""Tables, as pandas frames whose cells are text, and how numbers are written in them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

MINUS, SPACE = "\N{MINUS SIGN}", "\N{NO-BREAK SPACE}"
TONES = {
    "supported": "good",
    "finished": "good",
    "not supported": "bad",
    "failed": "bad",
    "skipped": "bad",
    "inconclusive": "open",
    "running": "open",
    "interrupted": "open",
}
"""Words of a column named Status or State -> their colour in HTML."""


@dataclass(frozen=True)
class Table:
    """A frame of text and what it is.

    Attributes:
        caption: names the table.
        frame: what follows a line feed in a cell is shown below, in less weight.
        words: the columns that hold words and are aligned to the left; those of numbers are to the right.
    """

    caption: str
    frame: pd.DataFrame
    words: Collection[int] = (0,)

    def cells(self, write: Callable[[str, bool], str]) -> pd.DataFrame:
        """The frame with every cell written: ``write(text, whether it is a status)``."""
        return self.frame.apply(lambda column: column.map(lambda text: write(text, column.name in ("Status", "State"))))


# ---- numbers as text ------------------------------------------------------------------------------------------------


def seconds(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


FILTERS: dict[str, Callable[..., str]] = {"seconds": seconds}


def results_text(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The results of an evaluation for a terminal: one line per task and N."""
    rows = [
        {
            "task": task,
            "shots": shots,
            "accuracy": f"{entry['accuracy_mean']:.1%}",
            "95% interval": f"[{entry['ci95'][0]:.1%}, {entry['ci95'][1]:.1%}]",
            "format": f"{entry['format_accuracy']:.1%}",
            "loss": f"{entry['loss_mean']:.3f}",
            "majority": f"{entry['majority_baseline']:.1%}",
        }
        for task, by_shots in results.items()
        for shots, entry in by_shots.items()
    ]
    return pd.DataFrame(rows).to_string(index=False)
