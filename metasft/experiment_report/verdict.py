"""Which of the guide's three scenarios the measurements show, by a rule on difference and interval.

d is the accuracy of META-LORA minus that of FOMAML on 300 samples, mean over the unseen tasks and the shot counts above
0, with its 95% interval; m is the margin of the comparison (3 points) and 10 points the guide's "large gap".

* **Scenario 1, success:** with 100 samples the whole interval lies above -m.
* **Scenario 2, partial success:** not 1; with 100 samples the whole interval lies below 0, with 300 above -m.
* **Scenario 3, failure:** with 100 samples the whole interval lies below -10 points, with 300 below -m.
* **None of the three:** with 100 samples it lies between -10 points and 0, with 300 below -m.
* **Undecided** otherwise: the interval cannot tell. What would decide is worked out from the variance measured.

"Not worse" says little where nothing was learned: when FOMAML itself is not shown to be above the base model, which
adapts on the same shots without meta-training, a success is called hollow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metasft.experiment_report.results import Experiments
from metasft.experiment_report.statistics import Comparison, Difference, compare, points_text, sizes_text

MARGIN = 0.03
LARGE_GAP = 0.10
UNDECIDED = "undecided"
NOT_MEASURED = "not measured"
TITLES = {
    "success": "Scenario 1: META-LORA succeeds",
    "partial": "Scenario 2: META-LORA succeeds in part",
    "failure": "Scenario 3: META-LORA fails",
    "neither": "None of the guide's three scenarios",
    UNDECIDED: "Undecided",
    NOT_MEASURED: "Not measured",
}
MEANINGS = {
    "success": "On 100 samples per task META-LORA is not worse than FOMAML on 300.",
    "partial": "META-LORA is worse than FOMAML on 100 samples per task, and not worse on 300.",
    "failure": "META-LORA is far worse than FOMAML, and more samples do not close the gap.",
    "neither": "META-LORA is worse than FOMAML by less than the guide's large gap, and more samples do not close it.",
    UNDECIDED: "The interval covers more than one of the guide's scenarios.",
    NOT_MEASURED: "The comparison the guide asks for has not been run to its end.",
}
_NORMAL = 1.96


@dataclass(frozen=True)
class Condition:
    """One side of a rule: the whole interval of ``comparison`` lies above (or below) ``bound``."""

    comparison: Comparison
    above: bool
    bound: float

    @property
    def row(self) -> Difference | None:
        return self.comparison.few_shot

    @property
    def met(self) -> bool:
        if self.row is None:
            return False
        low, high = self.row.accuracy.interval()
        return low > self.bound if self.above else high < self.bound

    @property
    def leaning(self) -> bool:
        """Whether the estimate itself, without its interval, is on the right side."""
        return self.row is not None and (
            self.row.accuracy.centre > self.bound if self.above else self.row.accuracy.centre < self.bound
        )

    def text(self) -> str:
        name = f"{self.comparison.a.label} minus {self.comparison.b.label}"
        bound = f"{100 * self.bound:g}".replace("-", "\N{MINUS SIGN}")
        asked = f"whole interval {'above' if self.above else 'below'} {bound} points"
        if self.row is None:
            return f"{name}: {asked}: not measured ({self.comparison.reason})"
        return f"{name}: {asked}: {'met' if self.met else 'not met'}, {points_text(self.row.accuracy, 2)}"

    def needed(self) -> str:
        """What would decide an unmet condition, should difference and variances stay as they are."""
        row = self.row
        if row is None:
            return f"the missing runs: {self.comparison.reason}"
        distance = abs(row.accuracy.centre - self.bound)
        allowed = (distance / _NORMAL) ** 2  # the variance at which the interval ends at the bound
        variance = row.accuracy.error**2
        rest = variance - row.item_variance
        if distance < 1e-9:
            return "no number of test items: the difference lies at the bound"
        sizes = f"now {sizes_text(row)}"
        if allowed > rest:
            items = math.ceil(row.n_items * row.item_variance / (allowed - rest))
            if items > row.n_items:
                return f"about {items:,} test items instead of {row.n_items:,}, all else as it is"
        times = variance / allowed
        if times <= 1:  # the t quantile of the few degrees of freedom is what is missing, not variance
            return f"more shot sets or seeds, which settle how far the results vary ({sizes})"
        return f"about {times:.1f} times as many test items, shot sets and seeds ({sizes})"


@dataclass(frozen=True)
class Verdict:
    """The scenario and what it rests on.

    Attributes:
        outcome: a key of ``TITLES``.
        hollow: whether the test is not shown to tell methods apart; None where that was not measured.
        leaning: the outcome that the estimates point at while undecided.
        conditions: of the outcome, or of what it leans to.
        decide: what would decide, a sentence part per unmet condition.
    """

    outcome: str
    few: Comparison | None = None
    many: Comparison | None = None
    sensitivity: Comparison | None = None
    hollow: bool | None = None
    leaning: str | None = None
    conditions: tuple[Condition, ...] = ()
    decide: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        if self.outcome == "success" and self.hollow:
            return f"{TITLES['success']} by the rule, but hollow"
        return TITLES[self.outcome]


def margin_of(experiments: Experiments, a: str, b: str) -> float:
    """The margin that a suite asks for when it compares these arms, else the guide's 3 points."""
    asked = [m for suite in experiments.suites.values() for one, two, m in suite.pairs if (one, two) == (a, b)]
    return asked[0] if asked else MARGIN


def judge(experiments: Experiments) -> Verdict:
    """The verdict from the arms of Exp 1, 2 and 3 and the base model."""
    fomaml = experiments.of_experiment("Exp 1", "fomaml")
    few_arm = experiments.of_experiment("Exp 2", "meta_lora", 100)
    many_arm = experiments.of_experiment("Exp 3", "meta_lora", 300)
    base = next((arm for arm in experiments.arms.values() if arm.method == "base"), None)
    if fomaml is None or few_arm is None:
        return Verdict(NOT_MEASURED, decide=("the arms of Exp 1 and Exp 2 of the suite matrix",))
    few = compare(few_arm, fomaml, margin_of(experiments, few_arm.name, fomaml.name))
    many = compare(many_arm, fomaml, few.margin) if many_arm else None
    sensitivity = compare(fomaml, base, few.margin) if base else None
    hollow = None
    if sensitivity is not None and sensitivity.few_shot is not None:
        hollow = sensitivity.few_shot.accuracy.interval()[0] <= 0
    shared: dict[str, Any] = {"few": few, "many": many, "sensitivity": sensitivity, "hollow": hollow}
    if few.few_shot is None:
        reason = few.reason or "neither arm was evaluated with shots"
        return Verdict(NOT_MEASURED, **shared, decide=(f"the missing runs: {reason}",))
    rules = _rules(few, many or Comparison(few.a, few.b, few.margin, reason="Exp 3 was not planned"))
    for outcome, conditions in rules.items():
        if all(condition.met for condition in conditions):
            return Verdict(outcome, **shared, conditions=conditions)
    leaning, conditions = _leaning(rules)
    decide = tuple(dict.fromkeys(condition.needed() for condition in conditions if not condition.met))
    return Verdict(UNDECIDED, **shared, leaning=leaning, conditions=conditions, decide=decide)


def _rules(few: Comparison, many: Comparison) -> dict[str, tuple[Condition, ...]]:
    margin = few.margin
    return {
        "success": (Condition(few, True, -margin),),
        "partial": (Condition(few, False, 0.0), Condition(many, True, -margin)),
        "failure": (Condition(few, False, -LARGE_GAP), Condition(many, False, -margin)),
        "neither": (Condition(few, False, 0.0), Condition(few, True, -LARGE_GAP), Condition(many, False, -margin)),
    }


def _leaning(rules: Mapping[str, Sequence[Condition]]) -> tuple[str | None, tuple[Condition, ...]]:
    """(outcome, its conditions) that the estimates point at; without Exp 3, nothing beyond the first is pointed at."""
    for outcome, conditions in rules.items():
        if all(condition.leaning for condition in conditions):
            return outcome, tuple(conditions)
    return None, tuple(rules["partial"])
