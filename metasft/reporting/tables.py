"""Tables, as pandas frames whose cells are text, and how numbers are written in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd


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
