"""A loaded model that adapts to examples and is tested, several sets of them at a time, and is then itself again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from metasft.adapt.open_model import OpenedModel, attach_fresh_lora, load_transformers
from metasft.adapt.packed_runner import Example, PackedRunner, Tested, TestItem
from metasft.adapt.padded_runner import PaddedRunner
from metasft.adapt.row_cache import why_not_packed
from metasft.adapt.settings import AdaptationSettings
from metasft.adapt.starts import Adaptation
from metasft.checkpoint.exports import attach_adapter, export_name
from metasft.data.episodes import ShuffledStream
from metasft.model.inner_loop import ALL, InnerLoop, Rates, names_of, within_scope
from metasft.model.stacked_lora import TaskBatchedLoRA

logger = logging.getLogger(__name__)

TOGETHER_CPU = 8
"""Jobs adapted together on a CPU. More of them gain nothing there, and an interruption costs what is under way."""
TOGETHER_BYTES = 2**33
"""Most bytes of adapted parameters, their gradients and optimizer states elsewhere."""


Keep = Callable[[int, dict[str, torch.Tensor], list[float]], None]
"""(index of a job, its adapted tensors on the CPU by their names in an export, the loss of each step's batch)."""
OnStep = Callable[[list[float]], None]
"""(the loss of its batch, before the update step, of every job that is adapted)."""


class Job(NamedTuple):
    """One adaptation with its test.

    Attributes:
        examples: to adapt on; none: the model is tested as it stands.
        order: which of them each update step takes.
        items: to test on.
        seed: of dropout, with which jobs come one at a time.
    """

    examples: Sequence[Example]
    order: ShuffledStream | None
    items: Sequence[TestItem]
    seed: int


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


class AdaptableModel:
    """A loaded model that adapts to examples, is tested while adapted, and is then the same model again, bit for bit.

    Attributes:
        one_at_a_time_because: in words, why jobs are adapted one by one; None where they are adapted together.

    Args:
        config: what is adapted and how.
        opened: what :func:`~metasft.adapt.open_model.open_model` returned for it.

    Raises:
        ValueError: the model cannot be loaded, or the adapter does not fit it.
    """

    def __init__(self, config: AdaptationSettings, opened: OpenedModel) -> None:
        self._config = config
        self.device = opened.device
        all_parameters = opened.adapter is None and opened.fresh_lora is None
        # Steps of 1e-5 vanish in bf16 (8 bits of mantissa): parameters that are adapted stay in fp32.
        dtype = torch.float32 if all_parameters else getattr(torch, config.dtype)
        prompts = opened.chat_template, opened.chat_template_kwargs
        self.tokenizer, model = load_transformers(opened.load_from, dtype, *prompts)
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
        self._num_layers = getattr(self.model.config.get_text_config(), "num_hidden_layers", 0)
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
        if lowest := self._scope.lowest_layer(self._num_layers):
            why = unpacked or ("the model or its adapter has dropout" if self._dropout else "")
            if isinstance(self.runner, PackedRunner) and not why:
                why = self.runner.start_at(lowest, samples)
            if why:
                logger.warning("lower layers are computed anew in every update step: %s", why)

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
        self._rates = within_scope(self._rates, adaptation.lr, self._scope.adapted(tensors, self._num_layers))

    @property
    def together(self) -> int:
        """How many jobs are adapted together: what suits the device."""
        if self.one_at_a_time_because is not None:
            return 1
        if self.device.type == "cpu":
            return TOGETHER_CPU
        return max(1, TOGETHER_BYTES // (16 * self.trained_parameters))

    @contextmanager
    def fresh_lora(self, seed: int) -> Iterator[None]:
        """Inside, an untrained LoRA of the same rank and modules is in the place of the adapter, all of it adapted.

        Inside, :meth:`use` says how; afterwards it has to be called again.
        """
        layers = [module for module in self.model.modules() if hasattr(module, "reset_lora_parameters")]
        before = [parameter.detach().clone() for parameter in self._adapter.parameters]
        scope, self._scope = self._scope, ALL
        lowest, self.runner.lowest_layer = self.runner.lowest_layer, 0
        try:
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                torch.manual_seed(seed)
                for layer in layers:
                    layer.reset_lora_parameters("default", True)
            yield
        finally:
            self._scope, self.runner.lowest_layer = scope, lowest
            for parameter, value in zip(self._adapter.parameters, before, strict=True):
                parameter.data.copy_(value)

    def adapt(
        self,
        jobs: Sequence[Job],
        *,
        together: int | None = None,
        test_after: Sequence[int] | None = None,
        generate: bool = True,
        keep: Keep | None = None,
        on_step: OnStep | None = None,
    ) -> Iterator[tuple[int, int, Outcome]]:
        """Adapt to the examples of every job and test it, several at a time; the results are those of one at a time.

        Args:
            jobs: what to adapt on, and to test.
            together: jobs adapted together; None = :attr:`together`. More than one needs an adapter that can be stacked
                (:attr:`one_at_a_time_because` is None).
            test_after: update steps after which to test; None = after those of :meth:`use`. Jobs without examples are
                tested as they stand.
            generate: False measures losses only.
            keep: called with each job that has examples, after the last step.
            on_step: called after each update step; waits for the device every time.

        Yields:
            (index into ``jobs``, update steps, outcome), each as soon as it is there.
        """
        size = self.together if together is None else together
        assert size == 1 or self.one_at_a_time_because is None, self.one_at_a_time_because
        steps = [self._steps] if test_after is None else sorted(test_after)
        for start in range(0, len(jobs), size):
            some = jobs[start : start + size]
            # Jobs that adapt to nothing leave the parameters as they are: one slot serves all.
            slots = list(range(len(some))) if any(job.examples for job in some) else [0] * len(some)
            for number, done, outcome in self._run_together(some, slots, steps, generate, start, keep, on_step):
                yield start + number, done, outcome

    def _adapted(self, slot: int) -> dict[str, torch.Tensor]:
        names = [export_name(name) for name in names_of(self._adapter.parameters, self.model)]
        if isinstance(self._adapter, InnerLoop):
            tensors = [parameter.detach() for parameter in self._adapter.parameters]
        else:
            tensors = self._adapter.of_task(slot)
        return {name: tensor.to("cpu", copy=True) for name, tensor in zip(names, tensors, strict=True)}

    def _run_together(
        self,
        jobs: Sequence[Job],
        slots: Sequence[int],
        test_after: Sequence[int],
        generate: bool,
        first: int,
        keep: Keep | None,
        on_step: OnStep | None,
    ) -> Iterator[tuple[int, int, Outcome]]:
        started = time.perf_counter()
        if isinstance(self.runner, PackedRunner) and self.runner.lowest_layer:
            jobs = [job._replace(examples=self.runner.with_features(job.examples)) for job in jobs]
        seconds, done = time.perf_counter() - started, 0
        losses: dict[int, list[torch.Tensor]] = {slot: [] for slot in range(len(jobs))}
        adapted = {slot: job for slot, job in zip(slots, jobs, strict=True) if job.examples}
        random_state = torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else [])
        with self._adapter.adapting(slots[-1] + 1, self._rates) as adaptation, random_state:
            torch.manual_seed(jobs[0].seed)
            for stop in test_after:
                started = time.perf_counter()
                if adapted:
                    self.model.train(self._dropout)
                    for _ in range(stop - done):
                        batches = [(slot, self._draw(job)) for slot, job in adapted.items()]
                        for slot, loss in zip(adapted, self.runner.step(adaptation, batches, len(jobs)), strict=True):
                            losses[slot].append(loss)
                        if on_step is not None:
                            on_step([float(losses[slot][-1]) for slot in adapted])
                    self.model.eval()
                done = stop
                measured = {slot: [float(loss) for loss in losses[slot]] for slot in losses}  # waits for the device
                seconds += time.perf_counter() - started
                share = seconds / max(1, len(adapted))
                for number, tested in self._test(adaptation, jobs, slots, generate):
                    spent = share if jobs[number].examples else 0.0
                    ids = [item.output for item in tested] if generate else []
                    yield (
                        number,
                        done,
                        Outcome(
                            outputs=self.tokenizer.batch_decode(ids, skip_special_tokens=True) if ids else [],
                            truncated=[self._stop.isdisjoint(output) for output in ids],
                            nll=[item.nll for item in tested],
                            tokens=[item.tokens for item in tested],
                            support_losses=measured[number],
                            adapt_seconds=spent,
                        ),
                    )
            if keep is not None:
                for slot in adapted:
                    keep(first + slot, self._adapted(slot), measured[slot])
            adaptation.zero_grad()

    def _draw(self, job: Job) -> list[Example]:
        assert job.order is not None
        return [job.examples[i] for i in job.order.take(min(len(job.examples), self._config.adaptation_batch_size))]

    def _test(
        self, adaptation: Any, jobs: Sequence[Job], slots: Sequence[int], generate: bool
    ) -> Iterator[tuple[int, list[Tested]]]:
        """(number of the job, its items in their order) of every job, as soon as its items are through."""
        rows: list[tuple[int, TestItem]] = []
        place: list[tuple[int, int]] = []  # row -> (number of the job, number of the item)
        results: list[dict[int, Tested]] = [{} for _ in jobs]
        for job_number, (slot, job) in enumerate(zip(slots, jobs, strict=True)):
            # Neighbours share what they open with.
            for number in sorted(range(len(job.items)), key=lambda i, items=job.items: items[i].ids):
                rows.append((slot, job.items[number]))
                place.append((job_number, number))
        for row, tested in self.runner.test(adaptation, rows, slots[-1] + 1, generate=generate):
            job_number, number = place[row]
            done = results[job_number]
            done[number] = tested
            if len(done) == len(jobs[job_number].items):
                yield job_number, [done[number] for number in sorted(done)]


def _has_dropout(model: torch.nn.Module) -> bool:
    """Whether training mode differs from evaluation mode by dropout."""
    modules = any(isinstance(m, torch.nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules())
    return modules or bool(getattr(model.config, "attention_dropout", 0.0))
