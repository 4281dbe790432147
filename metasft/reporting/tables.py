"""Tables, as pandas frames whose cells are text, and how numbers are written in them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pandas as pd

MEAN = "mean of tasks"
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
_UNITS = {
    "time": (("h", 3600.0), ("min", 60.0), ("s", 1.0)),
    "memory": (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)),
}


@dataclass(frozen=True)
class Table:
    """A frame of text and what it is.

    Attributes:
        caption: names the table; empty where a heading does.
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


def largest_unit(value: float, kind: str) -> tuple[str, float]:
    """The largest unit of ``time`` (seconds) or ``memory`` (bytes) in which ``value`` is at least 1, and its size."""
    return next((unit for unit in _UNITS[kind] if value >= unit[1]), _UNITS[kind][-1])


def seconds(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def accuracy(score: Mapping[str, Any] | None) -> str:
    """``22.7% [13.0, 34.4]``."""
    if score is None:
        return "missing"
    low, high = score["ci95"]
    return f"{score['accuracy']:.1%} [{100 * low:.1f}, {100 * high:.1f}]"


def p_value(value: float | None) -> str:
    return "" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def points(found: Mapping[str, Any], unit: str = "", digits: int = 1) -> str:
    """A difference of accuracies in percentage points, with true minus signs: ``+1.2 [-3.4, +5.8]``."""
    low, high = (max(-1.0, min(1.0, limit)) for limit in found["ci95"])
    values = (f"{100 * value:+.{digits}f}" for value in (found["difference"], low, high))
    return "{}{unit} [{}, {}]".format(*values, unit=unit).replace("-", MINUS)


def nats(found: Mapping[str, Any]) -> str:
    """A difference of losses, with its interval where it is known."""
    text = f"{found['difference']:+.3f}"
    if found["ci95"] is not None:
        text += " [{:+.3f}, {:+.3f}]".format(*found["ci95"])
    return text.replace("-", MINUS)


def moment(value: Any) -> str:
    """An ISO time to the minute, as it is where it is none."""
    try:
        return datetime.fromisoformat(str(value)).strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return str(value) if value else "not recorded"


FILTERS: dict[str, Callable[..., str]] = {"seconds": seconds, "points": points, "nats": nats, "moment": moment}


# ---- of one evaluation, and of the comparisons of methods -----------------------------------------------------------


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


def overview(methods: Sequence[Mapping[str, Any]]) -> Table:
    """One row per method and task, costs of training beside accuracies; the last of a task is its constant answer."""
    scores = {(m["label"], s["task"], s["shots"]): s for m in methods for s in m["scores"]}
    shots = sorted({n for _, _, n in scores})
    ends = dict.fromkeys((shots[0], shots[-1]))
    rows = []
    for task in dict.fromkeys(task for _, task, _ in scores):
        measured = [m for m in methods if any((m["label"], task, n) in scores for n in shots)]
        for method in measured:
            found = {n: scores.get((method["label"], task, n)) for n in shots}
            last = (found[shots[-1]] or {}).get("format_accuracy")
            row = {"Method": method["label"], "Task": task}
            row |= {f"Accuracy, {n} shots": accuracy(found[n]) if found[n] else "" for n in shots}
            row |= {f"Format, {shots[-1]} shots": "" if last is None else f"{last:.1%}"}
            row |= {f"Loss, {n} shots": f"{found[n]['loss']:.3f}" if found[n] else "" for n in ends}
            rows.append({**row, **_costs(method["summary"])})
        baselines = {s["majority_baseline"] for (_, name, _), s in scores.items() if name == task}
        if len(baselines) == 1 and None not in baselines:
            cells = dict.fromkeys((f"Accuracy, {n} shots" for n in shots), f"{baselines.pop():.1%}")
            rows.append({"Method": "most frequent answer", "Task": task, **cells})
    return Table("", pd.DataFrame(rows).fillna(""), (0, 1))


def _costs(summary: Mapping[str, Any] | None) -> dict[str, str]:
    keys = {
        "Training (s)": ("seconds_total", 1, ".1f"),
        "s/step": ("seconds_per_step_median", 1, ".3g"),
        "Peak memory (MB)": ("peak_memory_bytes", 1e6, ".0f"),
        "Checkpoint (MB)": ("checkpoint_bytes", 1e6, ".2f"),
    }
    return {
        name: "not measured" if summary is None else f"{summary[key] / unit:{digits}}"
        for name, (key, unit, digits) in keys.items()
    }


def paired(found: Mapping[str, Any]) -> Table:
    """Every row of two evaluations compared item by item."""
    a, b, margin = found["a"]["label"], found["b"]["label"], f"{100 * found['margin']:g} points"
    rows = []
    for row in found["rows"]:
        right, lost = row["accuracy"], row["loss"]
        said = []
        if right["p_holm"] < 1 - found["level"]:
            said.append(f"{a if right['difference'] > 0 else b} is higher")
        if right["equivalent"]:
            said.append(f"equivalent within {margin}")
        elif right["not_worse"]:
            said.append(f"{a} is not worse by {margin}")
        rows.append(
            {
                "Task": row["task"],
                "Shots": str(row["n_shots"]),
                "Items x runs": f"{row['n_items']} x {row['n_runs']}",
                f"Accuracy, {a}": f"{right['a']:.1%}",
                f"Accuracy, {b}": f"{right['b']:.1%}",
                "Difference (points)": points(right),
                "p": p_value(right["p_holm"]),
                f"p, within {margin}": p_value(right["equivalence_p_holm"]),
                f"p, {a} not worse by {margin}": p_value(right["not_worse_p_holm"]),
                f"Loss, {a}": f"{lost['a']:.3f}",
                f"Loss, {b}": f"{lost['b']:.3f}",
                "Difference (nats)": nats(lost),
                "p (loss)": p_value(lost["p_holm"]),
                "Accuracy: shown": "; ".join(said) or "nothing",
            }
        )
    return Table("", pd.DataFrame(rows), (0, 1, 13))


# ---- of the experiments' report -------------------------------------------------------------------------------------


def _frame(caption: str, rows: Sequence[Mapping[str, str]], words: Collection[int] = (0,)) -> Table:
    return Table(caption, pd.DataFrame(rows).fillna(""), words)


def _name(arm: Mapping[str, Any]) -> str:
    notes = [arm["experiment"]] if arm["experiment"] else []
    notes += ["partly measured"] if arm["seeds"] and arm["status"] != "measured" else []
    return "\n".join([arm["label"], *(["; ".join(notes)] if notes else [])])


def _missing(arm: Mapping[str, Any]) -> str:
    return f"missing\n{arm['status'].removeprefix('missing: ')}"


def _scored(arm: Mapping[str, Any], by: str = "shots") -> dict[tuple[str, Any], Mapping[str, Any]]:
    return {(score["task"], score[by]): score for score in arm["scores"]}


def loss(score: Mapping[str, Any] | None) -> str:
    """``0.605 [0.557, 0.652]``."""
    if score is None:
        return ""
    return f"{score['loss']:.3f}" + ("" if not score["loss_ci95"] else " [{:.3f}, {:.3f}]".format(*score["loss_ci95"]))


def number(found: Mapping[str, float] | None, unit: float) -> str:
    """The mean of a cost."""
    if not found:
        return "not measured"
    value = found["mean"] / unit
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _trained(arm: Mapping[str, Any], first: Mapping[str, tuple[str, float]]) -> dict[str, str]:
    columns = {
        **first,
        "Peak GB": ("memory", 1e9),
        "s per step": ("step_seconds", 1),
        "Checkpoint MB": ("checkpoint", 1e6),
    }
    if not arm["trains"]:
        return dict.fromkeys(columns, "") | {next(iter(columns)): "no training"}
    return {name: number(arm["cost"][key], unit) for name, (key, unit) in columns.items()}


def summary(caption: str, arms: Sequence[Mapping[str, Any]], axis: Mapping[str, Any] | None = None) -> Table:
    """Every arm: mean of the tasks at 0 shots and above, and its costs; with the value of an ablation's ``axis``."""
    rows = []
    for arm in arms:
        scores = _scored(arm)
        zero, few = scores.get(("all", 0)), scores.get(("all", "all > 0"))
        value = "" if axis is None or arm["name"] not in axis["values"] else f"{axis['values'][arm['name']]:g}"
        rows.append(
            {
                "Arm": _name(arm),
                **({axis["label"]: value} if axis else {}),
                "Accuracy, 0 shots": accuracy(zero) if scores else _missing(arm),
                "Accuracy, shots > 0": accuracy(few) if scores else "",
                "Loss, shots > 0": loss(few),
                **_trained(arm, {"Hours": ("seconds", 3600.0)}),
            }
        )
    return _frame(caption, rows)


def ratios(found: Mapping[str, Any]) -> Table:
    def amount(ratio: Mapping[str, Any], side: str) -> str:
        if ratio[side] is None:
            return ""
        unit, size = largest_unit(ratio[side], "time" if "time" in ratio["name"] else "memory")
        return f"{ratio[side] / size:.3g} {unit}"

    rows = [
        {
            "Cost": ratio["name"],
            "Ratio": "not measured" if ratio["value"] is None else f"{ratio['value']:.2f}",
            "FOMAML": amount(ratio, "a"),
            "META-LORA": amount(ratio, "b"),
            "The guide expects": ratio["expected"],
        }
        for ratio in found["ratios"]
    ]
    return _frame("Cost of FOMAML (Exp 1) over META-LORA (Exp 2): above 1, META-LORA is cheaper by that factor", rows)


def by_task(arms: Sequence[Mapping[str, Any]], task: str, by: str = "shots", caption: str = "") -> Table:
    """Every arm at every shot count (or number of update steps) of one task."""
    columns = sorted({n for arm in arms for name, n in _scored(arm, by) if name == task and isinstance(n, int)})

    def cell(score: Mapping[str, Any] | None) -> str:
        if score is None:
            return "missing"
        share = score.get("format_accuracy")
        return f"{accuracy(score)}\nloss {loss(score)}" + ("" if share is None else f"; format {share:.0%}")

    rows = []
    for arm in arms:
        scores = _scored(arm, by)
        cells = {f"{n} {by}": cell(scores.get((task, n))) for n in columns}
        rows.append({"Arm": _name(arm), **(cells if scores else {f"{columns[0]} {by}": _missing(arm)})})
    baselines = {s.get("majority_baseline") for arm in arms for s in arm["scores"] if s["task"] == task}
    if len(baselines) == 1 and None not in baselines:
        value = f"{baselines.pop():.1%}"
        rows.append({"Arm": "Most frequent answer\nmajority baseline", **{f"{n} {by}": value for n in columns}})
    name = MEAN if task == "all" else task
    return _frame(caption or f"{name}: accuracy [95%], loss, format accuracy", rows)


def adaptations(arms: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for arm in arms:
        of = arm["adaptation"]
        items = {f"{s['n_items']} x {s['n_runs']}" for s in arm["scores"] if s["task"] != "all"}
        rate = [str(of[key]) for key in ("adaptation_optimizer", "adaptation_lr") if of[key] is not None]
        rows.append(
            {
                "Arm": _name(arm),
                "Adapts": of["adapts"] or (arm["status"] if not arm["seeds"] else "not recorded"),
                "Update steps above 0 shots": _text(of["adaptation_steps"]),
                "Optimizer, rate": " ".join(rate),
                "Shots per step": _text(of["adaptation_batch_size"]),
                "Samples": _text(arm["samples_per_task"]),
                "Seeds": ", ".join(map(str, arm["seeds"])),
                "Test items x shot sets, per task": ", ".join(sorted(items)),
            }
        )
    return _frame("How each arm was trained and adapted", rows, (0, 1, 3))


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def comparisons(found: Sequence[Mapping[str, Any]]) -> Table:
    """The mean of the tasks at 0 shots and above."""
    rows = []
    for comparison in found:
        name = {"Difference": " minus ".join(comparison["labels"])}
        if comparison["reason"]:
            rows.append({**name, "Shots": f"missing\n{comparison['reason']}"})
        at = {row["shots"]: row for row in comparison["rows"] if row["task"] == "all"}
        rows += [{**name, **_difference(at[n], words)} for n, words in ((0, "0"), ("all > 0", "> 0")) if n in at]
    return _frame("Paired differences, mean of the unseen tasks, with 95% intervals", rows, (0, 1, 4))


def _difference(row: Mapping[str, Any], shots: str) -> dict[str, str]:
    return {
        "Shots": shots.replace(" ", SPACE),
        "Accuracy (points)": points(row["accuracy"]),
        "Loss (nats)": nats(row["loss"]),
        "Shown for accuracy": row["shown"],
    }


def differences(comparison: Mapping[str, Any]) -> Table:
    """Every task and shot count of one comparison."""
    rows = [
        {
            "Task": MEAN if row["task"] == "all" else row["task"],
            **_difference(row, str(row["shots"])),
            "Items x shot sets x seeds": f"{row['n_items']} x {row['n_runs']} x {row['n_seeds']}",
            "p": p_value(row["accuracy"]["p_holm"]),
        }
        for row in comparison["rows"]
        if "p_holm" in row["accuracy"]
    ]
    return _frame(" minus ".join(comparison["labels"]), rows, (0, 1, 4))


def costs(arms: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for arm in arms:
        cost = arm["cost"]
        rows.append(
            {
                "Arm": _name(arm),
                "Steps": f"{cost['steps']['mean']:g}" if cost["steps"] else "",
                "Tokens": f"{cost['tokens']['mean']:,.0f}" if cost["tokens"] else "",
                **_trained(arm, {"Training s": ("seconds", 1), "Process s": ("process_seconds", 1)}),
                "Runs": str(cost["seconds"]["count"]) if cost["seconds"] else "",
                "Device": cost["device"] or "",
            }
        )
    return _frame("Cost of one training, mean over an arm's trainings", rows, (0, 9))


def factors(found: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        {
            "FOMAML over META-LORA": factor["name"],
            "Measured": factor["group"],
            "Ratio": f"{factor['value']:.2f}",
            "Of one round": "" if factor["low"] is None else f"{factor['low']:.2f} to {factor['high']:.2f}",
        }
        for factor in found
    ]
    caption = "The same ratios and their factors, each measured in isolation by the benchmark (docs/performance.json)"
    return _frame(caption, rows, (0, 1))


def findings(title: str, found: Sequence[Mapping[str, str]]) -> Table:
    rows = [
        {
            "Item": f"{finding['item']}\n{finding['original']}",
            "Status": finding["status"],
            "Figure": finding["figure"],
            "Rule": finding["rule"],
        }
        for finding in found
    ]
    return _frame(title, rows, range(4))


def runs(found: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = [
        {
            "Run": name,
            "State": run["state"],
            "Seed": _text(run["seed"]),
            "Seconds": "" if run["seconds"] is None else f"{run['seconds']:.0f}",
            "Attempts": _text(run["attempts"]),
            "Started": moment(run["started"]) if run["started"] else "",
        }
        for name, run in found.items()
    ]
    return _frame("Runs", rows, (0, 1, 5))


def pairs(caption: str, names: tuple[str, str], found: Mapping[str, str]) -> Table:
    return _frame(caption, [dict(zip(names, item, strict=True)) for item in found.items()], (0, 1))
