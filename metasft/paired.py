"""Paired comparison of two evaluations of the same test items: differences with intervals, tests, equivalence.

Both evaluations scored the same items after adapting on the same shot sets, so that every item of every run gives one
difference A - B in {-1, 0, 1}. How it is judged:

* **Variance.** Items and runs (shot sets) are crossed. The variance of the mean difference is
  s_items^2 / n + s_runs^2 / R, from the means per item and the means per run (Owen, "The pigeonhole bootstrap", 2007:
  slightly conservative, since noise within a cell counts in both terms). With one run (always at 0 shots) it is the
  first term alone, and covers the choice of items only.
* **Few discordant items.** s_items is taken over the n items and two made-up ones that spread over all four outcomes of
  a pair (Agresti and Min, "Simple improved confidence intervals for comparing matched proportions", 2005). Without
  them, two methods that agree on every item would have an interval of width 0.
* **Interval and p-value** belong together: Student's t with the Welch-Satterthwaite degrees of freedom.
* **Equivalence** within a margin: two one-sided tests (Schuirmann 1987). "Not worse" is the one of them that bounds A
  from below, a test of non-inferiority.
* **Pooling.** Tasks have items and shot sets of their own, so that their variances add up; every task weighs the same.
  Over shot counts, which share items and nested shots, the differences are averaged per item and run first.
* **Loss** (nats per response token) is known per run, not per item: a paired t-test over runs, which says nothing about
  other test items, and nothing at all with one run.
* **Many rows.** Holm's correction (1979) over all rows, for each kind of p-value separately; it holds whatever the
  dependence between rows.

Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metasft.report import ALL_TASKS, markdown_row
from metasft.reporting.statistics import LEVEL, Estimate, crossed_estimate, holm, mean_estimate, run_estimate
from metasft.result_files import CELL, PREDICTION, RESULTS_SUFFIX, find_file, read_settings
from metasft.shapes import read_checked_lines
from metasft.untrusted import printable

ALL_SHOTS = "all > 0"
# What of the settings is the protocol: every key that begins like this, and these. Where the optimizer and its rate
# come from does not matter once they are equal.
_PROTOCOL_PREFIX = "adaptation_"
_PROTOCOL_KEYS = ("protocol", "decoding", "max_new_tokens", "max_length", "dtype")
_NOT_PROTOCOL = ("adaptation_origin",)

Place = tuple[str, int]
"""(task, shot count)."""


@dataclass(frozen=True)
class Evaluation:
    """One finished evaluation, read for pairing.

    Attributes:
        label: name in the comparison.
        path: its results file.
        settings: content of ``<model_type>_settings.json``.
        correct: (task, shots) -> run -> example_id -> whether the answer was right.
        losses: (task, shots) -> run -> nats per response token of the test set.
        shots: (task, shots) -> run -> example_ids adapted on.
    """

    label: str
    path: Path
    settings: Mapping[str, Any]
    correct: Mapping[Place, Mapping[int, Mapping[str, bool]]]
    losses: Mapping[Place, Mapping[int, float]]
    shots: Mapping[Place, Mapping[int, Sequence[str]]]


# ---------------------------------------------------------------------------------------------------- reading


def parse_side(text: str) -> tuple[str, Path]:
    """``folder`` or ``name=folder`` as (label, path); without a name the label is the folder's."""
    name, separator, path = text.partition("=")
    if separator and name and path:
        return name, Path(path)
    return printable(Path(text).resolve().name), Path(text)


def read_evaluation(label: str, path: Path) -> Evaluation:
    """Read a result folder (or the ``<model type>_results.json`` in it) of ``evaluate_few_shot.py``.

    Raises:
        ValueError: a file is missing or of another format, or the evaluation is unfinished.
    """
    results = find_file(label, path, RESULTS_SUFFIX, "run evaluate_few_shot.py to the end")
    model_type = results.name.removesuffix(RESULTS_SUFFIX)
    files = {name: results.with_name(f"{model_type}_{name}") for name in ("settings.json", "predictions.jsonl")}
    files["cells.jsonl"] = results.with_name(f"{model_type}_cells.jsonl")
    for file in files.values():
        if not file.is_file():
            raise ValueError(
                f"results of {label}: {file} does not exist, and pairing needs it: run evaluate_few_shot.py again"
            )
    correct: dict[Place, dict[int, dict[str, bool]]] = {}
    losses: dict[Place, dict[int, float]] = {}
    shots: dict[Place, dict[int, list[str]]] = {}
    try:
        for line in read_checked_lines(files["predictions.jsonl"], PREDICTION):
            run = correct.setdefault((line["task"], line["n_shots"]), {}).setdefault(line["run"], {})
            if line["example_id"] in run:
                raise ValueError(f"item {line['example_id']} is there twice in run {line['run']}")
            run[line["example_id"]] = line["correct"]
        for line in read_checked_lines(files["cells.jsonl"], CELL):
            place, run = (line["task"], line["n_shots"]), line["run"]
            losses.setdefault(place, {})[run] = line["loss"]
            shots.setdefault(place, {})[run] = line["shots"]
            found = len(correct.get(place, {}).get(run, {}))
            if found != line["n_test"]:
                raise ValueError(f"{found} predictions for the {line['n_test']} items of {place}, run {run}")
        for place, runs in correct.items():
            if set(runs) != set(losses.get(place, {})):
                raise ValueError(f"{place} is unfinished")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"results of {label} in {results.parent} are unfinished or of another format ({error}): run "
            "evaluate_few_shot.py again"
        ) from error
    if not correct:
        raise ValueError(f"results of {label}: {files['predictions.jsonl']} is empty: run evaluate_few_shot.py again")
    return Evaluation(label, results, read_settings(files["settings.json"]), correct, losses, shots)


# ---------------------------------------------------------------------------------------------------- may they be
# paired?


def check_pairing(a: Evaluation, b: Evaluation, *, allow_different_protocol: bool = False) -> list[str]:
    """What a reader of the comparison has to know; the places to compare are those that both have.

    Raises:
        ValueError: items, data files, shot sets or (unless allowed) the adaptation protocol differ, naming what.
    """
    common = set(a.correct) & set(b.correct)
    if not common:
        raise ValueError(
            f"{a.label} and {b.label} have no task and shot count in common: evaluate both with the same --eval-tasks "
            "and --n-shots"
        )
    _check_data(a, b, {task for task, _ in common})
    for place in sorted(common):
        _check_place(a, b, place)
    notes = []
    different = [f"{key}: {x!r} and {y!r}" for key, x, y in _protocol_differences(a.settings, b.settings)]
    if different and not allow_different_protocol:
        raise ValueError(
            f"the adaptation protocol of {a.label} and {b.label} differs ({'; '.join(different)}): evaluate both "
            "with the same --adaptation-* flags, or pass --allow-different-protocol to compare them all the same"
        )
    if different:
        notes.append(f"The adaptation protocol differs between {a.label} and {b.label}: {'; '.join(different)}.")
    bases = [e.settings.get("base_model") for e in (a, b)]
    if None not in bases and bases[0] != bases[1]:
        notes.append(f"The base models differ: {bases[0]} and {bases[1]}.")
    for one, other in ((a, b), (b, a)):
        alone = sorted(set(one.correct) - set(other.correct))
        if alone:
            listed = ", ".join(f"{task} at {n} shots" for task, n in alone)
            notes.append(f"Only {one.label} was evaluated on {listed}: left out.")
    return notes


def _check_data(a: Evaluation, b: Evaluation, tasks: set[str]) -> None:
    hashes = [e.settings.get("data_sha256") for e in (a, b)]
    for evaluation, found in zip((a, b), hashes, strict=True):
        if not isinstance(found, dict) or not found:
            raise ValueError(
                f"the settings of {evaluation.label} hold no data_sha256, so that nobody knows whether the data were "
                "the same: run evaluate_few_shot.py again"
            )
    files = sorted(file for file in set(hashes[0]) & set(hashes[1]) if any(file.startswith(f"{t}_") for t in tasks))
    for file in files:
        if hashes[0][file] != hashes[1][file]:
            raise ValueError(
                f"the data of {a.label} and {b.label} differ: {file} has SHA-256 {hashes[0][file][:12]}... and "
                f"{hashes[1][file][:12]}...: evaluate both on the same --data-dir"
            )


def _check_place(a: Evaluation, b: Evaluation, place: Place) -> None:
    task, shots = place
    where = f"{task} at {shots} shots"
    runs = [sorted(e.correct[place]) for e in (a, b)]
    if runs[0] != runs[1]:
        raise ValueError(
            f"{where}: {a.label} has {len(runs[0])} runs (shot sets), {b.label} has {len(runs[1])}: evaluate both with "
            "the same --n-runs"
        )
    for run in runs[0]:
        ours, theirs = (set(e.correct[place][run]) for e in (a, b))
        if ours != theirs:
            raise ValueError(
                f"{where}: the test items differ ({len(ours)} of {a.label}, {len(theirs)} of {b.label}, "
                f"{len(ours & theirs)} in common; run {run}): evaluate both with the same --limit and --data-dir"
            )
        if list(a.shots[place][run]) != list(b.shots[place][run]):
            raise ValueError(
                f"{where}: {a.label} and {b.label} adapted on different shots in run {run} (seed "
                f"{a.settings.get('seed')} and {b.settings.get('seed')}): evaluate both with the same --seed"
            )


def _protocol_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    keys = [key for key in {**a, **b} if key.startswith(_PROTOCOL_PREFIX) or key in _PROTOCOL_KEYS]
    return [(key, a.get(key), b.get(key)) for key in keys if key not in _NOT_PROTOCOL and a.get(key) != b.get(key)]


# ---------------------------------------------------------------------------------------------------- comparing


@dataclass
class Row:
    """One line of the comparison.

    Attributes:
        task: its name, ``all`` for the mean of the tasks.
        n_shots: shot count, ``all > 0`` for the mean over the shot counts above 0.
        n_items: test items, over all tasks of the row.
        n_runs: shot sets per task.
        accuracy: keys ``a``, ``b``, ``difference``, ``ci95`` (fractions), ``p``, ``equivalence_p``, ``not_worse_p``,
            each p with a ``..._holm``; ``equivalent`` and ``not_worse`` say what the adjusted tests decide.
        loss: keys ``a``, ``b``, ``difference``, ``ci95`` (nats per response token), ``p``, ``p_holm``; the last three
            are None with one run.
    """

    task: str
    n_shots: int | str
    n_items: int
    n_runs: int
    accuracy: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Measured:
    """One row before it is judged: means of both sides and the estimate of their difference, per measure."""

    n_items: int
    n_runs: int
    accuracy: tuple[float, float, Estimate]
    loss: tuple[float, float, Estimate]


def compare_pair(a: Evaluation, b: Evaluation, *, margin: float = 0.03) -> list[Row]:
    """All rows: every task and shot count, all tasks at each shot count, and each over all shot counts above 0.

    Shot counts are pooled where there are two or more above 0 with the same runs; tasks where there are two or more,
    over the shot counts that every task has.

    Args:
        margin: of equivalence, a fraction of accuracy.

    Raises:
        ValueError: ``margin`` is not between 0 and 1.
    """
    if not 0 < margin < 1:
        raise ValueError(
            f"--margin is {margin}: give a fraction between 0 and 1, such as 0.03 for 3 points of accuracy"
        )
    places = [place for place in a.correct if place in b.correct]
    tasks = list(dict.fromkeys(task for task, _ in places))
    measured: dict[tuple[str, int | str], _Measured] = {}
    for task in tasks:
        counts = sorted(n for name, n in places if name == task)
        for n in counts:
            measured[task, n] = _measure(a, b, [(task, n)])
        few = [n for n in counts if n > 0]
        if len(few) > 1 and len({tuple(sorted(a.correct[task, n])) for n in few}) == 1:
            measured[task, ALL_SHOTS] = _measure(a, b, [(task, n) for n in few])
    if len(tasks) > 1:
        for shots in list(dict.fromkeys(shots for _, shots in measured)):
            if all((task, shots) in measured for task in tasks):
                measured[ALL_TASKS, shots] = _pool([measured[task, shots] for task in tasks])
    rows = [_judge(*key, found, margin) for key, found in measured.items()]
    _adjust(rows)
    return rows


def _measure(a: Evaluation, b: Evaluation, places: Sequence[Place]) -> _Measured:
    """One task at one or several shot counts, which are averaged per item and run."""
    import numpy as np

    runs = sorted(a.correct[places[0]])
    items = list(a.correct[places[0]][runs[0]])
    correct = [
        np.mean([[[e.correct[place][run][item] for item in items] for run in runs] for place in places], axis=0)
        for e in (a, b)
    ]
    losses = [np.mean([[e.losses[place][run] for run in runs] for place in places], axis=0) for e in (a, b)]
    return _Measured(
        len(items),
        len(runs),
        (float(correct[0].mean()), float(correct[1].mean()), crossed_estimate(correct[0] - correct[1])),
        (float(losses[0].mean()), float(losses[1].mean()), run_estimate(losses[0] - losses[1])),
    )


def _pool(parts: Sequence[_Measured]) -> _Measured:
    """The mean over tasks."""

    def pooled(measures: Sequence[tuple[float, float, Estimate]]) -> tuple[float, float, Estimate]:
        ours, theirs, estimates = zip(*measures, strict=True)
        return sum(ours) / len(ours), sum(theirs) / len(theirs), mean_estimate(estimates)

    return _Measured(
        sum(part.n_items for part in parts),
        min(part.n_runs for part in parts),
        pooled([part.accuracy for part in parts]),
        pooled([part.loss for part in parts]),
    )


def _judge(task: str, shots: int | str, found: _Measured, margin: float) -> Row:
    ours, theirs, estimate = found.accuracy
    low, high = estimate.interval()
    accuracy = {
        "a": ours,
        "b": theirs,
        "difference": estimate.difference,
        "ci95": [max(-1.0, low), min(1.0, high)],
        "p": estimate.p_difference(),
        "equivalence_p": estimate.p_equivalence(margin),
        "not_worse_p": estimate.p_above(-margin),
    }
    ours, theirs, estimate = found.loss
    known = bool(estimate.parts)
    loss = {
        "a": ours,
        "b": theirs,
        "difference": estimate.difference,
        "ci95": list(estimate.interval()) if known else None,
        "p": estimate.p_difference() if known else None,
    }
    return Row(task, shots, found.n_items, found.n_runs, accuracy, loss)


def _adjust(rows: Sequence[Row]) -> None:
    """Holm over the rows, and what the adjusted tests decide."""
    for measure, key in (("accuracy", "p"), ("accuracy", "equivalence_p"), ("accuracy", "not_worse_p"), ("loss", "p")):
        values = [getattr(row, measure) for row in rows]
        for entry, adjusted in zip(values, holm([entry[key] for entry in values]), strict=True):
            entry[f"{key}_holm"] = adjusted
    for row in rows:
        row.accuracy["equivalent"] = row.accuracy["equivalence_p_holm"] < 1 - LEVEL
        row.accuracy["not_worse"] = row.accuracy["not_worse_p_holm"] < 1 - LEVEL


# ---------------------------------------------------------------------------------------------------- writing


def paired_document(
    a: Evaluation, b: Evaluation, rows: Sequence[Row], *, margin: float, notes: Sequence[str]
) -> dict[str, Any]:
    """The comparison as JSON-able values; differences are a - b."""
    return {
        **{
            name: {
                "label": e.label,
                "results": str(e.path),
                **{key: e.settings.get(key) for key in ("model_type", "model_path", "adapts")},
            }
            for name, e in (("a", a), ("b", b))
        },
        "margin": margin,
        "level": LEVEL,
        "notes": list(notes),
        "rows": [vars(row) for row in rows],
    }


def paired_table(a: Evaluation, b: Evaluation, rows: Sequence[Row], *, margin: float, notes: Sequence[str]) -> str:
    """The comparison as Markdown, with what each column means under it."""
    points = f"{100 * margin:g}"
    header = [
        "Task",
        "Shots",
        "Items x runs",
        f"Accuracy, {a.label}",
        f"Accuracy, {b.label}",
        "Difference (points)",
        "p",
    ]
    header += [f"p, within {points} points", f"p, {a.label} not worse by {points}"]
    header += [f"Loss, {a.label}", f"Loss, {b.label}", "Difference (nats)", "p (loss)", "Accuracy: shown"]
    lines = [f"# {a.label} against {b.label}, paired\n", markdown_row(header)]
    lines.append(markdown_row(["---", "---", *["---:"] * (len(header) - 3), "---"]))
    lines += [markdown_row(_cells(a, b, row, points)) for row in rows]
    runs = sorted({row.n_runs for row in rows})
    texts = [
        f"Difference: {a.label} minus {b.label}, with its 95% interval. p-values are adjusted over the rows (Holm).",
        f"p, within {points} points: two one-sided tests; below 0.05 the accuracies are equivalent within that margin.",
        "Accuracy: items and shot sets crossed, Student's t. Loss: nats per response token, paired t-test over shot "
        "sets; its interval does not cover the choice of test items, and with one shot set there is none.",
        "'all': mean of the tasks; 'all > 0': mean over the shot counts above 0.",
        *(["Rows with one run cover the choice of test items, not of shots."] if runs[0] == 1 else []),
        *notes,
    ]
    return "\n".join([*lines, "", *(f"- {text}" for text in texts), ""])


def _cells(a: Evaluation, b: Evaluation, row: Row, points: str) -> list[str]:
    accuracy, loss = row.accuracy, row.loss
    low, high = (100 * limit for limit in accuracy["ci95"])
    shown = []
    if accuracy["p_holm"] < 1 - LEVEL:
        shown.append(f"{a.label if accuracy['difference'] > 0 else b.label} is higher")
    if accuracy["equivalent"]:
        shown.append(f"equivalent within {points} points")
    elif accuracy["not_worse"]:
        shown.append(f"{a.label} is not worse by {points} points")
    cells = [
        row.task,
        str(row.n_shots),
        f"{row.n_items} x {row.n_runs}",
        f"{accuracy['a']:.1%}",
        f"{accuracy['b']:.1%}",
    ]
    cells += [f"{100 * accuracy['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"]
    cells += [_p(accuracy[key]) for key in ("p_holm", "equivalence_p_holm", "not_worse_p_holm")]
    cells += [f"{loss['a']:.3f}", f"{loss['b']:.3f}", f"{loss['difference']:+.3f}"]
    if loss["ci95"] is not None:
        cells[-1] += f" [{loss['ci95'][0]:+.3f}, {loss['ci95'][1]:+.3f}]"
    return [*cells, _p(loss["p_holm"]), "; ".join(shown) or "nothing"]


def _p(value: float | None) -> str:
    return "" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"
