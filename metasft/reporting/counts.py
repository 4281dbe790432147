"""How many labelled examples an arm reads: a query set is labelled, too, and belongs beside every count of the support.

A count is a mapping: ``per_task`` (support and query set together, of the task with the most; None where tasks are
mixed), ``query`` (of these, the examples of the query set) and ``in_all`` (of all tasks of a training).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from metasft.reporting.costs import number

MIXED = ("lora_mixed", "lora_mixed_all", "metaicl")
"""Methods of arms that train on all tasks at once, with veRL's own trainer."""
Count = Mapping[str, int | None]


def planned(entry: Mapping[str, Any]) -> Count | None:
    """Of an arm in ``experiments.json``; None where it is of a release that counted the support set alone."""
    per_task = None if entry.get("method") in MIXED else number(entry, "samples_per_task")
    return _count(per_task, number(entry, "query_samples"), number(entry, "labelled_examples"))


def measured(summaries: Sequence[Mapping[str, Any] | None]) -> Count | None:
    """Of the training with the most examples, by ``run_summary.json``; None where none records it."""
    found = [count for summary in summaries if summary and (count := _of_summary(summary))]
    return max(found, key=lambda count: count["in_all"] or 0, default=None)


def _of_summary(summary: Mapping[str, Any]) -> Count | None:
    per_task, in_all = (number(summary, f"labelled_examples{end}") for end in ("_per_task", ""))
    if in_all is None and (number(summary, "train_samples") or 0) > 0:  # of standard LoRA in earlier releases
        in_all = number(summary, "train_samples")
        per_task = in_all if len(summary.get("tasks") or ()) == 1 else None
    return _count(per_task, number(summary, "query_samples"), in_all)


def _count(per_task: float | None, query: float | None, in_all: float | None) -> Count | None:
    if in_all is None:
        return None
    return {"per_task": None if per_task is None else int(per_task), "query": int(query or 0), "in_all": int(in_all)}


def words(count: Count) -> str:
    """``100 + 167 labelled per task``, short enough for a legend."""
    per_task, query = count["per_task"], count["query"]
    if per_task is None:
        return f"{count['in_all']:,} labelled in all"
    return f"{per_task - query:,} + {query:,} labelled per task" if query else f"{per_task:,} labelled per task"


def difference(a: str, ours: Count | None, b: str, theirs: Count | None) -> str | None:
    """A sentence where two arms, by their labels, read different numbers of labelled examples."""
    if ours is None or theirs is None or ours == theirs:
        return None
    return f"{a} reads {_told(ours)}; {b} reads {_told(theirs)}."


def _told(count: Count) -> str:
    per_task, query, in_all = count["per_task"], count["query"], count["in_all"]
    if per_task is None:
        return f"{in_all:,} labelled examples of all tasks together"
    if per_task == in_all:
        return f"{in_all:,} labelled examples of one task"
    parts = f" ({per_task - query:,} support, {query:,} query)" if query else ""
    return f"{per_task:,} labelled examples per task{parts}, {in_all:,} in all"
