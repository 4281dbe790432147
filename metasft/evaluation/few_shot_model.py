"""A model under few-shot evaluation: cells of the protocol as adaptations of an :class:`AdaptableModel`.

The planning, checking and counting around it is in :mod:`metasft.evaluation.evaluate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from metasft.adapt.adaptable_model import AdaptableModel, Job, Outcome
from metasft.adapt.open_model import OpenedModel
from metasft.adapt.packed_runner import Example, TestItem
from metasft.data.in_context import in_context
from metasft.data.task_sets import TokenizedSet
from metasft.data.unseen_tasks import order_of_shots
from metasft.evaluation.protocol import EvaluationConfig, TestTask


class CellJob(NamedTuple):
    """What one cell adapts on: ``shots`` are indices into the task's shot pool."""

    task: str
    shots: Sequence[int]
    run: int


class FewShotModel(AdaptableModel):
    """An :class:`AdaptableModel` with the tasks of an evaluation.

    Args:
        config: the evaluation.
        opened: what :func:`~metasft.adapt.open_model.open_model` returned for it.

    Raises:
        ValueError: the model cannot be loaded, or the adapter does not fit it.
    """

    def __init__(self, config: EvaluationConfig, opened: OpenedModel) -> None:
        super().__init__(config, opened)
        self._evaluation = config
        self._data_config = opened.data_config
        self._shots: dict[str, dict[int, Example]] = {}
        self._tests: dict[str, list[TestItem]] = {}
        self._tasks: dict[str, TestTask] = {}
        self._test_sets: dict[str, TokenizedSet] = {}

    @property
    def cells_per_batch(self) -> int:
        """How many cells are adapted together: what was asked for, or what suits the device."""
        asked = self._evaluation.cells_per_batch
        return self.together if asked is None or self.one_at_a_time_because is not None else asked

    # ---- data --------------------------------------------------------------------------------------------------------

    def prepare(self, tasks: Iterable[TestTask], shots: Mapping[str, Sequence[int]]) -> None:
        """Tokenise the test items and the shots that will be used, as training does, so that surprises come early.

        Raises:
            ValueError: an example is longer than ``--max-length``, naming it.
        """
        limit = self._evaluation.max_length

        def checked(example: Example, path: Path, row: int) -> Example:
            if len(example["input_ids"]) > limit:
                raise ValueError(
                    f"{path} row {row} has {len(example['input_ids'])} tokens, more than --max-length {limit}: raise it"
                )
            return example

        for task in tasks:
            pool = TokenizedSet(task.pool_path, len(task.pool), self.tokenizer, self._data_config)
            test = TokenizedSet(task.test_path, len(task.test), self.tokenizer, self._data_config)
            self._test_sets[task.name] = test
            self._shots[task.name] = {i: checked(pool[i], task.pool_path, i) for i in shots[task.name]}
            self._tasks[task.name] = task
            self._tests[task.name] = []
            for i in range(len(task.test)):
                checked(test[i], task.test_path, i)
                self._tests[task.name].append(TestItem.of(test, i))

    def _items(self, cell: CellJob) -> list[TestItem]:
        """The test items as this cell sees them: after its shots, where these come in the prompt."""
        items = self._tests[cell.task]
        if not (self._evaluation.shots_in_prompt and cell.shots):
            return items
        task = self._tasks[cell.task]
        shots = [task.pool[index]["messages"] for index in cell.shots]
        limit = _longest_context(self.model) - self._evaluation.max_new_tokens
        longer = []
        for number, (item, row) in enumerate(zip(items, task.test, strict=True)):
            messages = in_context(shots, row["messages"][:-1])
            prompt = self._test_sets[cell.task].prompt_ids(number, messages)
            response = item.ids[item.targets[0] :]
            first = len(prompt) - item.targets[0]
            longer.append(TestItem(prompt, prompt + response, [first + target for target in item.targets]))
            if len(prompt) + len(response) > limit:
                raise ValueError(
                    f"--shots-in-prompt with {len(cell.shots)} shots of {cell.task} makes prompts of {len(prompt)} "
                    f"tokens, too long for the model's {limit + self._evaluation.max_new_tokens}: ask for fewer "
                    "(--n-shots)"
                )
        return longer

    # ---- cells -------------------------------------------------------------------------------------------------------

    def adapt_and_test(self, task: str, shots: Sequence[int], *, run: int) -> Outcome:
        """Adapt on the shots (indices into the pool), measure with the adapted parameters, restore the parameters.

        The update budget is that of :meth:`use` whatever the number of shots; no shots, no update.
        """
        ((_, _, outcome),) = self.run_jobs([CellJob(task, shots, run)])
        return outcome

    def run_jobs(
        self,
        cells: Sequence[CellJob],
        *,
        cells_per_batch: int | None = None,
        test_after: Sequence[int] | None = None,
        generate: bool = True,
    ) -> Iterator[tuple[int, int, Outcome]]:
        """Adapt to the shots of every cell and test it: as :meth:`AdaptableModel.adapt`."""
        together = self.cells_per_batch if cells_per_batch is None else cells_per_batch
        yield from self.adapt(
            [self._job(cell) for cell in cells], together=together, test_after=test_after, generate=generate
        )

    def _job(self, cell: CellJob) -> Job:
        seed, items = self._evaluation.seed, self._items(cell)
        if not cell.shots or self._evaluation.shots_in_prompt:
            return Job((), None, items, seed + cell.run)
        order = order_of_shots(len(cell.shots), seed=seed, task=cell.task, run=cell.run)
        return Job([self._shots[cell.task][index] for index in cell.shots], order, items, seed + cell.run)


def _longest_context(model: Any) -> int:
    """Tokens that the model reads at most, where its configuration tells."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
