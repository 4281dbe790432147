"""Whether adapting helped, and with which settings it would: cross-validation on the examples of a task alone.

Leave-one-out with up to ten examples, five folds above. Where settings are searched for, the figures come from nested
folds (Varma and Simon 2006, BMC Bioinformatics 7:91): each fold is predicted with settings chosen without it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from metasft.adapt.adaptable_model import AdaptableModel, Job, Outcome
from metasft.adapt.packed_runner import Example, TestItem
from metasft.adapt.starts import Adaptation
from metasft.data.episodes import ShuffledStream
from metasft.reporting.statistics import accuracy_interval, run_estimate

LEAVE_ONE_OUT = 10
FOLDS = 5
Indices = tuple[int, ...]


class Tokenized(NamedTuple):
    """The examples of one task as token ids, to adapt on and to be tested on.

    Attributes:
        name: of the task; seeds the order in which its examples are drawn.
        responses: what the assistant is to say, as text.
    """

    name: str
    examples: Sequence[Example]
    items: Sequence[TestItem]
    responses: Sequence[str]

    def job(self, adapt_on: Sequence[int], test_on: Sequence[int], seed: int) -> Job:
        """The adaptation to some examples and its test on others."""
        order = ShuffledStream(len(adapt_on), f"{seed}/adapt/{self.name}") if adapt_on else None
        return Job([self.examples[i] for i in adapt_on], order, [self.items[i] for i in test_on], seed)


class Split(NamedTuple):
    """Indices of the examples that are adapted on, and of those held out."""

    adapt_on: Indices
    held_out: Indices


def folds(indices: Sequence[int], seed: int) -> list[Split]:
    """Every index held out once; none for fewer than two, of which nothing can be held out."""
    if len(indices) < 2:
        return []
    order = list(indices)
    random.Random(f"{seed}/folds").shuffle(order)
    count = len(order) if len(order) <= LEAVE_ONE_OUT else FOLDS
    parts = [order[number::count] for number in range(count)]
    return [Split(tuple(i for i in indices if i not in part), tuple(sorted(part))) for part in map(set, parts)]


class Measured(NamedTuple):
    """One example: nats over its response tokens, how many these are, and whether the generation was the response."""

    nll: float
    tokens: int
    exact: bool | None


def _measured(outcome: Outcome, task: Tokenized, test_on: Sequence[int]) -> dict[int, Measured]:
    exact: list[bool | None] = [None] * len(test_on)
    if outcome.outputs:
        exact = [said.strip() == task.responses[i].strip() for said, i in zip(outcome.outputs, test_on, strict=True)]
    return dict(zip(test_on, map(Measured, outcome.nll, outcome.tokens, exact), strict=True))


Trial = tuple[Tokenized, Split]
Progress = Callable[[], Any]


def run_trials(
    model: AdaptableModel, trials: Sequence[Trial], seed: int, progress: Progress, *, generate: bool
) -> list[dict[int, Measured]]:
    """Adapt and test each trial with the settings in use; one mapping per trial, from index of an example to what was
    measured."""
    jobs = [task.job(*split, seed) for task, split in trials]
    found: list[dict[int, Measured]] = [{} for _ in trials]
    for number, _, outcome in model.adapt(jobs, generate=generate):
        task, split = trials[number]
        found[number] = _measured(outcome, task, split.held_out)
        progress()
    return found


def search(
    model: AdaptableModel,
    problems: Sequence[tuple[Tokenized, Indices]],
    grid: Sequence[Adaptation],
    seed: int,
    progress: Progress,
) -> list[Adaptation]:
    """The candidate with the lowest cross-validated loss for each problem, a task with the examples that may be used.

    Candidates that differ in the number of steps are points of one adaptation. Of a problem with fewer than two
    examples nothing can be held out: it gets the first candidate.

    Args:
        grid: the first one is kept where nothing decides.
    """
    trials = [
        (task, split, number) for number, (task, indices) in enumerate(problems) for split in folds(indices, seed)
    ]
    totals: list[dict[Adaptation, float]] = [dict.fromkeys(grid, 0.0) for _ in problems]
    by_rate: dict[Adaptation, list[Adaptation]] = {}
    for candidate in grid:
        by_rate.setdefault(candidate._replace(steps=0), []).append(candidate)
    for candidates in by_rate.values():
        by_steps = {candidate.steps: candidate for candidate in candidates}
        model.use(candidates[0])
        jobs = [task.job(*split, seed) for task, split, _ in trials]
        for number, steps, outcome in model.adapt(jobs, test_after=list(by_steps), generate=False):
            nll = sum(outcome.nll)
            totals[trials[number][2]][by_steps[steps]] += nll if math.isfinite(nll) else math.inf
            progress()
    return [min(grid, key=lambda candidate, found=found: found[candidate]) for found in totals]


def difference(before: Sequence[Measured], after: Sequence[Measured]) -> dict[str, Any]:
    """Loss before minus loss after, in nats per response token, with Student's 95% interval over the examples.

    Held-out examples of different folds share most of what was adapted on, so that the interval is approximate
    (Bengio and Grandvalet 2004, JMLR 5:1089).
    """
    tokens = sum(one.tokens for one in before) / len(before)
    estimate = run_estimate([(a.nll - b.nll) / tokens for a, b in zip(before, after, strict=True)])
    return {"difference": estimate.difference, "ci95": estimate.ci95}


def summary(measured: Sequence[Measured]) -> dict[str, Any]:
    """Loss in nats per response token and exact match (a fraction), with 95% intervals over the examples."""
    tokens = sum(one.tokens for one in measured)
    per_example = [one.nll / (tokens / len(measured)) for one in measured]
    found: dict[str, Any] = {
        "loss": sum(one.nll for one in measured) / tokens,
        "loss_ci95": run_estimate(per_example).ci95,
    }
    if exact := [one.exact for one in measured if one.exact is not None]:
        found |= {
            "exact_match": sum(exact) / len(exact),
            "exact_match_ci95": accuracy_interval(np.array([exact], float)),
        }
    return found


def verdict(gain: Mapping[str, Any], examples: int, what: str) -> str:
    """In a sentence whether the interval of a difference of losses is clear of 0.

    Args:
        what: that was done and its comparison, such as ``adapting`` or ``the start, compared with a fresh LoRA,``.
    """
    low, high = gain["ci95"] or (-math.inf, math.inf)
    if low > 0:
        return f"{what} helped: {_nats(gain)}"
    if high < 0:
        return f"{what} made it worse: {_nats(gain)}"
    return f"{examples} examples are too few to tell whether {what} helped: {_nats(gain)}"


def _nats(gain: Mapping[str, Any]) -> str:
    low, high = gain["ci95"] or (math.nan, math.nan)
    return f"{gain['difference']:+.3f} nats per response token (95% interval {low:+.3f} to {high:+.3f})"
