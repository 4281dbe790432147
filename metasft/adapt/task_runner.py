"""Adapting to tasks of one's own, several together, and measuring whether it helped."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import metasft.adapt.cross_validation as cv
from metasft.adapt.adaptable_model import AdaptableModel
from metasft.adapt.cross_validation import Measured, Tokenized
from metasft.adapt.open_model import LearnedRates, OpenedModel, open_model
from metasft.adapt.settings import DEFAULT_LR_LORA, DEFAULT_OPTIMIZER, AdaptConfig
from metasft.adapt.starts import Adaptation, candidate_name, candidates, find_model_source

CURVE_SHOTS = (5, 10, 25, 50, 100)


class HeldOut(NamedTuple):
    """Every example of a task as it was measured while held out.

    Attributes:
        all_others: after adapting to all others of its fold.
        by_shots: after adapting to so many of them.
    """

    all_others: dict[int, Measured]
    by_shots: dict[int, dict[int, Measured]]


@dataclass
class Result:
    """Of one task: how it was adapted, the adapted tensors, and what was measured (empty without)."""

    adaptation: Adaptation
    tensors: Mapping[str, Any]
    support_losses: Sequence[float]
    figures: Mapping[str, Any] = field(default_factory=dict)
    curve: Sequence[Mapping[str, Any]] = ()

    def record(self) -> dict[str, Any]:
        return {
            "adaptation": {**self.adaptation._asdict(), "name": candidate_name(self.adaptation)},
            "support_losses": list(self.support_losses),
            "figures": dict(self.figures),
            "curve": list(self.curve),
        }


@dataclass
class TaskRunner:
    """Adapts a model to tasks of one's own and, as asked for, searches settings and measures on held-out examples.

    Attributes:
        config: what was asked for, with the batch of an update step and the lengths settled.
        opened: the start.
        model: that start, loaded.
        on_step: called after every update step towards an adapter that is kept, with the loss of every task.
    """

    config: AdaptConfig
    opened: OpenedModel
    model: AdaptableModel
    on_step: Any = None
    _beside: AdaptableModel | None = None  # where all parameters are adapted: a second model, with a LoRA on it

    def grid(self, learned: LearnedRates | None) -> list[Adaptation]:
        """Candidates of the search.

        Args:
            learned: rates that those of their optimizer scale.
        """
        steps = sorted(self.config.search_steps) or [self.opened.adaptation.steps]
        return candidates(self.config.search_grid, steps, learned and (learned.optimizer, learned.start))

    @property
    def compares(self) -> bool:
        """Whether there is a fresh LoRA to compare with: where one is adapted anyway there is none."""
        return self.opened.fresh_lora is None

    def shots(self, examples: int) -> list[int]:
        """Of the curve: as many as can be adapted on with something held out."""
        most = min((len(split.adapt_on) for split in cv.folds(range(examples), self.config.seed)), default=0)
        return [n for n in CURVE_SHOTS if n < most] + [most] * (most > 0) if self.config.curve else []

    def adaptations(self, examples: int) -> int:
        """How many adaptations a task with so many examples takes, for the progress."""
        splits = cv.folds(range(examples), self.config.seed)
        rates = len(self.config.search_grid) * max(1, len(self.config.search_steps)) if self.config.search else 0
        inner = sum(len(cv.folds(split.adapt_on, self.config.seed)) for split in splits)
        search = rates * len(splits)
        if not self.config.evaluate or not splits:
            return 1 + search
        arm = len(splits) * (1 + max(0, len(self.shots(examples)) - 1)) + rates * inner
        return 1 + search + 1 + arm * (2 if self.compares else 1)

    def adapt(self, tasks: Sequence[Tokenized], progress: cv.Progress) -> list[Result]:
        """Adapt to all examples of every task, and measure on held-out ones."""
        results = self._adapt_to_all(tasks, progress)
        measured = [n for n, task in enumerate(tasks) if self.config.evaluate and len(task.items) > 1]
        if not measured:
            return results
        some, seed = [tasks[n] for n in measured], self.config.seed
        untouched = [(task, cv.Split((), tuple(range(len(task.items))))) for task in some]
        before = cv.run_trials(self.model, untouched, seed, progress, generate=True)
        after = self._cross_validate(some, self.model, self.opened.adaptation, self.opened.learned, progress)
        fresh: Sequence[HeldOut | None] = [None] * len(some)
        if self.compares:
            with self._fresh_lora() as (model, adaptation):
                fresh = self._cross_validate(some, model, adaptation, None, progress)
        for number, *arms in zip(measured, before, after, fresh, strict=True):
            results[number] = replace(results[number], figures=_figures(*arms), curve=_curve(*arms))
        return results

    def _adapt_to_all(self, tasks: Sequence[Tokenized], progress: cv.Progress) -> list[Result]:
        everything = [tuple(range(len(task.items))) for task in tasks]
        chosen = [self.opened.adaptation] * len(tasks)
        if self.config.search:
            problems = list(zip(tasks, everything, strict=True))
            chosen = cv.search(self.model, problems, self.grid(self.opened.learned), self.config.seed, progress)
        results: dict[int, Result] = {}
        for adaptation in dict.fromkeys(chosen):
            numbers = [number for number, one in enumerate(chosen) if one == adaptation]
            self.model.use(adaptation)

            def keep(job: int, tensors: Any, losses: Any, numbers: Any = numbers, adaptation: Any = adaptation) -> None:
                results[numbers[job]] = Result(adaptation, tensors, losses)
                progress()

            jobs = [tasks[number].job(everything[number], (), self.config.seed) for number in numbers]
            for _ in self.model.adapt(jobs, generate=False, keep=keep, on_step=self.on_step):
                pass
        return [results[number] for number in range(len(tasks))]

    def _cross_validate(
        self,
        tasks: Sequence[Tokenized],
        model: AdaptableModel,
        adaptation: Adaptation,
        learned: LearnedRates | None,
        progress: cv.Progress,
    ) -> list[HeldOut]:
        """Every example of every task, measured while held out; settings are searched for each fold without it."""
        seed = self.config.seed
        trials = [(task, split) for task in tasks for split in cv.folds(range(len(task.items)), seed)]
        chosen = [adaptation] * len(trials)
        if self.config.search:
            problems = [(task, split.adapt_on) for task, split in trials]
            chosen = cv.search(model, problems, self.grid(learned), seed, progress)
        found = {task.name: HeldOut({}, {}) for task in tasks}
        for used in dict.fromkeys(chosen):
            model.use(used)
            some = [trial for trial, one in zip(trials, chosen, strict=True) if one == used]
            for (task, _), measured in zip(
                some, cv.run_trials(model, some, seed, progress, generate=True), strict=True
            ):
                found[task.name].all_others.update(measured)
            fewer = [(task, one) for task, split in some for one in self._parts(task, split)]
            measured_by_part = cv.run_trials(model, fewer, seed, progress, generate=False)
            for (task, split), measured in zip(fewer, measured_by_part, strict=True):
                found[task.name].by_shots.setdefault(len(split.adapt_on), {}).update(measured)
        for task in tasks:
            if shots := self.shots(len(task.items)):
                found[task.name].by_shots[shots[-1]] = found[task.name].all_others
        return [found[task.name] for task in tasks]

    def _parts(self, task: Tokenized, split: cv.Split) -> list[cv.Split]:
        """The split with fewer examples to adapt on, for the curve: nested sets."""
        order = list(split.adapt_on)
        random.Random(f"{self.config.seed}/curve").shuffle(order)
        return [cv.Split(tuple(order[:n]), split.held_out) for n in self.shots(len(task.items))[:-1]]

    @contextlib.contextmanager
    def _fresh_lora(self) -> Iterator[tuple[Any, Adaptation]]:
        """A model with an untrained LoRA, and how it is adapted: with as many steps."""
        given = self.opened.adaptation
        adaptation = Adaptation(DEFAULT_OPTIMIZER, DEFAULT_LR_LORA, given.steps, "default")
        if self.opened.adapter is not None:
            with self.model.fresh_lora(self.config.seed):
                yield self.model, adaptation
            return
        if self._beside is None:
            config = replace(self.config, full=False)
            self._beside = AdaptableModel(config, open_model(config, find_model_source(config)))
        yield self._beside, adaptation


def _figures(before: Mapping[int, Measured], after: HeldOut, fresh: HeldOut | None) -> dict[str, Any]:
    order, count = sorted(before), len(before)
    arms = {"before": before, "after": after.all_others, **({} if fresh is None else {"fresh_lora": fresh.all_others})}
    measured = {name: [values[i] for i in order] for name, values in arms.items()}
    found: dict[str, Any] = {name: cv.summary(values) for name, values in measured.items()}
    gain = cv.difference(measured["before"], measured["after"])
    found |= {"gain": gain, "verdict": cv.verdict(gain, count, "adapting")}
    if fresh is not None:
        over = cv.difference(measured["fresh_lora"], measured["after"])
        what = "this start in place of a fresh LoRA"
        found |= {"over_fresh_lora": over, "verdict_on_start": cv.verdict(over, count, what)}
    return found


def _curve(before: Mapping[int, Measured], after: HeldOut, fresh: HeldOut | None) -> list[dict[str, Any]]:
    if not after.by_shots:
        return []
    arms = {"after": after.by_shots, **({} if fresh is None else {"fresh_lora": fresh.by_shots})}
    points: list[dict[str, Any]] = [{"examples": 0, "after": cv.summary(list(before.values()))}]
    for n in sorted(after.by_shots):
        points.append({"examples": n, **{arm: cv.summary(list(found[n].values())) for arm, found in arms.items()}})
    return points
