"""The few-shot protocol: what is evaluated, on which shots and test items. Needs no model and no torch.

Chosen so that numbers can be compared across N and across methods:

* The test items of a task are the same for every N, run and model type, and no shot is among them.
* The shots of run r are the first N of a permutation of the shot pool seeded by (seed, task, r): shot sets are nested.
* Every adaptation takes the same number of update steps whatever N is; N = 0 is the model as it stands, and runs once.
* Losses and generations are taken while the adapted parameters are loaded; afterwards the parameters are put back.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from metasft.config.prompts import chosen_arguments, chosen_template
from metasft.config.training import INNER_OPTIMIZERS
from metasft.config.verl_groups import LARGEST_RANK, LARGEST_RATE, LARGEST_SEED
from metasft.data.task_sets import check_turns
from metasft.files.atomic import check_place
from metasft.files.untrusted import printable, read_columns

MODEL_TYPES = ("base", "fomaml", "meta_lora", "reptile", "lora")
DTYPES = ("float32", "bfloat16")
DEFAULT_LORA_RANK = 16
DEFAULT_LORA_ALPHA = 32.0
DEFAULT_OPTIMIZER = "adamw"
DEFAULT_LR_LORA = 1e-3
DEFAULT_LR_ALL = 1e-5
_SUPPORT, _TEST = "_support.parquet", "_test.parquet"
_COLUMNS = ("messages", "prompt", "answer", "data_source", "example_id")
_OPTIONAL_COLUMNS = ("extra_info",)  # the scorers of some data sources need it


@dataclass(frozen=True)
class EvaluationConfig:
    """What to evaluate, one attribute per flag of ``evaluate_few_shot.py``.

    Attributes:
        model_path: model or checkpoint, see :func:`find_model_source`.
        model_type: one of ``MODEL_TYPES``; names the result files.
        output_dir: folder for the result files.
        eval_tasks: tasks of ``data_dir/meta_test`` (unseen) or ``data_dir/meta_train`` (in-domain); empty means every
            unseen one.
        n_shots: shot counts N.
        base_model: model under an adapter; None means what the checkpoint records.
        data_dir: folder made by ``prepare_math_science_data.py``.
        n_runs: shot sets per task and N above 0.
        adaptation_steps: update steps of one adaptation.
        adaptation_lr: None means what the checkpoint records, else the default for what is adapted.
        adaptation_optimizer: likewise.
        adaptation_batch_size: examples per update step; N where there are fewer shots.
        batch_size: rows (a test item under one adaptation) generated together.
        max_new_tokens: longest generation in tokens.
        limit: test items per task, the first ones; None means all.
        seed: of shots, adaptation batches and fresh LoRA weights.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:<index>``.
        dtype: of the frozen weights. With all parameters adapted they stay in float32 and this is the autocast dtype.
        max_length: longest example in tokens; longer ones are an error.
        chat_template: a Jinja text, or a file with one; None means what the checkpoint records, else the model's own.
        chat_template_kwargs: arguments of the template as a JSON object; None means what the checkpoint records.
        lora_rank: rank of the fresh LoRA that ``base`` adapts; None means 16.
        lora_alpha: scale of the fresh LoRA; None means 32.
        cells_per_batch: adaptations done and tested together where the adapter allows; None means automatic.
        shots_in_prompt: the shots come as earlier turns of the conversation, and nothing is adapted.
        search_adaptation: choose optimizer and learning rate by their loss on held-out items of the training tasks.
        search_limit: held-out items per training task in that search.
        speed_steps: update steps after which the speed curve measures; empty means no speed curve.
        speed_shots: N of the speed curve.
        speed_only: leave the evaluation of ``n_shots`` out.
        overwrite: drop earlier results of this model type in ``output_dir`` instead of continuing them.
    """

    model_path: str
    model_type: str
    output_dir: Path
    eval_tasks: tuple[str, ...] = ()
    n_shots: tuple[int, ...] = (0, 5, 10, 25, 50)
    base_model: str | None = None
    data_dir: Path = Path("data/math_science_meta")
    n_runs: int = 3
    adaptation_steps: int = 10
    adaptation_lr: float | None = None
    adaptation_optimizer: str | None = None
    adaptation_batch_size: int = 4
    batch_size: int = 64
    max_new_tokens: int = 48
    limit: int | None = None
    seed: int = 1
    device: str = "auto"
    dtype: str = "float32"
    max_length: int = 1024
    chat_template: str | None = None
    chat_template_kwargs: str | None = None
    lora_rank: int | None = None
    lora_alpha: float | None = None
    cells_per_batch: int | None = None
    shots_in_prompt: bool = False
    search_adaptation: bool = False
    search_limit: int = 16
    speed_steps: tuple[int, ...] = ()
    speed_shots: int = 25
    speed_only: bool = False
    overwrite: bool = False

    def check(self) -> None:
        """Raise ValueError naming the first flag with an impossible value."""
        for flag, value, choices in (
            ("--model-type", self.model_type, MODEL_TYPES),
            ("--dtype", self.dtype, DTYPES),
            ("--adaptation-optimizer", self.adaptation_optimizer, (None, *INNER_OPTIMIZERS)),
        ):
            if value not in choices:
                known = ", ".join(choice for choice in choices if choice is not None)
                raise ValueError(f"{flag} is {value!r}: choose one of {known}")
        if not self.n_shots:
            raise ValueError("--n-shots is empty: give at least one shot count, such as 0 5")
        for flag, values in (
            ("--n-shots", self.n_shots),
            ("--eval-tasks", self.eval_tasks),
            ("--speed-steps", self.speed_steps),
        ):
            repeated = sorted({value for value in values if values.count(value) > 1})
            if repeated:
                raise ValueError(f"{flag} names {', '.join(map(str, repeated))} more than once: give every value once")
        for flag, value, least in (
            *(("--n-shots", shots, 0) for shots in self.n_shots),
            ("--n-runs", self.n_runs, 1),
            ("--adaptation-steps", self.adaptation_steps, 1),
            ("--adaptation-batch-size", self.adaptation_batch_size, 1),
            ("--batch-size", self.batch_size, 1),
            ("--max-new-tokens", self.max_new_tokens, 1),
            ("--limit", self.limit, 1),
            ("--seed", self.seed, 0),
            ("--max-length", self.max_length, 2),
            ("--lora-rank", self.lora_rank, 1),
            ("--cells-per-batch", self.cells_per_batch, 1),
            ("--search-limit", self.search_limit, 1),
            ("--speed-shots", self.speed_shots, 1),
            *(("--speed-steps", steps, 0) for steps in self.speed_steps),
        ):
            if value is not None and value < least:
                raise ValueError(f"{flag} is {value}: use at least {least}")
        for flag, value, most in (
            ("--n-runs", self.n_runs, 10_000),
            ("--adaptation-steps", self.adaptation_steps, 100_000),
            ("--max-new-tokens", self.max_new_tokens, 1_000_000),
            ("--seed", self.seed, LARGEST_SEED),
            ("--lora-rank", self.lora_rank, LARGEST_RANK),
            ("--adaptation-lr", self.adaptation_lr, LARGEST_RATE),
            *(("--speed-steps", steps, 100_000) for steps in self.speed_steps),
        ):
            if value is not None and most < value < float("inf"):
                raise ValueError(f"{flag} is {value}: use at most {most if isinstance(most, int) else f'{most:g}'}")
        for flag, value in (("--adaptation-lr", self.adaptation_lr), ("--lora-alpha", self.lora_alpha)):
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{flag} is {value}: use a number above 0")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"--device is {self.device!r}: choose auto, cpu, cuda or cuda:<index>")
        if self.model_type != "base":
            for flag, value in (("--lora-rank", self.lora_rank), ("--lora-alpha", self.lora_alpha)):
                if value is not None:
                    raise ValueError(
                        f"{flag} is {value}, but only --model-type base adapts a fresh LoRA: leave it out for "
                        f"{self.model_type}"
                    )
        if self.chat_template is not None:
            chosen_template(self.chat_template, "--chat-template")
        if self.chat_template_kwargs is not None:
            chosen_arguments(self.chat_template_kwargs, "--chat-template-kwargs")
        self._check_combinations()
        check_place(self.output_dir, "--output-dir")

    def _check_combinations(self) -> None:
        if self.shots_in_prompt:
            for flag, given in (
                ("--adaptation-lr", self.adaptation_lr is not None),
                ("--adaptation-optimizer", self.adaptation_optimizer is not None),
                ("--search-adaptation", self.search_adaptation),
                ("--speed-steps", bool(self.speed_steps)),
            ):
                if given:
                    raise ValueError(
                        f"{flag} and --shots-in-prompt exclude each other: nothing is adapted on shots there"
                    )
        if self.speed_only and not self.speed_steps:
            raise ValueError("--speed-only needs --speed-steps: give the update steps to measure after, such as 0 5 10")

    @property
    def largest_n(self) -> int:
        """The largest number of shots that any part of the evaluation takes."""
        grid = () if self.speed_only else self.n_shots
        return max((*grid, *((self.speed_shots,) if self.speed_steps else ())))


# ---- tasks and shots ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TestTask:
    """One task: its shot pool and its test items, as rows of the data files.

    Attributes:
        name: task name.
        domain: ``unseen`` (from meta_test) or ``in_domain`` (from meta_train: the pool is what meta-training adapted
            on, the test items are what it never saw).
        pool_path, test_path: the parquet files.
        pool: all rows of the shot pool.
        test: the test rows in use, at most ``limit``.
    """

    __test__ = False  # pytest would take it for a test class

    name: str
    domain: str
    pool_path: Path
    test_path: Path
    pool: list[dict[str, Any]]
    test: list[dict[str, Any]]


def read_test_tasks(config: EvaluationConfig) -> list[TestTask]:
    """Read and check the shot pool and the test items of every task in ``config``.

    Raises:
        ValueError: a task or file is missing or unusable, the pool is smaller than the largest N, or a test item occurs
            in the pool or has the example_id of another.
    """
    unseen, known = (config.data_dir / folder for folder in ("meta_test", "meta_train"))
    remedy = "make the data with `python prepare_math_science_data.py`, or give --data-dir"
    if not unseen.is_dir():
        raise ValueError(f"--data-dir is {config.data_dir}, which holds no meta_test folder: {remedy}")
    found = {name: ("unseen", unseen) for name in _tasks_in(unseen)}
    if not found:
        raise ValueError(f"{unseen} holds no <task>{_TEST}: {remedy}")
    default = list(found)
    for name in _tasks_in(known):
        found.setdefault(name, ("in_domain", known))
    missing = [task for task in config.eval_tasks if task not in found]
    if missing:
        trained = [name for name, (domain, _) in found.items() if domain == "in_domain"]
        also = f", and {known} has {', '.join(trained)}" if trained else ""
        names = ", ".join(map(printable, missing))
        raise ValueError(f"--eval-tasks names {names}, but {unseen} has {', '.join(default)}{also}: choose from those")
    return [
        _read_task(*found[task], task, config.largest_n, config.limit) for task in config.eval_tasks or tuple(default)
    ]


def read_training_tasks(config: EvaluationConfig, *, shots: int, limit: int) -> list[TestTask]:
    """The tasks of ``data_dir/meta_train`` with held-out items, but for those under evaluation.

    Raises:
        ValueError: there is none, or a file is unusable.
    """
    folder = config.data_dir / "meta_train"
    names = [name for name in _tasks_in(folder) if name not in config.eval_tasks]
    if not names:
        raise ValueError(
            f"--search-adaptation needs training tasks that are not under evaluation, and {folder} holds no other "
            f"<task>{_TEST}: give --adaptation-lr and --adaptation-optimizer instead"
        )
    return [_read_task("in_domain", folder, name, shots, limit) for name in names]


def _tasks_in(folder: Path) -> list[str]:
    return sorted(file.name.removesuffix(_TEST) for file in folder.glob(f"*{_TEST}"))


def _read_task(domain: str, folder: Path, name: str, shots: int, limit: int | None) -> TestTask:
    pool_path, test_path = folder / f"{name}{_SUPPORT}", folder / f"{name}{_TEST}"
    pool = _read_rows(pool_path)
    test = _read_rows(test_path)[:limit]
    if len(pool) < shots:
        raise ValueError(
            f"--n-shots asks for {shots} shots, but {pool_path} holds {len(pool)}: ask for at most {len(pool)}, or "
            "prepare a larger pool (--shot-pool)"
        )
    if not test:
        raise ValueError(f"{test_path} holds no test item: prepare the data again")
    example_id, times = Counter(row["example_id"] for row in test).most_common(1)[0]
    if times > 1:  # methods are compared item by item
        raise ValueError(
            f"{test_path} has {times} test items with the example_id {printable(example_id)}: give every item its "
            "own, or prepare the data again"
        )
    for column in ("example_id", "prompt"):
        shared = {row[column] for row in pool} & {row[column] for row in test}
        if shared:
            raise ValueError(
                f"{len(shared)} test items of {test_path} occur in {pool_path.name} too ({column} "
                f"{sorted(map(str, shared))[0]!r}): shots must not be test items, prepare the data again"
            )
    return TestTask(name, domain, pool_path, test_path, pool, test)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist: prepare the data again")
    rows = read_columns(path, _COLUMNS, _OPTIONAL_COLUMNS, remedy="make it with prepare_math_science_data.py")
    for number, row in enumerate(rows):
        check_turns(path, number, row["messages"])
        *before, last = row["messages"]
        if not before or last["role"] != "assistant" or not str(last["content"] or "").strip():
            raise ValueError(f"{path} row {number} does not end with an assistant response: complete or remove it")
        for column in ("prompt", "answer", "data_source", "example_id"):
            if not isinstance(row[column], str) or not row[column].strip():
                raise ValueError(
                    f"{path} row {number} has no {column} ({row[column]!r} is no text): complete or remove it"
                )
    return rows


def shot_indices(pool_size: int, n_shots: int, *, seed: int, task: str, run: int) -> list[int]:
    """The shots of one run as indices into the shot pool: the first N of a permutation that does not depend on N."""
    order = list(range(pool_size))
    # A string seeds random.Random through SHA-512: the same in every process and Python build.
    random.Random(f"{seed}/shots/{task}/{run}").shuffle(order)
    return order[:n_shots]


class Cell(NamedTuple):
    """One adaptation with its test: what is finished or not. ``step``: update steps, where a curve is measured."""

    task: str
    n_shots: int
    run: int
    step: int | None = None


def plan_cells(tasks: Sequence[str], n_shots: Sequence[int], n_runs: int) -> list[Cell]:
    """Every (task, N, run); N = 0 adapts nothing, so it runs once."""
    return [Cell(task, n, run) for task in tasks for n in sorted(n_shots) for run in range(n_runs if n else 1)]


def in_context(
    shots: Sequence[Sequence[Mapping[str, str]]], messages: Sequence[Mapping[str, str]]
) -> list[dict[str, str]]:
    """A test conversation with those of the shots before it, under the test conversation's system prompt."""
    system = [dict(message) for message in messages if message["role"] == "system"]
    turns = [message for shot in (*shots, messages) for message in shot if message["role"] != "system"]
    return system + [dict(message) for message in turns]
