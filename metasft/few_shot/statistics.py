"""Accuracies and their intervals from what the runs of an evaluation gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LEVEL = 0.95


def accuracy_interval(correct: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """95% interval of an accuracy measured with several shot sets (runs) on the same test items.

    Wilson's score interval with an effective sample size. Runs and items are crossed: the variance of the mean is
    estimated as s_items^2 / n + s_runs^2 / R, from the means per item and the means per run (Owen, "The pigeonhole
    bootstrap", 2007: slightly conservative, since noise within a cell counts in both terms), and n_eff = p(1-p) /
    variance. The quantile is Student's t with the Welch-Satterthwaite degrees of freedom, so that three runs that
    disagree give an honestly wide interval. With one run, and where all or no answers are correct, it is Wilson's
    interval over the n items; unlike the bootstrap it does not collapse there. With one run it covers the choice of
    test items only, not the choice of shots.

    Args:
        correct: [R runs][n items].

    Returns:
        (low, high), fractions in [0, 1] around the mean.
    """
    import numpy as np
    from scipy.special import stdtrit

    values = np.asarray(correct, dtype=float)
    runs, items = values.shape
    p = float(values.mean())
    effective, freedom = float(items), np.inf
    if runs > 1 and items > 1 and 0 < p < 1:
        by_item = values.mean(axis=0).var(ddof=1) / items
        by_run = values.mean(axis=1).var(ddof=1) / runs
        variance = by_item + by_run
        if variance > 0:
            # Never more information than independent answers, never less than one.
            effective = float(min(max(p * (1 - p) / variance, 1.0), items * runs))
            freedom = variance**2 / (by_item**2 / (items - 1) + by_run**2 / (runs - 1))
    t = float(stdtrit(freedom, 0.5 + LEVEL / 2))
    shrink = 1 + t * t / effective
    centre = (p + t * t / (2 * effective)) / shrink
    half = t / shrink * float(np.sqrt(p * (1 - p) / effective + t * t / (4 * effective**2)))
    # Rounding must not push the mean out of its interval.
    return max(0.0, min(centre - half, p)), min(1.0, max(centre + half, p))


def summarise_cells(
    cells: Sequence[Mapping[str, Any]], predictions: Sequence[Sequence[Mapping[str, Any]]], baseline: float
) -> dict[str, Any]:
    """One entry of the results: all runs of one task and N.

    Args:
        cells: one record per run.
        predictions: the predictions of each run, in the order of the test items.
        baseline: accuracy of always giving the most frequent answer.
    """
    import numpy as np

    correct = np.array([[p["correct"] for p in run] for run in predictions], dtype=float)
    per_run = correct.mean(axis=1)
    return {
        "accuracy_mean": float(correct.mean()),
        "accuracy_std": float(per_run.std(ddof=1)) if len(per_run) > 1 else 0.0,
        "ci95": list(accuracy_interval(correct)),
        "n_runs": len(cells),
        "n_test": correct.shape[1],
        "loss_mean": float(np.mean([cell["loss"] for cell in cells])),
        "format_accuracy": float(np.mean([[p["formatted"] for p in run] for run in predictions])),
        "majority_baseline": baseline,
        "adapt_steps": cells[0]["adapt_steps"],
        "adapt_seconds": float(np.mean([cell["adapt_seconds"] for cell in cells])),
    }


def format_table(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The results as text: one line per task and N."""
    width = max(len("task"), *(len(task) for task in results))
    lines = [f"{'task':<{width}}  shots  accuracy  95% interval   format    loss  majority"]
    for task, by_shots in results.items():
        for shots, entry in by_shots.items():
            low, high = entry["ci95"]
            lines.append(
                f"{task:<{width}}  {shots:>5}  {entry['accuracy_mean']:>7.1%}  [{low:>5.1%}, {high:>6.1%}]"
                f"  {entry['format_accuracy']:>7.1%}  {entry['loss_mean']:>6.3f}  {entry['majority_baseline']:>7.1%}"
            )
    return "\n".join(lines)
