"""What the sections share: trainers as arms, tasks of an exact length, the gradient check, interleaved timing,
ratios."""

from __future__ import annotations

import contextlib
import importlib
import io
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

GRADIENT_TOLERANCE = {"fp32": 1e-5, "bf16": None}
"""Largest relative difference of two arms' meta-gradients; None: reported only (the arms round in different places)."""

GPU_TOLERANCE = 1e-4
"""The least of either on a GPU, whose kernels add up in another order for every shape."""

SOFTMAX_TOLERANCE = {"fp32": 5e-4, "bf16": None}
"""The same against code that takes torch's own fp32 cross entropy, whose error alone is 2e-5 of the gradient."""

PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""No tokens beside the text, so that an example can have exactly 16."""

SCRIPTS = {
    "meta_lora": ("meta_lora_trainer", "MetaLoRATrainer", "config_meta_lora_guide"),
    "fomaml": ("maml_sft_trainer", "FOMAMLTrainer", "config_fomaml_math_science"),
}


class ArmsDiffer(Exception):
    """Two arms that should do the same work computed different things."""


@dataclass(frozen=True)
class Settings:
    """What every section is run with; plain JSON data.

    Attributes:
        model: Hugging Face folder.
        task_dir: the project's meta-training tasks.
        device: ``cpu`` or ``cuda``.
        dtype: ``fp32`` or ``bf16``.
        repeats: timed rounds of all arms.
        largest_cell: tokens of an inner step of all tasks, above which a cell of the inner-step section is left out.
        token_counts: tokens per task and inner step of the inner-step section; None for all.
        cell_seconds: no further round once a comparison has taken this long (two rounds are always run).
        test_items: per cell of the evaluation's grid.
        seed: of data, episodes and initial adapters.
        threads: per process.
        quick: a few small cells, to try the machinery.
        full_pass: also time one whole pass over the support set, instead of computing it from the time of a step.
        deviate: name of an arm whose inner learning rate is changed by 10%, so that the gradient check must fail.
    """

    model: str
    task_dir: str
    device: str = "cpu"
    dtype: str = "fp32"
    repeats: int = 5
    largest_cell: int = 16384
    token_counts: Sequence[int] | None = None
    cell_seconds: float = 120.0
    test_items: int = 16
    seed: int = 1
    threads: int = 1
    quick: bool = False
    full_pass: bool = False
    deviate: str | None = None


# ---------------------------------------------------------------------------------------------------------- trainers


def precision(dtype: str, *, lora: bool) -> list[str]:
    """Overrides for a run in ``dtype``: with all parameters trained, bf16 means autocast over fp32 parameters."""
    model_dtype = dtype if lora else "fp32"
    return [f"engine.model_dtype={model_dtype}", f"engine.mixed_precision.param_dtype={dtype}"]


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """veRL's process group, of one process where torchrun has set nothing else."""
    from verl.utils.distributed import destroy_global_process_group, initialize_global_process_group

    from metasft.training import launch

    launch._single_process_defaults()
    initialize_global_process_group()
    try:
        yield
    finally:
        destroy_global_process_group()


def build_trainer(
    method: str, settings: Settings, folder: Path, overrides: Sequence[str], *, chat_template: str | None = None
) -> Any:
    """A trainer as its script builds it from the shipped YAML, on ``settings`` plus ``overrides``; examples tokenised.

    Raises:
        ValueError: a setting or the data is unusable (from the trainer's own checks).
    """
    from hydra import compose, initialize_config_dir

    from metasft.training import launch

    script, name, config_name = SCRIPTS[method]
    trainer_class = getattr(importlib.import_module(script), name)
    fixed = [
        f"model.path={settings.model}",
        f"meta.task_dir={settings.task_dir}",
        f"trainer.default_local_dir={folder}",
        f"trainer.seed={settings.seed}",
        "trainer.total_training_steps=1000000",
        "trainer.resume_mode=disable",
        "trainer.logger=[]",
        "meta.adaptation_gain_freq=0",
        *precision(settings.dtype, lora=method == "meta_lora"),
    ]
    with initialize_config_dir(str(ROOT / "data" / "math_science_meta"), version_base=None):
        config = compose(config_name, overrides=[*fixed, *overrides])
    if chat_template is not None:
        from omegaconf import OmegaConf

        OmegaConf.set_struct(config, False)
        config.model.custom_chat_template = chat_template
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = launch.build(config, trainer_class)
    for task_set in (*trainer.support_sets.values(), *trainer.query_sets.values()):
        for index in range(len(task_set)):  # a run tokenises an example once, thousands of steps before its end
            task_set[index]
    return trainer


def set_adapters(parameters: Mapping[str, Any], seed: int) -> None:
    """Give LoRA's B matrices, 0 at the start, small random values: at 0 the gradients of A vanish and check nothing."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name in sorted(parameters):
        if "lora_B" in name:
            values = torch.randn(parameters[name].shape, generator=generator) * 0.01
            with torch.no_grad():
                parameters[name].copy_(values)


class TrainerArm:
    """A trainer whose meta-steps are timed.

    Args:
        trainer: from :func:`build_trainer`.
        detail: also time each forward and backward, inner update and outer step (these wait for the device).
    """

    def __init__(self, trainer: Any, *, detail: bool = False) -> None:
        self.trainer, self.steps = trainer, 0
        self.keep_gradient = False
        self.gradient: dict[str, Any] = {}
        self.episodes: list[Any] = []
        self._seconds: dict[str, float] = {}
        trainer.episodes.adapt = self._timed("inner_seconds", trainer.episodes.adapt)
        if detail:
            engine, loop = trainer.engine, trainer.inner_loop
            engine.loss_and_backward = self._timed("forward_backward_seconds", engine.loss_and_backward)
            loop.step = self._timed("inner_update_seconds", loop.step)
            engine.optimizer_step = self._timed("outer_step_seconds", engine.optimizer_step)
        step, draw = trainer.engine.optimizer_step, trainer.train_dataloader.next_meta_batch

        def optimizer_step() -> float:
            if self.keep_gradient:
                self.gradient = {n: p.grad.detach().clone() for n, p in self.parameters.items() if p.grad is not None}
            return step()

        def next_meta_batch() -> list[Any]:
            self.episodes = draw()
            return self.episodes

        trainer.engine.optimizer_step = optimizer_step
        trainer.train_dataloader.next_meta_batch = next_meta_batch

    @property
    def parameters(self) -> dict[str, Any]:
        """The trained parameters by name."""
        return {n: p for n, p in self.trainer.engine.module.named_parameters() if p.requires_grad}

    def _timed(self, key: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            synchronize()
            started = time.perf_counter()
            result = function(*args, **kwargs)
            synchronize()
            self._seconds[key] = self._seconds.get(key, 0.0) + time.perf_counter() - started
            return result

        return timed

    def run(self) -> dict[str, float]:
        """One meta-step: its seconds and tokens, and the seconds of its parts."""
        self.steps += 1
        self._seconds = {}
        synchronize()
        started = time.perf_counter()
        metrics, _ = self.trainer.train_step(self.steps)
        synchronize()
        return {"seconds": time.perf_counter() - started, "tokens": metrics["perf/tokens"], **self._seconds}

    def check_step(self) -> dict[str, Any]:
        """One meta-step (it warms up, too); returns the meta-gradient that reached the optimizer."""
        self.keep_gradient = True
        self.run()
        self.keep_gradient = False
        gradient, self.gradient = self.gradient, {}
        return gradient


def synchronize() -> None:
    """Wait for the accelerator, where there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ---------------------------------------------------------------------------------------------------- gradient check


def compare_gradients(
    names: tuple[str, str],
    left: Mapping[str, Any],
    right: Mapping[str, Any],
    dtype: str,
    tolerances: Mapping[str, float | None] = GRADIENT_TOLERANCE,
) -> dict[str, Any]:
    """The relative difference ||left - right|| / ||right|| over all tensors, checked against the tolerance of
    ``dtype`` (on a GPU at least :data:`GPU_TOLERANCE`).

    Raises:
        ArmsDiffer: it is above the tolerance, not finite, or the arms train different tensors.
    """
    import torch

    if set(left) != set(right) or not left:
        different = sorted(set(left) ^ set(right))[:3]
        raise ArmsDiffer(f"{names[0]} and {names[1]} have gradients for different tensors, such as {different}")
    difference = sum(float((left[n].double() - right[n].double()).square().sum()) for n in left)
    norm = sum(float(right[n].double().square().sum()) for n in left)
    error = (difference / norm) ** 0.5 if norm > 0 else float("inf")
    tolerance = tolerances[dtype]
    if tolerance is not None and next(iter(left.values())).is_cuda:
        tolerance = max(tolerance, GPU_TOLERANCE)
    finite = bool(torch.isfinite(torch.tensor(error)))
    if not finite or (tolerance is not None and error > tolerance):
        limit = "must be finite" if tolerance is None else f"at most {tolerance:g} is allowed"
        raise ArmsDiffer(
            f"the meta-gradients of {names[0]} and {names[1]} differ by {error:.2e} (relative, {dtype}); {limit}"
        )
    return {"arms": list(names), "relative_difference": error, "tolerance": tolerance}


# ------------------------------------------------------------------------------------------------------------ timing


def interleave(
    arms: Mapping[str, Callable[[], dict[str, float]]],
    repeats: int,
    budget_seconds: float | None = None,
    *,
    least: int = 2,
) -> dict[str, list[dict[str, float]]]:
    """Run all arms in turn, ``repeats`` times, every other round backwards (A B, B A, ...).

    Args:
        arms: name -> one timed run.
        repeats: rounds.
        budget_seconds: start no further round after this long.
        least: rounds that are run in any case.

    Returns:
        name -> what its runs returned, one entry per round.
    """
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    started = time.perf_counter()
    for number in range(max(least, repeats)):
        if number >= least and budget_seconds is not None and time.perf_counter() - started > budget_seconds:
            break
        order = list(arms) if number % 2 == 0 else list(reversed(arms))
        for name in order:
            samples[name].append(arms[name]())
    return samples


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest of ``values``."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """above / below: the ratio of their medians, with the smallest and largest ratio of one round."""
    rounds = [a / b for a, b in zip(above, below, strict=True)]
    return {
        "median": statistics.median(above) / statistics.median(below),
        "low": min(rounds),
        "high": max(rounds),
        "n": len(rounds),
    }


def write_random_model(name: str, folder: Path) -> None:
    """Random weights in the shape that ``metasft.plan`` knows by this name; its tokenizer knows bytes."""
    from metasft.plan.flops import SHAPES
    from metasft.tiny_model import build_tiny_model

    shape = SHAPES[name]
    build_tiny_model(
        folder,
        architecture="qwen2" if name.startswith("qwen2") else "llama",
        tie_word_embeddings=shape["tie_word_embeddings"],
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_layers=shape["num_hidden_layers"],
        num_heads=shape["num_attention_heads"],
        num_kv_heads=shape["num_key_value_heads"],
        vocab_size=shape["vocab_size"],
        initializer_range=0.02,
    )


# --------------------------------------------------------------------------------------------------- synthetic tasks


@dataclass(frozen=True)
class Workload:
    """Support examples of one inner step: all of the same length, about 28% of it response."""

    examples: int
    length: int

    @property
    def response(self) -> int:
        return max(1, round(0.28 * self.length))

    @property
    def tokens(self) -> int:
        return self.examples * self.length


WORKLOADS = {
    w.tokens: w for w in (Workload(1, 16), Workload(2, 16), Workload(4, 16), Workload(4, 64), Workload(4, 256))
}
"""Tokens per task and inner step -> how they come about."""


def write_tasks(
    folder: Path, tokenizer: Any, workload: Workload, tasks: int, *, support: int, query: int, seed: int
) -> list[str]:
    """Write tasks whose examples all have exactly ``workload.length`` tokens under ``PLAIN_TEMPLATE``.

    Returns:
        The task names.
    """
    import pandas as pd

    pieces = _single_token_pieces(tokenizer)
    draw = random.Random(f"{seed}/{workload}")
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[tuple[str, str]] = set()

    def text(tokens: int) -> str:
        while True:
            candidate = "".join(draw.choice(pieces) for _ in range(tokens))
            if len(tokenizer.encode(candidate, add_special_tokens=False)) == tokens:
                return candidate

    def example(task: str, number: int) -> dict[str, Any]:
        while True:
            prompt, response = text(workload.length - workload.response), text(workload.response)
            whole = len(tokenizer.encode(prompt + response, add_special_tokens=False))
            if (prompt, response) not in seen and whole == workload.length:
                break
        seen.add((prompt, response))
        return {
            "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}],
            "prompt": prompt,
            "response": response,
            "answer": response,
            "task": task,
            "data_source": "synthetic",
            "example_id": f"{task}-{number}",
        }

    names = [f"task{index:02d}" for index in range(tasks)]
    for name in names:
        rows = [example(name, number) for number in range(support + query)]
        pd.DataFrame(rows[:support]).to_parquet(folder / f"{name}_support.parquet")
        pd.DataFrame(rows[support:]).to_parquet(folder / f"{name}_query.parquet")
    return names


_WORDS = "the of and to in is that it for was on are as with his they at be this from have or by one had not but what"


def _single_token_pieces(tokenizer: Any) -> list[str]:
    """Texts of one token each that stay one token each side by side, in any order, as far as the tokenizer has such."""
    for pieces in ([f" {word}" for word in _WORDS.split()], list("abcdefghijklmnopqrstuvwxyz")):
        usable = [piece for piece in pieces if len(tokenizer.encode(piece, add_special_tokens=False)) == 1]
        if len(usable) >= 8 and len(tokenizer.encode("".join(usable), add_special_tokens=False)) == len(usable):
            return usable
    raise ValueError("the model's tokenizer has no words of one token to build examples of an exact length from")
