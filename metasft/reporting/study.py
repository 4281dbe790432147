"""A study: who is compared with whom, and what follows from it, by rules that are data (``studies/<name>.yaml``).

The verdict is the first outcome all of whose conditions hold for the intervals of the differences; the items of the
checklists compare facts (:mod:`metasft.reporting.facts`) with bounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import yaml

from metasft.reporting import facts
from metasft.reporting.arms import Arm, Comparison, Experiments, compare
from metasft.reporting.comparisons import ALL_SHOTS, ALL_TASKS, Row, above_trivial
from metasft.reporting.costs import cost, ratio
from metasft.reporting.exports import Export, read_export
from metasft.reporting.pages import STUDIES
from metasft.reporting.statistics import NEW_TASKS

SUPPORTED, NOT_SUPPORTED = "supported", "not supported"
INCONCLUSIVE, NOT_MEASURED, UNDECIDED = "inconclusive", "not measured", "undecided"
_NORMAL = 1.96


@dataclass(frozen=True)
class Study:
    """The rules of one study and the experiments that they are applied to."""

    experiments: Experiments
    rules: Mapping[str, Any]
    comparisons: dict[tuple[str, str], Comparison | None] = field(default_factory=dict)

    @classmethod
    def read(cls, name: str, experiments: Experiments) -> Study:
        return cls(experiments, yaml.safe_load((STUDIES / f"{name}.yaml").read_text(encoding="utf-8")))

    # ---- who is who -------------------------------------------------------------------------------------------------

    @property
    def asked(self) -> bool:
        """Whether the experiments are about the study's question at all."""
        return self.rules["suite"] in self.experiments.suites

    def arm(self, role: str) -> Arm | None:
        """The arm that carries the experiment's name; else the suite's only one of the method (and support samples)."""
        asked = self.rules["arms"][role]
        for arm in self.experiments.arms.values():
            if "experiment" in asked and arm.experiment == asked["experiment"]:
                return arm
        keys = [key for key in ("method", "support_samples") if key in asked]
        suite = self.experiments.arms_of(self.rules["suite"])
        alike = [arm for arm in suite if all(getattr(arm, key) == asked[key] for key in keys)]
        return alike[0] if len(alike) == 1 else None

    def trained(self, role: str) -> list[Any]:
        arm = self.arm(role)
        return arm.trained if arm else []

    def difference(self, a: str, b: str) -> Comparison | None:
        """A minus B, by their roles; None where one of them was not planned. The margin is the one a suite asks for."""
        if (a, b) not in self.comparisons:
            one, other = self.arm(a), self.arm(b)
            found = None
            if one and other:
                asked = [c for suite in self.experiments.suites.values() for c in suite["comparisons"]]
                margins = [margin for x, y, margin in asked if (x, y) == (one.name, other.name)]
                found = compare(one, other, margins[0] if margins else self.rules["margin"])
            self.comparisons[a, b] = found
        return self.comparisons[a, b]

    def beneath(self, role: str) -> list[str] | None:
        """What the arm is not shown to be above, in words: an arm with any of these has shown nothing.

        That is the base model adapted on the same shots, and the best solvers that understand nothing, where the
        results know them. None where it was not compared with the base model.
        """
        comparison = self.difference(role, "base")
        row = comparison.at() if comparison else None
        if row is None:
            return None
        found = [] if row.accuracy.interval()[0] > 0 else ["the base model adapted on the same shots"]
        try:
            scores = comparison.a.scores()
        except ValueError:  # of seeds that were not compared; the report says so
            scores = []
        score = next((s for s in scores if (s["task"], s["shots"]) == (ALL_TASKS, ALL_SHOTS)), {})
        if above_trivial(score) is False:
            found.append(f"the trivial solvers ({score['trivial_baseline']:.1%})")
        return found

    def exports(self, role: str) -> list[Export]:
        return [export for r in self.trained(role) if (export := read_export(r.train_folder)) is not None]

    @cached_property
    def ratios(self) -> list[dict[str, Any]]:
        """Costs of one arm over another, as the study asks: ``name``, ``expected``, ``value``, ``a``, ``b``."""
        sides = [self.arm(role) for role in self.rules["costs"]["of"]]
        costs = [cost_of(arm) if arm else None for arm in sides]
        return [
            {"name": asked["name"], "expected": asked["expected"], **ratio(asked["cost"], *costs)}
            for asked in self.rules["costs"]["ratios"]
        ]

    # ---- the verdict ------------------------------------------------------------------------------------------------

    def verdict(self) -> dict[str, Any]:
        """Which outcome the intervals show.

        Returns:
            ``outcome``, its ``title``, ``meaning`` and ``tone``; ``comparison``, the first difference; ``conditions``
            of the outcome, or while undecided of the one that the estimates are ``leaning`` to; ``would_decide``, parts
            of a sentence; ``reference``, the comparison that says whether the test can tell methods apart, and
            ``hollow`` where it is not shown to (None: not measured), its first arm not being above ``beneath``.
        """
        rules = self.rules["verdict"]
        differences = {name: self.difference(*sides) for name, sides in rules["differences"].items()}
        first, reference = next(iter(differences.values())), self.difference(*rules["reference"])
        beneath = self.beneath(rules["reference"][0])
        found = {
            "comparison": first,
            "reference": reference,
            "margin": first.margin if first else self.rules["margin"],
            "hollow": None if beneath is None else bool(beneath),
            "beneath": beneath or [],
            "leaning": None,
            "conditions": [],
            "would_decide": [],
        }
        if first is None or first.at() is None:
            reason = "the arms that the verdict compares" if first is None else _missing(first)
            return self._told(NOT_MEASURED, {**found, "would_decide": [reason]})
        bounds = {**rules["bounds"], "margin": found["margin"]}
        outcomes = {
            name: [Condition.of(condition, differences, bounds) for condition in outcome["conditions"]]
            for name, outcome in rules["outcomes"].items()
        }
        for name, conditions in outcomes.items():
            if all(condition.met for condition in conditions):
                return self._told(name, {**found, "conditions": conditions})
        leaning = next((name for name, of in outcomes.items() if all(condition.leans for condition in of)), None)
        conditions = outcomes[leaning or rules[UNDECIDED]["unless_leaning"]]
        needed = dict.fromkeys(condition.needed() for condition in conditions if not condition.met)
        found |= {"leaning": leaning, "conditions": conditions, "would_decide": list(needed)}
        return self._told(UNDECIDED, found)

    def _told(self, outcome: str, found: dict[str, Any]) -> dict[str, Any]:
        rules = self.rules["verdict"]
        said = rules["outcomes"].get(outcome) or rules[outcome]
        leaning = rules["outcomes"][found["leaning"]]["title"] if found["leaning"] else None
        told = {key: said[key] for key in ("title", "meaning", "tone")}
        return {"outcome": outcome, **told, **found, "leaning_title": leaning}

    # ---- the checklists ---------------------------------------------------------------------------------------------

    def checklists(self) -> dict[str, list[dict[str, str]]]:
        """Title -> findings: ``item``, ``original`` (the guide's words), ``status``, ``figure`` and ``rule``."""
        return {title: [self._finding(item) for item in items] for title, items in self.rules["checklists"].items()}

    def _finding(self, item: Mapping[str, Any]) -> dict[str, str]:
        judged = [self._judge(test) for test in item["tests"]]
        # One part that fails decides; all must hold.
        order = (NOT_SUPPORTED, NOT_MEASURED, INCONCLUSIVE, SUPPORTED)
        status = min((status for status, _ in judged), key=order.index)
        figure = "; ".join(dict.fromkeys(text for _, text in judged))
        told = {key: item[key] for key in ("item", "original", "rule")}
        return {**told, "status": status, "figure": figure}

    def _judge(self, test: Mapping[str, Any]) -> tuple[str, str]:
        bounds = {key: test[key] for key in ("above", "below", "at_least", "at_most") if key in test}
        own = {key: value for key, value in test.items() if key not in (*bounds, "fact", "refuted_by", "beyond_base")}
        fact = getattr(facts, test["fact"])(self, **own)
        if not fact.measured:
            return NOT_MEASURED, fact.text
        ((kind, bound),) = bounds.items()
        margin = {"margin": fact.margin}
        bound = _bound(bound, margin)
        status = _status(fact.interval, kind, bound, _bound(test.get("refuted_by", bound), margin))
        beneath = self.beneath(test["of"][1]) if status == SUPPORTED and test.get("beyond_base") else None
        if beneath:
            return INCONCLUSIVE, f"{fact.text}; that arm is not shown to be above {' and '.join(beneath)}"
        return status, fact.text


def cost_of(arm: Arm) -> dict[str, Any]:
    return cost([r.summary for r in arm.trained], [r.train["seconds"] for r in arm.trained if r.train])


def _bound(value: Any, named: Mapping[str, float]) -> float:
    """A bound as the rules write it: a number, or a name, with a minus sign or without."""
    if not isinstance(value, str):
        return float(value)
    return -named[value[1:]] if value.startswith("-") else named[value]


def _status(interval: tuple[float, float] | None, kind: str, bound: float, refuted: float) -> str:
    if interval is None:
        return INCONCLUSIVE
    low, high = interval
    holds = {"above": low > bound, "below": high < bound, "at_least": low >= bound, "at_most": high <= bound}[kind]
    fails = {"above": high <= refuted, "below": low >= refuted, "at_least": high < refuted, "at_most": low > refuted}
    return SUPPORTED if holds else NOT_SUPPORTED if fails[kind] else INCONCLUSIVE


def _missing(comparison: Comparison) -> str:
    return f"the missing runs: {comparison.reason or 'neither arm was evaluated with shots'}"


@dataclass(frozen=True)
class Condition:
    """One side of a rule: the whole interval of a difference lies above (or below) ``bound``."""

    comparison: Comparison | None
    above: bool
    bound: float

    @classmethod
    def of(
        cls, rule: Mapping[str, Any], differences: Mapping[str, Comparison | None], bounds: Mapping[str, float]
    ) -> Condition:
        above = "above" in rule
        return cls(differences[rule["difference"]], above, _bound(rule["above" if above else "below"], bounds))

    @property
    def row(self) -> Row | None:
        return self.comparison.at() if self.comparison else None

    @property
    def met(self) -> bool:
        return self.row is not None and self._beyond(self.row.accuracy.interval()[0 if self.above else 1])

    @property
    def leans(self) -> bool:
        """Whether the estimate itself, without its interval, is on the right side."""
        return self.row is not None and self._beyond(self.row.accuracy.centre)

    def _beyond(self, value: float) -> bool:
        return value > self.bound if self.above else value < self.bound

    def needed(self) -> str:
        """What would decide an unmet condition, should difference and variances stay as they are."""
        row = self.row
        if row is None:
            return _missing(self.comparison) if self.comparison else "the missing runs: an arm was not planned"
        distance = abs(row.accuracy.centre - self.bound)
        allowed = (distance / _NORMAL) ** 2  # the variance at which the interval ends at the bound
        variance = row.accuracy.error**2
        rest = variance - row.sampled_variance
        count, word = (row.n_tasks, "tasks") if row.of == NEW_TASKS else (row.n_items, "test items")
        if distance < 1e-9:
            return f"no number of {word}: the difference lies at the bound"
        if allowed > rest:
            enough = math.ceil(count * row.sampled_variance / (allowed - rest))
            if enough > count:
                return f"about {enough:,} {word} instead of {count:,}, all else as it is"
        sizes = f"now {sizes_text(vars(row))}"
        times = variance / allowed
        many = "tasks" if row.of == NEW_TASKS else "test items, shot sets"
        if times <= 1:  # the t quantile of the few degrees of freedom is what is missing, not variance
            few = "groups of tasks" if row.of == NEW_TASKS else "shot sets"
            return f"more {few} or seeds, which settle how far the results vary ({sizes})"
        return f"about {times:.1f} times as many {many} and seeds ({sizes})"


def sizes_text(row: Mapping[str, Any]) -> str:
    """How much was measured: ``16 tasks in 12 groups, 96 test items, 3 shot sets per task, 1 seed``."""

    def counted(count: int, word: str) -> str:
        return f"{count:,} {word}{'' if count == 1 else 's'}"

    tasks = f"{row['n_tasks']} tasks in {row['n_groups']} groups, " if row.get("of") == NEW_TASKS else ""
    parts = counted(row["n_items"], "test item"), counted(row["n_runs"], "shot set"), counted(row["n_seeds"], "seed")
    return tasks + "{}, {} per task, {}".format(*parts)
