"""A model under few-shot evaluation: adapted on shots, tested while it is adapted, and then the same model again.

The planning, checking and counting around it is in :mod:`metasft.evaluation.evaluate`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from metasft.checkpoint.exports import attach_adapter, export_name
from metasft.data.episodes import ShuffledStream
from metasft.data.in_context import in_context
from metasft.data.task_sets import TokenizedSet
from metasft.data.unseen_tasks import order_of_shots
from metasft.evaluation.model_source import Adaptation
from metasft.evaluation.open_model import OpenedModel, attach_fresh_lora, load_transformers
from metasft.evaluation.packed_runner import Example, PackedRunner, Tested, TestItem, response_targets
from metasft.evaluation.padded_runner import PaddedRunner
from metasft.evaluation.protocol import EvaluationConfig, TestTask
from metasft.evaluation.row_cache import why_not_packed
from metasft.model.inner_loop import InnerLoop, Rates, names_of, within_scope
from metasft.model.stacked_lora import TaskBatchedLoRA

logger = logging.getLogger(__name__)

CELLS_CPU = 8
"""Cells adapted together on a CPU. More of them gain nothing there, and an interruption costs what is under way."""
CELL_BYTES = 2**33
"""Most bytes of adapted parameters, their gradients and optimizer states elsewhere."""


class Job(NamedTuple):
    """What one cell adapts on: ``shots`` are indices into the task's shot pool."""

    task: str
    shots: Sequence[int]
    run: int


@dataclass(frozen=True)
class Outcome:
    """What one adaptation and its test gave.

    Attributes:
        outputs: generated text per test item; empty where only the loss was asked for.
        truncated: of every output, whether it reached ``--max-new-tokens`` without an end.
        nll: nats over the response tokens of every test item, measured with the adapted parameters.
        tokens: how many response tokens that are.
        support_losses: mean response loss of each update step's batch, before that step; empty without shots.
        adapt_seconds: wall time of the update steps; of cells adapted together, each one's equal share.
    """

    outputs: list[str]
    truncated: list[bool]
    nll: list[float]
    tokens: list[int]
    support_losses: list[float]
    adapt_seconds: float

    @property
    def loss(self) -> float:
        """Nats per response token over the whole test set."""
        return sum(self.nll) / sum(self.tokens)


class FewShotModel:
    """A loaded model that adapts to shots, is tested while adapted, and is then the same model again, bit for bit.

    Attributes:
        one_at_a_time_because: in words, why cells are adapted one by one; None where they are adapted together.

    Args:
        config: the evaluation.
        opened: what :func:`~metasft.evaluation.open_model.open_model` returned for it.

    Raises:
        ValueError: the model cannot be loaded, or the adapter does not fit it.
    """

    def __init__(self, config: EvaluationConfig, opened: OpenedModel) -> None:
        self._config = config
        self.device = opened.device
        all_parameters = opened.adapter is None and opened.fresh_lora is None
        # Steps of 1e-5 vanish in bf16 (8 bits of mantissa): parameters that are adapted stay in fp32.
        dtype = torch.float32 if all_parameters else getattr(torch, config.dtype)
        prompts = opened.chat_template, opened.chat_template_kwargs
        self.tokenizer, model = load_transformers(opened.load_from, dtype, *prompts)
        self._data_config = opened.data_config
        model = model.to(self.device).eval()
        autocast = all_parameters and config.dtype == "bfloat16"
        self._precision = lambda: torch.autocast(self.device.type, torch.bfloat16, enabled=autocast)
        self._stop = set(model.generation_config.eos_token_id)
        samples = tuple(
            self.tokenizer(f"Which number comes after {number}? Answer with one word.")["input_ids"]
            for number in ("seven", "twenty-nine")
        )
        unpacked = why_not_packed(model, self._precision, samples, config.max_length + config.max_new_tokens)
        if opened.adapter is not None:
            model = attach_adapter(model, opened.adapter)
        elif opened.fresh_lora is not None:
            model = attach_fresh_lora(model, *opened.fresh_lora)
        self.model = model.to(self.device).eval()
        self._dropout = _has_dropout(self.model)
        self._dtype, self._all_parameters, self._unpacked = dtype, all_parameters, unpacked
        self._learned, self._scope = opened.learned, opened.scope
        self.use(opened.adaptation)
        self.trained_parameters = sum(parameter.numel() for parameter in self._adapter.parameters)
        if self.one_at_a_time_because is not None and not all_parameters:
            logger.warning("cells are adapted one at a time: %s", self.one_at_a_time_because)
        common = {
            "model": self.model,
            "device": self.device,
            "precision": self._precision,
            "max_new_tokens": config.max_new_tokens,
            "batch_size": config.batch_size,
        }
        if unpacked is None:
            self.runner: PackedRunner | PaddedRunner = PackedRunner(**common, stop=self._stop, share=not self._dropout)
        else:
            logger.warning("packed rows are not used: %s", unpacked)
            self.runner = PaddedRunner(**common, pad=self.tokenizer.pad_token_id)
        self._shots: dict[str, dict[int, Example]] = {}
        self._tests: dict[str, list[TestItem]] = {}
        self._tasks: dict[str, TestTask] = {}
        self._test_sets: dict[str, TokenizedSet] = {}

    def use(self, adaptation: Adaptation) -> None:
        """Adapt with this optimizer, rate and number of update steps from now on."""
        self._steps = adaptation.steps
        settings = {"lr": adaptation.lr, "optimizer": adaptation.optimizer}
        reason = "all parameters are adapted" if self._all_parameters else self._unpacked
        if reason is None and self._dropout:
            reason = "the model or its adapter has dropout"
        self._adapter: InnerLoop | TaskBatchedLoRA | None = None
        if reason is None:
            try:
                self._adapter = TaskBatchedLoRA(self.model, **settings, dtype=self._dtype)
            except ValueError as error:
                reason = str(error).partition(";")[0]
        if self._adapter is None:
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            self._adapter = InnerLoop(trained, **settings)
        self.one_at_a_time_because: str | None = reason
        self._rates: Rates | None = None
        tensors = [export_name(name) for name in names_of(self._adapter.parameters, self.model)]
        if adaptation.factor is not None:
            assert self._learned is not None and adaptation.optimizer == self._learned.optimizer, adaptation
            self._rates = self._learned.for_tensors(tensors, adaptation.factor)
        self._rates = within_scope(self._rates, adaptation.lr, tensors, self._scope)

    @property
    def cells_per_batch(self) -> int:
        """How many cells are adapted together: what was asked for, or what suits the device."""
        if self.one_at_a_time_because is not None:
            return 1
        if self._config.cells_per_batch is not None:
            return self._config.cells_per_batch
        if self.device.type == "cpu":
            return CELLS_CPU
        return max(1, CELL_BYTES // (16 * self.trained_parameters))

    # ---- data --------------------------------------------------------------------------------------------------------

    def prepare(self, tasks: Iterable[TestTask], shots: Mapping[str, Sequence[int]]) -> None:
        """Tokenise the test items and the shots that will be used, as training does, so that surprises come early.

        Raises:
            ValueError: an example is longer than ``--max-length``, naming it.
        """
        limit = self._config.max_length

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
                example = checked(test[i], task.test_path, i)
                self._tests[task.name].append(
                    TestItem(test.prompt_ids(i), example["input_ids"].tolist(), response_targets(example))
                )

    def _items(self, job: Job) -> list[TestItem]:
        """The test items as this job sees them: after its shots, where these come in the prompt."""
        items = self._tests[job.task]
        if not (self._config.shots_in_prompt and job.shots):
            return items
        task = self._tasks[job.task]
        shots = [task.pool[index]["messages"] for index in job.shots]
        limit = _longest_context(self.model) - self._config.max_new_tokens
        longer = []
        for number, (item, row) in enumerate(zip(items, task.test, strict=True)):
            messages = in_context(shots, row["messages"][:-1])
            prompt = self._test_sets[job.task].prompt_ids(number, messages)
            response = item.ids[item.targets[0] :]
            first = len(prompt) - item.targets[0]
            longer.append(TestItem(prompt, prompt + response, [first + target for target in item.targets]))
            if len(prompt) + len(response) > limit:
                raise ValueError(
                    f"--shots-in-prompt with {len(job.shots)} shots of {job.task} makes prompts of {len(prompt)} "
                    f"tokens, too long for the model's {limit + self._config.max_new_tokens}: ask for fewer (--n-shots)"
                )
        return longer

    # ---- cells -------------------------------------------------------------------------------------------------------

    def adapt_and_test(self, task: str, shots: Sequence[int], *, run: int) -> Outcome:
        """Adapt on the shots (indices into the pool), measure with the adapted parameters, restore the parameters.

        The update budget is that of :meth:`use` whatever the number of shots; no shots, no update.
        """
        ((_, _, outcome),) = self.run_jobs([Job(task, shots, run)])
        return outcome

    def run_jobs(
        self,
        jobs: Sequence[Job],
        *,
        cells_per_batch: int | None = None,
        test_after: Sequence[int] | None = None,
        generate: bool = True,
    ) -> Iterator[tuple[int, int, Outcome]]:
        """Adapt to the shots of every job and test it, several jobs at a time; the results are those of one at a time.

        Args:
            jobs: what to adapt on.
            cells_per_batch: jobs adapted together; None = :attr:`cells_per_batch`. More than one needs an adapter that
                can be stacked (:attr:`one_at_a_time_because` is None).
            test_after: update steps after which to test; None = after those of :meth:`use`. Jobs without shots are
                tested as they stand.
            generate: False measures losses only.

        Yields:
            (index into ``jobs``, update steps, outcome), each as soon as it is there.
        """
        size = self.cells_per_batch if cells_per_batch is None else cells_per_batch
        assert size == 1 or self.one_at_a_time_because is None, self.one_at_a_time_because
        steps = [self._steps] if test_after is None else sorted(test_after)
        for start in range(0, len(jobs), size):
            for number, done, outcome in self._run_together(jobs[start : start + size], steps, generate):
                yield start + number, done, outcome

    def _run_together(self, jobs: Sequence[Job], test_after: Sequence[int], generate: bool) -> Iterator[Any]:
        config = self._config
        streams = {
            slot: order_of_shots(len(job.shots), seed=config.seed, task=job.task, run=job.run)
            for slot, job in enumerate(jobs)
            if job.shots and not self._config.shots_in_prompt
        }
        losses: dict[int, list[torch.Tensor]] = {slot: [] for slot in range(len(jobs))}
        seconds = done = 0
        random_state = torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else [])
        in_prompt = self._config.shots_in_prompt
        # In the prompt, shots leave the parameters as they are: one slot serves all.
        slots = [0] * len(jobs) if in_prompt else list(range(len(jobs)))
        with self._adapter.adapting(slots[-1] + 1, self._rates) as adaptation, random_state:
            torch.manual_seed(config.seed + jobs[0].run)  # for dropout, with which jobs come one at a time
            for stop in test_after:
                started = time.perf_counter()
                if streams:
                    self.model.train(self._dropout)
                    for _ in range(stop - done):
                        batches = [(slot, self._draw(jobs[slot], stream)) for slot, stream in streams.items()]
                        for slot, loss in zip(streams, self.runner.step(adaptation, batches, len(jobs)), strict=True):
                            losses[slot].append(loss)
                    self.model.eval()
                done = stop
                measured = {slot: [float(loss) for loss in losses[slot]] for slot in losses}  # waits for the device
                seconds += time.perf_counter() - started
                share = seconds / max(1, len(streams))
                for number, tested in self._test(adaptation, jobs, slots, generate):
                    spent = share if number in streams else 0.0
                    ids = [item.output for item in tested] if generate else []
                    yield (
                        number,
                        done,
                        Outcome(
                            outputs=self.tokenizer.batch_decode(ids, skip_special_tokens=True),
                            truncated=[self._stop.isdisjoint(output) for output in ids],
                            nll=[item.nll for item in tested],
                            tokens=[item.tokens for item in tested],
                            support_losses=measured[number],
                            adapt_seconds=spent,
                        ),
                    )
            adaptation.zero_grad()

    def _draw(self, job: Job, stream: ShuffledStream) -> list[Example]:
        drawn = stream.take(min(len(job.shots), self._config.adaptation_batch_size))
        return [self._shots[job.task][job.shots[i]] for i in drawn]

    def _test(
        self, adaptation: Any, jobs: Sequence[Job], slots: Sequence[int], generate: bool
    ) -> Iterator[tuple[int, list[Tested]]]:
        """(number of the job, its items in their order) of every job, as soon as its items are through."""
        rows: list[tuple[int, TestItem]] = []
        place: list[tuple[int, int]] = []  # row -> (number of the job, number of the item)
        results: list[dict[int, Tested]] = [{} for _ in jobs]
        for job_number, (slot, job) in enumerate(zip(slots, jobs, strict=True)):
            items = self._items(job)
            # Neighbours share what they open with.
            for number in sorted(range(len(items)), key=lambda i: items[i].ids):
                rows.append((slot, items[number]))
                place.append((job_number, number))
        for row, tested in self.runner.test(adaptation, rows, slots[-1] + 1, generate=generate):
            job_number, number = place[row]
            done = results[job_number]
            done[number] = tested
            if len(done) == len(self._tests[jobs[job_number].task]):
                yield job_number, [done[number] for number in sorted(done)]


def _longest_context(model: Any) -> int:
    """Tokens that the model reads at most, where its configuration tells."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31


def _has_dropout(model: torch.nn.Module) -> bool:
    """Whether training mode differs from evaluation mode by dropout."""
    modules = any(isinstance(m, torch.nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules())
    return modules or bool(getattr(model.config, "attention_dropout", 0.0))
