"""Tables, as pandas frames whose cells are text, and how numbers are written in them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from operator import itemgetter
from typing import Any

import pandas as pd

from metasft.config.result_files import model_memory
from metasft.reporting import counts
from metasft.reporting.arms import META_LEARNED
from metasft.reporting.comparisons import above_trivial
from metasft.reporting.statistics import NEW_TASKS

MEAN = "mean of tasks"
MINUS, SPACE = "\N{MINUS SIGN}", "\N{NO-BREAK SPACE}"
NO_NUMBER = "no number"
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


def _table(
    caption: str, rows: Iterable[Any], columns: Mapping[str, Callable[[Any], Any]], words: Collection[int] = (0,)
) -> Table:
    """A table with one row for each of ``rows``, whose cells the columns read off it; None is an empty cell."""
    rows = list(rows)
    texts = {name: ["" if (v := read(row)) is None else str(v) for row in rows] for name, read in columns.items()}
    return Table(caption, pd.DataFrame(texts), words)


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


def baseline(scores: Iterable[Mapping[str, Any]], key: str) -> float | None:
    """What answers without a model get at a place; None where it is not known, or not the same in all scores."""
    values = {None if (value := score.get(key)) is None else round(value, 9) for score in scores}
    return values.pop() if len(values) == 1 else None


def loss(score: Mapping[str, Any] | None) -> str:
    """``0.605 [0.557, 0.652]``."""
    if score is None:
        return ""
    return f"{score['loss']:.3f}" + ("" if not score["loss_ci95"] else " [{:.3f}, {:.3f}]".format(*score["loss_ci95"]))


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


def beats(row: Mapping[str, Any] | None) -> str | None:
    """The probability that one arm is above the other on a new task: ``62% [41, 80]``."""
    found = (row or {}).get("beats")
    return found and "{:.0%} [{:.0f}, {:.0f}]".format(found["probability"], *(100 * limit for limit in found["ci95"]))


def tasks_named(tasks: Collection[str]) -> str:
    """Their names, or how many they are where a sentence has no room for them."""
    return ", ".join(tasks) if len(tasks) <= 5 else f"{len(tasks)} tasks"


def moment(value: Any) -> str:
    """An ISO time to the minute, as it is where it is none."""
    try:
        return datetime.fromisoformat(str(value)).strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return str(value) if value else "not recorded"


FILTERS: dict[str, Callable[..., str]] = {"seconds": seconds, "points": points, "nats": nats, "moment": moment}


# ---- of evaluations and methods -------------------------------------------------------------------------------------


def results_text(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The results of an evaluation for a terminal: one line per task and N."""
    columns = {
        "task": lambda row: row[0],
        "shots": lambda row: row[1],
        "accuracy": lambda row: f"{row[2]['accuracy_mean']:.1%}",
        "95% interval": lambda row: "[{:.1%}, {:.1%}]".format(*row[2]["ci95"]),
        "format": lambda row: f"{row[2]['format_accuracy']:.1%}",
        "loss": lambda row: f"{row[2]['loss_mean']:.3f}",
        "majority": lambda row: f"{row[2]['majority_baseline']:.1%}",
        "trivial": lambda row: f"{row[2]['trivial_baseline']:.1%}",
    }
    rows = [(task, shots, entry) for task, by_shots in results.items() for shots, entry in by_shots.items()]
    return _table("", rows, columns).frame.to_string(index=False)


def overview(methods: Sequence[Mapping[str, Any]]) -> Table:
    """One row per method and task, costs of training beside accuracies; the last of a task is its constant answer."""
    scores = {(m["label"], s["task"], s["shots"]): s for m in methods for s in m["scores"]}
    shots = sorted({n for _, _, n in scores})
    rows: list[tuple[str, str, Any]] = []
    for task in dict.fromkeys(task for _, task, _ in scores):
        rows += [(m["label"], task, m) for m in methods if any((m["label"], task, n) in scores for n in shots)]
        baselines = {s["majority_baseline"] for (_, name, _), s in scores.items() if name == task}
        if len(baselines) == 1 and None not in baselines:
            rows.append(("most frequent answer", task, baselines.pop()))

    def scored(n: int, write: Callable[[Mapping[str, Any]], Any]) -> Callable[[Any], Any]:
        return lambda row: write(scores[row[0], row[1], n]) if (row[0], row[1], n) in scores else None

    def right(n: int) -> Callable[[Any], Any]:
        return lambda row: f"{row[2]:.1%}" if isinstance(row[2], float) else scored(n, accuracy)(row)

    def spent(cost_of: Callable[[Mapping[str, Any]], float], unit: float, digits: str) -> Callable[[Any], Any]:
        def read(row: Any) -> str | None:
            if isinstance(row[2], float):
                return None
            return "not measured" if row[2]["summary"] is None else f"{cost_of(row[2]['summary']) / unit:{digits}}"

        return read

    def formatted(score: Mapping[str, Any]) -> str | None:
        return None if score["format_accuracy"] is None else f"{score['format_accuracy']:.1%}"

    ends = dict.fromkeys((shots[0], shots[-1]))
    columns = {
        "Method": lambda row: row[0],
        "Task": lambda row: row[1],
        **{f"Accuracy, {n} shots": right(n) for n in shots},
        f"Format, {shots[-1]} shots": scored(shots[-1], formatted),
        **{f"Loss, {n} shots": scored(n, lambda score: f"{score['loss']:.3f}") for n in ends},
        "Training (s)": spent(itemgetter("seconds_total"), 1, ".1f"),
        "s/step": spent(itemgetter("seconds_per_step_median"), 1, ".3g"),
        "Peak memory (MB)": spent(model_memory, 1e6, ".0f"),
        "Checkpoint (MB)": spent(itemgetter("checkpoint_bytes"), 1e6, ".2f"),
    }
    return _table("", rows, columns, (0, 1))


def paired(found: Mapping[str, Any]) -> Table:
    """Every row of two evaluations compared item by item."""
    a, b, margin = found["a"]["label"], found["b"]["label"], f"{100 * found['margin']:g} points"

    def said(row: Mapping[str, Any]) -> str:
        right = row["accuracy"]
        higher = f"{a if right['difference'] > 0 else b} is higher" if right["p_holm"] < 1 - found["level"] else ""
        close = f"{a} is not worse by {margin}" if right["not_worse"] else ""
        close = f"equivalent within {margin}" if right["equivalent"] else close
        return "; ".join(filter(None, (higher, close))) or "nothing"

    columns = {
        "Task": lambda row: row["task"],
        "Shots": lambda row: row["n_shots"],
        "Items x runs": lambda row: f"{row['n_items']} x {row['n_runs']}",
        f"Accuracy, {a}": lambda row: f"{row['accuracy']['a']:.1%}",
        f"Accuracy, {b}": lambda row: f"{row['accuracy']['b']:.1%}",
        "Difference (points)": lambda row: points(row["accuracy"]),
        "p": lambda row: p_value(row["accuracy"]["p_holm"]),
        f"p, within {margin}": lambda row: p_value(row["accuracy"]["equivalence_p_holm"]),
        f"p, {a} not worse by {margin}": lambda row: p_value(row["accuracy"]["not_worse_p_holm"]),
        f"Loss, {a}": lambda row: f"{row['loss']['a']:.3f}",
        f"Loss, {b}": lambda row: f"{row['loss']['b']:.3f}",
        "Difference (nats)": lambda row: nats(row["loss"]),
        "p (loss)": lambda row: p_value(row["loss"]["p_holm"]),
        "Accuracy: shown": said,
    }
    if any(row["beats"] for row in found["rows"]):
        columns[f"New task: {a} above {b}"] = beats
    return _table("", found["rows"], columns, (0, 1, 13))


# ---- of the experiments' report -------------------------------------------------------------------------------------

Arm = Mapping[str, Any]


def _name(arm: Arm) -> str:
    notes = [arm["experiment"]] if arm["experiment"] else []
    notes += [counts.words(arm["labelled"])] if arm.get("labelled") else []
    notes += ["partly measured"] if arm["seeds"] and arm["status"] != "measured" else []
    return "\n".join(filter(None, (arm["label"], "; ".join(notes))))


def _labelled(arm: Arm) -> str | None:
    """In all; of reports of earlier releases what they recorded."""
    if arm.get("labelled"):
        return f"{arm['labelled']['in_all']:,} in all"
    samples = arm["samples_per_task"]
    is_part = arm["method"] in META_LEARNED
    return None if samples is None else f"{samples} and a query set" if is_part else str(samples)


def _missing(arm: Arm) -> str:
    return f"missing\n{arm['status'].removeprefix('missing: ')}"


def _score(arm: Arm, task: str, n: int | str, by: str = "shots") -> Mapping[str, Any] | None:
    return next((score for score in arm["scores"] if (score["task"], score[by]) == (task, n)), None)


def _spent(key: str, unit: float, without: str | None = None) -> Callable[[Arm], str | None]:
    """The mean of a cost; ``without``: of an arm that trains nothing."""

    def read(arm: Arm) -> str | None:
        if not arm["trains"]:
            return without
        value = (arm["cost"][key] or {}).get("mean")
        return (
            "not measured"
            if value is None
            else f"{value / unit:.3g}"
            if value < 1000 * unit
            else f"{value / unit:,.0f}"
        )

    return read


_COSTS = {
    "Peak GB": _spent("memory", 1e9),
    "s per step": _spent("step_seconds", 1),
    "Checkpoint MB": _spent("checkpoint", 1e6),
}


def shows_nothing(arm: Arm) -> bool:
    """Whether the interval of the arm's accuracy with shots reaches down to what trivial solvers get."""
    return above_trivial(_score(arm, "all", "all > 0")) is False


def _above_trivial(arm: Arm) -> str | None:
    score = _score(arm, "all", "all > 0")
    if score is None or above_trivial(score) is None:
        return None
    return f"{score['trivial_baseline']:.1%}\n{'not shown below' if shows_nothing(arm) else 'below the arm'}"


def mean_of(entries: Iterable[Mapping[str, Any]]) -> tuple[str, str]:
    """In words: what scores or rows over all tasks are the mean of, and what their intervals are."""
    new = next((e for e in entries if e.get("of") == NEW_TASKS), None)
    if new is None:
        return "mean of the tasks", "95% intervals"
    return f"mean of {new['n_tasks']} tasks in {new['n_groups']} groups", "95% intervals about new tasks"


def scores_of(arms: Sequence[Arm]) -> list[Mapping[str, Any]]:
    return [score for arm in arms for score in arm["scores"]]


def summary(caption: str, arms: Sequence[Arm], axis: Mapping[str, Any] | None = None) -> Table:
    """Every arm: mean of the tasks at 0 shots and above, and its costs; with the value of an ablation's ``axis``.

    Trivial solvers: their mean, and whether the whole interval with shots lies above it.
    """
    columns = {
        "Arm": _name,
        **({axis["label"]: lambda arm: f"{axis['values'].get(arm['name'], float('nan')):g}"} if axis else {}),
        "Accuracy, 0 shots": lambda arm: accuracy(_score(arm, "all", 0)) if arm["scores"] else _missing(arm),
        "Accuracy, shots > 0": lambda arm: accuracy(_score(arm, "all", "all > 0")) if arm["scores"] else None,
        **({"Trivial solvers": _above_trivial} if any(map(_above_trivial, arms)) else {}),
        "Loss, shots > 0": lambda arm: loss(_score(arm, "all", "all > 0")),
        "Hours": _spent("seconds", 3600.0, "no training"),
        **_COSTS,
    }
    return _table(caption, arms, columns)


def ratios(found: Mapping[str, Any]) -> Table:
    def amount(side: str) -> Callable[[Mapping[str, Any]], str | None]:
        def read(ratio: Mapping[str, Any]) -> str | None:
            if ratio[side] is None:
                return None
            unit, size = largest_unit(ratio[side], "time" if "time" in ratio["name"] else "memory")
            return f"{ratio[side] / size:.3g} {unit}"

        return read

    columns = {
        "Cost": lambda ratio: ratio["name"],
        "Ratio": lambda ratio: "not measured" if ratio["value"] is None else f"{ratio['value']:.2f}",
        "FOMAML": amount("a"),
        "META-LORA": amount("b"),
        "The guide expects": lambda ratio: ratio["expected"],
    }
    caption = "Cost of FOMAML (Exp 1) over META-LORA (Exp 2): above 1, META-LORA is cheaper by that factor"
    return _table(caption, found["ratios"], columns)


def by_task(arms: Sequence[Arm], task: str, by: str = "shots", caption: str = "") -> Table:
    """Every arm at every shot count (or number of update steps) of one task, and what answers without a model get."""
    counts = sorted({s[by] for arm in arms for s in arm["scores"] if s["task"] == task and isinstance(s[by], int)})
    baselines = []
    for key, name in _BASELINES.items():
        value = baseline((s for s in scores_of(arms) if s["task"] == task), key)
        if value is not None:
            baselines.append((name, value))

    def cell(n: int) -> Callable[[Any], str | None]:
        def read(arm: Any) -> str | None:
            if isinstance(arm, tuple):
                return f"{arm[1]:.1%}"
            if not arm["scores"]:
                return _missing(arm) if n == counts[0] else None
            score = _score(arm, task, n, by)
            share = (score or {}).get("format_accuracy")
            text = "missing" if score is None else f"{accuracy(score)}\nloss {loss(score)}"
            return text + ("" if share is None else f"; format {share:.0%}")

        return read

    name = {"Arm": lambda arm: arm[0] if isinstance(arm, tuple) else _name(arm)}
    caption = caption or f"{MEAN if task == 'all' else task}: accuracy [95%], loss, format accuracy"
    return _table(caption, [*arms, *baselines], {**name, **{f"{n} {by}": cell(n) for n in counts}})


def tasks(found: Mapping[str, Any], arms: Sequence[Arm], shots: int) -> Table:
    """Every task at one shot count, an arm per column, beside the group and what the best trivial solver gets."""
    arms = [arm for arm in arms if arm["scores"]]
    rows = dict.fromkeys(s["task"] for s in scores_of(arms) if s["shots"] == shots and s["task"] != "all")
    groups, trivial = found.get("groups", {}), found.get("trivial", {})

    def right(arm: Arm) -> Callable[[str], str]:
        def read(task: str) -> str:
            score = _score(arm, task, shots)
            return accuracy(score).replace(" [", "\n[") if score else "missing"

        return read

    columns: dict[str, Callable[[Any], Any]] = {
        "Task": lambda task: "\n".join(filter(None, (task, groups.get(task)))),
        **(
            {
                "Trivial": lambda task: (
                    f"{(s := trivial[task])['accuracy']:.1%}\n{s['name']}" if task in trivial else None
                )
            }
            if trivial
            else {}
        ),
        **{arm["label"]: right(arm) for arm in arms},
    }
    return _table(f"Accuracy at {shots} shots [95%, about the task itself]", rows, columns)


def forms(arms: Sequence[Arm]) -> Table:
    """What the answers look like with shots: read strictly and leniently, whether they could be read, ended."""

    def share(key: str) -> Callable[[Arm], str | None]:
        def read(arm: Arm) -> str | None:
            value = (_score(arm, "all", "all > 0") or {}).get(key)
            return None if value is None else f"{value:.1%}"

        return read

    columns = {
        "Arm": _name,
        "Accuracy": share("accuracy"),
        "Worst shot set": share("accuracy_worst"),
        "Read leniently": share("accuracy_lenient"),
        "In the asked form": share("format_accuracy"),
        "Cut off": share("truncated_share"),
    }
    return _table("Answers, mean of tasks and of the shot counts above 0", [a for a in arms if a["scores"]], columns)


def adaptations(arms: Sequence[Arm]) -> Table:
    def of(*keys: str) -> Callable[[Arm], str]:
        return lambda arm: " ".join(str(arm["adaptation"][key]) for key in keys if arm["adaptation"][key] is not None)

    def optimizer_and_rate(arm: Arm) -> str:
        by_shots = arm["adaptation"].get("adaptation_by_shots")
        if by_shots:
            return ", ".join(f"{shots} shots: {choice}" for shots, choice in by_shots.items())
        return of("adaptation_optimizer", "adaptation_lr")(arm)

    columns = {
        "Arm": _name,
        "Adapts": lambda arm: arm["adaptation"]["adapts"] or ("not recorded" if arm["seeds"] else arm["status"]),
        "Update steps above 0 shots": of("adaptation_steps"),
        "Optimizer, rate": optimizer_and_rate,
        "Shots per step": of("adaptation_batch_size"),
        "Labelled examples": _labelled,
        "Seeds": lambda arm: ", ".join(map(str, arm["seeds"])),
        "Test items x shot sets, per task": lambda arm: ", ".join(
            sorted({f"{s['n_items']} x {s['n_runs']}" for s in arm["scores"] if s["task"] != "all"})
        ),
    }
    return _table("How each arm was trained and adapted", arms, columns, (0, 1, 3))


_BASELINES = {
    "majority_baseline": "Most frequent answer\nmajority baseline",
    "trivial_baseline": "Trivial solvers\nthe best of each task",
}
_DIFFERENCE = {
    "Accuracy (points)": lambda row: row and points(row["accuracy"]),
    "Loss (nats)": lambda row: row and nats(row["loss"]),
    "Shown for accuracy": lambda row: row and row["shown"],
}


def comparisons(found: Sequence[Mapping[str, Any]]) -> Table:
    """The mean of the tasks at 0 shots and above."""
    rows: list[tuple[Any, str, Any]] = []
    for comparison in found:
        at = {row["shots"]: row for row in comparison["rows"] if row["task"] == "all"}
        rows += [(comparison, words, at[n]) for n, words in ((0, "0"), ("all > 0", "> 0")) if n in at]
        rows += [(comparison, f"missing\n{comparison['reason']}", None)] if comparison["reason"] else []
    columns = {
        "Difference": lambda row: " minus ".join(row[0]["labels"]),
        "Shots": lambda row: row[1].replace("> 0", f">{SPACE}0"),
        **{name: lambda row, read=read: read(row[2]) for name, read in _DIFFERENCE.items()},
    }
    pooled = [row for _, _, row in rows if row]
    if any(row.get("beats") for row in pooled):
        columns["First is higher on a new task"] = lambda row: beats(row[2])
    return _table("Paired differences, {}, with {}".format(*mean_of(pooled)), rows, columns, (0, 1, 4))


def needed(found: Sequence[Mapping[str, Any]]) -> Table | None:
    """How many tasks would decide, of the mean over shot counts above 0; None where nothing is about new tasks."""
    rows = [
        (comparison, row, each)
        for comparison in found
        for row in comparison["rows"]
        if (row["task"], row["shots"]) == ("all", "all > 0")
        for each in row.get("needed", ())
    ]

    def count(test: str) -> Callable[[Any], str]:
        return lambda row: NO_NUMBER if row[2][test] is None else f"{row[2][test]:,}"

    def margin(row: Any) -> str:
        return f"{100 * row[0]['margin']:g}"

    columns = {
        "Difference": lambda row: " minus ".join(row[0]["labels"]),
        "Seeds": lambda row: f"{row[2]['seeds']}{' (now)' if row[2]['seeds'] == row[1]['n_seeds'] else ''}",
        "Tasks now": lambda row: f"{row[1]['n_tasks']} in {row[1]['n_groups']} groups",
        **({"Points": margin} if len({margin(row) for row in rows}) > 1 else {}),
        "Tasks that show such a difference": count("superiority"),
        "Tasks that show equivalence within it": count("equivalence"),
    }
    return _table("Tasks and seeds that would decide", rows, columns) if rows else None


def differences(comparison: Mapping[str, Any], brief: bool = False) -> Table:
    """Every task and shot count of one comparison; ``brief``: of single tasks the mean over shot counts above 0."""
    columns = {
        "Task": lambda row: MEAN if row["task"] == "all" else row["task"],
        "Shots": lambda row: str(row["shots"]).replace(" ", SPACE),
        **_DIFFERENCE,
        "Items x shot sets x seeds": lambda row: f"{row['n_items']} x {row['n_runs']} x {row['n_seeds']}",
        "p": lambda row: p_value(row["accuracy"]["p_holm"]),
    }
    rows = [row for row in comparison["rows"] if "p_holm" in row["accuracy"]]
    rows = [row for row in rows if not brief or row["task"] == "all" or row["shots"] == "all > 0"]
    return _table(" minus ".join(comparison["labels"]), rows, columns, (0, 1, 4))


def costs(arms: Sequence[Arm]) -> Table:
    columns = {
        "Arm": _name,
        "Steps": lambda arm: arm["cost"]["steps"] and f"{arm['cost']['steps']['mean']:g}",
        "Tokens": lambda arm: arm["cost"]["tokens"] and f"{arm['cost']['tokens']['mean']:,.0f}",
        "Training s": _spent("seconds", 1, "no training"),
        "Process s": _spent("process_seconds", 1),
        **_COSTS,
        "Runs": lambda arm: arm["cost"]["seconds"] and arm["cost"]["seconds"]["count"],
        "Device": lambda arm: arm["cost"]["device"],
    }
    return _table("Cost of one training, mean over an arm's trainings", arms, columns, (0, 9))


def findings(title: str, found: Sequence[Mapping[str, str]]) -> Table:
    columns = {
        "Item": lambda finding: f"{finding['item']}\n{finding['original']}",
        "Status": lambda finding: finding["status"],
        "Figure": lambda finding: finding["figure"],
        "Rule": lambda finding: finding["rule"],
    }
    return _table(title, found, columns, range(4))


def runs(found: Mapping[str, Mapping[str, Any]]) -> Table:
    columns = {
        "Run": lambda run: run[0],
        "State": lambda run: run[1]["state"],
        "Seed": lambda run: run[1]["seed"],
        "Seconds": lambda run: None if run[1]["seconds"] is None else f"{run[1]['seconds']:.0f}",
        "Attempts": lambda run: run[1]["attempts"],
        "Started": lambda run: run[1]["started"] and moment(run[1]["started"]),
    }
    return _table("Runs", found.items(), columns, (0, 1, 5))


def pairs(caption: str, names: tuple[str, str], found: Mapping[str, str]) -> Table:
    return _table(caption, found.items(), {names[0]: lambda pair: pair[0], names[1]: lambda pair: pair[1]}, (0, 1))
