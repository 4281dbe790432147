"""What a study's checklists are judged on. Each fact takes the study, arms by their roles, and what its rule says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from metasft.reporting import counts
from metasft.reporting.comparisons import ALL_SHOTS, ALL_TASKS, answers, document, groups_of, losses, pools
from metasft.reporting.costs import number
from metasft.reporting.statistics import Estimate, crossed_estimate, over_tasks, run_estimate
from metasft.reporting.tables import nats, points, tasks_named

if TYPE_CHECKING:
    from metasft.reporting.study import Study


class Fact(NamedTuple):
    """``interval``: of a value that is known exactly, twice that value; None where nothing tells how far it varies."""

    text: str
    interval: tuple[float, float] | None = None
    margin: float = 0.0
    measured: bool = True


def _unmeasured(text: str) -> Fact:
    return Fact(text, measured=False)


def _told(estimate: Estimate) -> dict[str, Any]:
    return {"difference": estimate.difference, "ci95": estimate.ci95}


def none(study: Study) -> Fact:
    tasks = dict.fromkeys(
        pool.task
        for arm in study.experiments.arms.values()
        for pool in pools(arm.evaluations)
        if pool.task != ALL_TASKS
    )
    return _unmeasured(f"evaluated: {tasks_named(tasks)}" if tasks else "nothing was evaluated")


# ---- what was compared ----------------------------------------------------------------------------------------------


def difference(study: Study, of: Sequence[str], shots: int | str = ALL_SHOTS, labelled: bool = False) -> Fact:
    """Accuracy of one arm minus that of another, mean of the tasks; ``labelled``: with what both had labelled."""
    comparison = study.difference(*of)
    row = comparison.at(shots) if comparison else None
    if comparison is None or row is None:
        return _unmeasured((comparison.reason or "no such place") if comparison else "an arm was not planned")
    told = document(row)
    text = f"against {comparison.b.label}: {points(told['accuracy'], ' points')}, loss {nats(told['loss'])}"
    a, b = comparison.a, comparison.b
    if labelled and (note := counts.difference(a.label, a.labelled, b.label, b.labelled)):
        text = f"{note.removesuffix('.')}; {text}"
    return Fact(text, row.accuracy.interval(), comparison.margin)


def ratio(study: Study, name: str) -> Fact:
    """A cost of the study."""
    value = next(found["value"] for found in study.ratios if found["name"] == name)
    if value is None:
        return _unmeasured(f"{name}: not measured on both sides")
    return Fact(f"{name}: factor {value:.2f}", (value, value))


def adaptation(study: Study, arm: str, fewer_steps_than: int) -> Fact:
    """Loss with the most shots minus before adaptation, mean of the tasks."""
    found = study.arm(arm)
    groups = found.evaluations if found else []
    shared = [pool for pool in pools(groups) if pool.task == ALL_TASKS and pool.shots != ALL_SHOTS]
    if not shared or shared[0].shots != 0 or shared[-1].shots == 0:
        return _unmeasured("not evaluated both at 0 shots and at more")
    n, tasks = shared[-1].shots, shared[-1].tasks
    recorded = {
        number((replicate.results.get(task) or {}).get(str(n)), "adapt_steps")
        for replicate in found.replicates
        for task in tasks
    } - {None}
    if not recorded:
        return _unmeasured("the evaluation records no update steps")
    # There is one run at 0 shots; it is the start of every run.
    of_tasks = groups_of(tasks, groups)
    right = over_tasks([answers(groups, t, [n]) - answers(groups, t, [0]) for t in tasks], of_tasks, crossed_estimate)
    lost = over_tasks([losses(groups, t, [n]) - losses(groups, t, [0]) for t in tasks], of_tasks, run_estimate)
    gained = f"loss {nats(_told(lost))}, accuracy {points(_told(right), ' points')}"
    return Fact(
        f"{max(recorded):g} update steps on {n} shots: {gained}", lost.ci95, measured=max(recorded) < fewer_steps_than
    )


def loaded(study: Study, arm: str) -> Fact:
    """Finished evaluations of an exported adapter file."""
    found = study.arm(arm)
    settings = [e.settings for group in (found.evaluations if found else []) for e in group]
    hashes = [str(s.get("weights_sha256"))[:12] for s in settings if s.get("model_kind") == "lora_file"]
    if not hashes:
        return _unmeasured("no finished evaluation of an exported file")
    bases = sorted({str(s.get("base_model")).rpartition("/")[2] for s in settings})
    return Fact(f"loaded onto {', '.join(bases)}, file with SHA-256 {', '.join(hashes)}...", (len(hashes), len(hashes)))


# ---- what training logged -------------------------------------------------------------------------------------------


def change(study: Study, arm: str, first: str, last: str) -> Fact:
    """One metric minus another, of every task and meta-step that logged both (``<metric>/<task>``)."""
    pairs = []
    for record in (record for replicate in study.trained(arm) for record in replicate.metrics):
        for key in record:
            if key.startswith(f"{first}/"):
                pairs.append((number(record, key), number(record, last + key.removeprefix(first))))
    pairs = [pair for pair in pairs if None not in pair]
    if len(pairs) < 2:
        return _unmeasured("no losses per task in metrics.jsonl")
    steps = next((export.inner_steps for export in study.exports(arm)), None)
    start, end = np.mean(pairs, axis=0)
    estimate = run_estimate([after - before for before, after in pairs])
    within = f" within K = {steps} steps" if steps else ""
    text = f"{start:.3f} to {end:.3f} nats{within}: {nats(_told(estimate))} ({len(pairs)} adaptations)"
    return Fact(text, estimate.ci95)


def trend(study: Study, arm: str, metric: str, words: str) -> Fact:
    """The last third of the meta-steps minus the first.

    Every task (of every seed) that was drawn in both thirds gives one change, so that it does not matter which tasks a
    meta-step drew.
    """
    changes = []
    for replicate in study.trained(arm):
        by_task: dict[str, list[tuple[float, float]]] = {}
        for record in replicate.metrics:
            for name in record:
                if name.startswith(f"{metric}/") and (value := number(record, name)) is not None:
                    by_task.setdefault(name, []).append((record["step"], value))
        steps = sorted({step for entries in by_task.values() for step, _ in entries})
        third = max(1, len(steps) // 3)
        for entries in by_task.values():
            early = [value for step, value in entries if step in steps[:third]]
            late = [value for step, value in entries if step in steps[-third:] and step not in steps[:third]]
            if early and late:
                changes.append((float(np.mean(early)), float(np.mean(late))))
    if len(changes) < 2:
        return _unmeasured(f"{words}: too few tasks were drawn both early and late")
    first, last = np.mean(changes, axis=0)
    estimate = run_estimate([late - early for early, late in changes])
    ends = f"{first:.3f} in the first third, {last:.3f} in the last"
    return Fact(f"{words}: {ends}; {nats(_told(estimate))} ({len(changes)} changes)", estimate.ci95)


def positive(study: Study, arm: str, metric: str, words: str) -> Fact:
    """The share of meta-steps in which a metric was above 0."""
    values = [number(record, metric) for replicate in study.trained(arm) for record in replicate.metrics]
    if not values:
        return _unmeasured("no meta-steps logged")
    share = sum(value is not None and value > 0 for value in values)
    return Fact(f"{words} above 0 in {share} of {len(values)} meta-steps", (share / len(values),) * 2)


def recorded(study: Study, arm: str, key: str, words: str) -> Fact:
    """A number of ``run_summary.json``: the range over the arm's trainings."""
    found = sorted({value for r in study.trained(arm) if (value := number(r.summary, key)) is not None})
    if not found:
        return _unmeasured(f"run_summary.json records no {words}")
    return Fact(f"{', '.join(f'{value:g}' for value in found)} {words}", (found[-1], found[-1]))


# ---- what the exports hold ------------------------------------------------------------------------------------------


def optimizer_state(study: Study, arm: str) -> Fact:
    """Whether the optimizer holds moments of exactly the exported tensors."""
    known = [export for export in study.exports(arm) if export.optimizer_matches is not None]
    if not known:
        return _unmeasured("no optimizer state of a single process beside the export")
    if not all(export.optimizer_matches for export in known):
        return Fact("moments of tensors that the export does not hold", (0, 0))
    return Fact(f"moments of exactly the {known[0].parameters:,} LoRA parameters, so no step touched the base", (1, 1))


def moved(study: Study, arm: str) -> Fact:
    """The share of B matrices that differ from their start at zero."""
    exports = study.exports(arm)
    some, all_ = sum(export.moved for export in exports), sum(export.matrices for export in exports)
    if not all_:
        return _unmeasured("no export that can be read")
    return Fact(f"{some} of {all_} B matrices moved", (some / all_, some / all_))


def foreign_tensors(study: Study, arm: str) -> Fact:
    """How many tensors of the export are no LoRA matrix."""
    exports = study.exports(arm)
    if not exports:
        return _unmeasured("no export that can be read")
    text = f"{exports[0].bytes:,} bytes, {exports[0].tensor_bytes:,} of them LoRA tensors"
    times = next((found["value"] for found in study.ratios if found["name"] == "checkpoint"), None)
    text += f"; FOMAML's is {times:.1f} times as large" if times else ""
    count = sum(export.foreign for export in exports)
    return Fact(f"{text}; {count} other tensors" if count else text, (count, count))
