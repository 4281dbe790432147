"""The few-shot protocol: what is evaluated, on which shots and test items. Needs no model and no torch.

Chosen so that numbers can be compared across N and across methods:

* The test items of a task are the same for every N, run and model type, and no shot is among them.
* The shots of run r are the first N of a permutation of the shot pool seeded by (seed, task, r): shot sets are nested.
* Every adaptation takes the same number of update steps whatever N is, unless they are searched for every N; N = 0 is
  the model as it stands, and runs once.
* Losses and generations are taken while the adapted parameters are loaded; afterwards the parameters are put back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from metasft.adapt.settings import AdaptationSettings, Candidate, Steps, told
from metasft.config.schema import Count, Unique
from metasft.data.task_sets import SUPPORT_SUFFIX, check_turns
from metasft.data.unseen_tasks import FOLDERS, TEST_SUFFIX, describe_tasks, tasks_in, tasks_of
from metasft.files.atomic import check_place
from metasft.files.untrusted import DataFile, printable

ModelType = Literal["base", "fomaml", "meta_lora", "reptile", "lora"]
_STARTS: dict[str, tuple[str, ...]] = {
    "base": ("model",),
    "fomaml": ("model",),
    "meta_lora": ("lora_file", "lora_folder"),
    "reptile": ("model", "lora_file", "lora_folder"),
    "lora": ("lora_folder", "lora_file", "verl_folder"),
}
SEARCH_GRID = ("sgd:0.005", "sgd:0.05", "sgd:0.5", "adamw:1e-5", "adamw:1e-4", "adamw:1e-3", "adamw:3e-3")
"""Of rates for all parameters and for LoRA alike: neither kind is given a grid of its own."""
_COLUMNS = ("messages", "prompt", "answer", "data_source", "example_id")
_OPTIONAL_COLUMNS = ("extra_info",)  # the scorers of some data sources need it


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(AdaptationSettings):
    """What to evaluate, one attribute per flag of ``evaluate_few_shot.py``, whose help is the text beside it."""

    model_type: Annotated[ModelType, told("what it is; names the result files")]
    output_dir: Annotated[Path, told("folder for the result files")]
    split: Annotated[
        Literal["test", "valid", "search"],
        told("tasks of DATA_DIR/meta_test, or those of DATA_DIR/meta_valid with this role"),
    ] = "test"
    eval_tasks: Annotated[
        tuple[str, ...], Unique, told("tasks of the split, by default all; those of meta_train are tested in-domain")
    ] = ()
    n_shots: Annotated[tuple[Count, ...], Unique, told("shot counts, such as 0 5", min_length=1)] = (0, 5, 10, 25, 50)
    data_dir: Annotated[Path, told("folder made by prepare_math_science_data.py")] = Path("data/math_science_meta")
    n_runs: Annotated[int, told("shot sets per task and N above 0", ge=1, le=10_000)] = 3
    limit: Annotated[int | None, told("test items per task, the first ones, by default all", ge=1)] = None
    cells_per_batch: Annotated[
        int | None, told("LoRA adaptations done and tested together, same results; by default automatic", ge=1)
    ] = None
    shots_in_prompt: Annotated[bool, told("in-context: the shots are earlier turns, nothing is adapted")] = False
    search_adaptation: Annotated[
        bool,
        told(
            "choose optimizer and rate for every shot count on the tasks of --split search, or where there are none on "
            "held-out items of the training tasks"
        ),
    ] = False
    search_limit: Annotated[int, told("test items per task of that search", ge=1)] = 16
    search_grid: Annotated[tuple[Candidate, ...], Unique, told("what it chooses from", min_length=1)] = SEARCH_GRID
    search_steps: Annotated[
        tuple[Steps, ...],
        Unique,
        told("update steps to choose from as well, by default --adaptation-steps alone"),
    ] = ()
    adaptation_settings: Annotated[
        str | None, told("the <model-type>_search.json of another evaluation: adapt as it chose for every shot count")
    ] = None
    speed_steps: Annotated[
        tuple[Annotated[int, Field(ge=0, le=100_000)], ...],
        Unique,
        told("also measure after these update steps, such as 0 1 2 5 10 20 (<model-type>_speed.json)"),
    ] = ()
    speed_shots: Annotated[int, told("shots of the speed curve", ge=1)] = 25
    speed_only: Annotated[bool, told("measure the speed curve alone")] = False
    overwrite: Annotated[bool, told("drop earlier results of this model type instead of continuing them")] = False

    @property
    def starts(self) -> tuple[str, ...]:
        """As of :class:`AdaptationSettings`: those of the model type."""
        return _STARTS[self.model_type]

    @property
    def taken_by(self) -> str:
        """As of :class:`AdaptationSettings`."""
        return f"--model-type {self.model_type}"

    @property
    def fresh_lora(self) -> bool:
        """As of :class:`AdaptationSettings`: under ``base`` alone."""
        return self.model_type == "base" and not self.full

    @property
    def searches(self) -> bool:
        """As of :class:`AdaptationSettings`."""
        return self.search_adaptation

    def check(self) -> None:
        """Raise ValueError naming the first flag with an impossible value."""
        super().check()
        if self.model_type != "base":
            for flag, value in (("--lora-rank", self.lora_rank), ("--lora-alpha", self.lora_alpha)):
                if value is not None:
                    raise ValueError(
                        f"{flag} is {value}, but only --model-type base adapts a fresh LoRA: leave it out for "
                        f"{self.model_type}"
                    )
        if self.full and (self.model_type != "base" or self.shots_in_prompt or self.lora_rank or self.lora_alpha):
            raise ValueError(
                "--full adapts all parameters of --model-type base in place of a fresh LoRA: leave it out, or leave "
                "--shots-in-prompt, --lora-rank and --lora-alpha out"
            )
        self._only_with("search_adaptation", {"search_grid": SEARCH_GRID, "search_steps": ()})
        if self.shots_in_prompt:
            flags = ("adaptation_lr", "adaptation_optimizer", "search_adaptation", "adaptation_settings", "speed_steps")
            flags += ("adaptation_scope", "adaptation_top_layers")
            self._exclude("shots_in_prompt", flags, "nothing is adapted on shots there")
        if self.adaptation_settings is not None:
            flags = ("adaptation_lr", "adaptation_optimizer", "search_adaptation")
            self._exclude("adaptation_settings", flags, "the file says what to adapt with")
        if self.split == "search":
            self._exclude("split search", ("search_adaptation",), "it would choose on the tasks it reports on")
        if self.speed_only and not self.speed_steps:
            raise ValueError("--speed-only needs --speed-steps: give the update steps to measure after, such as 0 5 10")
        check_place(self.output_dir, "--output-dir")

    @property
    def adapted_shots(self) -> tuple[int, ...]:
        """The shot counts above 0 of every part of the evaluation, in ascending order."""
        grid = () if self.speed_only else self.n_shots
        return tuple(sorted({*grid, *((self.speed_shots,) if self.speed_steps else ())} - {0}))

    @property
    def largest_n(self) -> int:
        """The largest number of shots that any part of the evaluation takes."""
        return max(self.adapted_shots, default=0)


# ---- tasks and shots ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TestTask:
    """One task: its shot pool and its test items, as rows of the data files.

    Attributes:
        name: task name.
        domain: ``unseen`` (from the split) or ``in_domain`` (from meta_train: the pool is what meta-training adapted
            on, the test items are what it never saw).
        pool_path, test_path: the parquet files.
        pool: all rows of the shot pool.
        test: the test rows in use, at most ``limit``.
        trivial: solver that understands nothing -> its accuracy on all test rows, where the manifest says so.
        group: of related tasks, from the manifest; else the task itself.
    """

    __test__ = False  # pytest would take it for a test class

    name: str
    domain: str
    pool_path: Path
    test_path: Path
    pool: list[dict[str, Any]]
    test: list[dict[str, Any]]
    trivial: Mapping[str, float] | None = None
    group: str = ""


def read_test_tasks(config: EvaluationConfig) -> list[TestTask]:
    """Read and check the shot pool and the test items of every task in ``config``.

    Raises:
        ValueError: a task or file is missing or unusable, the pool is smaller than the largest N, or a test item occurs
            in the pool or has the example_id of another.
    """
    unseen, known = (config.data_dir / folder for folder in (FOLDERS[config.split], "meta_train"))
    remedy = "make the data with `python prepare_math_science_data.py`, or give --data-dir"
    if not unseen.is_dir():
        raise ValueError(
            f"--data-dir is {config.data_dir}, which holds no {unseen.name} folder, the tasks of --split "
            f"{config.split}: {remedy}"
        )
    about = describe_tasks(config.data_dir)
    default = tasks_of(config.data_dir, config.split, about)
    if not default:
        raise ValueError(f"{unseen} holds no <task>{TEST_SUFFIX} of --split {config.split}: {remedy}")
    found = {name: ("unseen", unseen) for name in default}
    for name in tasks_in(known):
        found.setdefault(name, ("in_domain", known))
    missing = [task for task in config.eval_tasks if task not in found]
    if missing:
        trained = [name for name, (domain, _) in found.items() if domain == "in_domain"]
        also = f", and {known} has {', '.join(trained)}" if trained else ""
        names = ", ".join(map(printable, missing))
        raise ValueError(
            f"--eval-tasks names {names}, but --split {config.split} in {unseen} has {', '.join(default)}{also}: "
            "choose from those"
        )
    return [
        _read_task(*found[task], task, config.largest_n, config.limit, about.get(task, {}))
        for task in config.eval_tasks or tuple(default)
    ]


def read_search_tasks(config: EvaluationConfig) -> list[TestTask]:
    """What ``--search-adaptation`` chooses on, ``search_limit`` test items each.

    The tasks of ``--split search``, which no method trains on, where the data have them; else the training tasks with
    held-out items, but for those under evaluation.

    Raises:
        ValueError: there are neither, or a file is unusable.
    """
    domain, folder = "unseen", config.data_dir / FOLDERS["search"]
    names = tasks_of(config.data_dir, "search", describe_tasks(config.data_dir))
    if not names:
        domain, folder = "in_domain", config.data_dir / "meta_train"
        names = [name for name in tasks_in(folder) if name not in config.eval_tasks]
    if not names:
        raise ValueError(
            f"--search-adaptation needs search tasks in meta_valid, or training tasks that are not under evaluation, "
            f"and {folder} holds no other <task>{TEST_SUFFIX}: give --adaptation-lr and --adaptation-optimizer instead"
        )
    return [_read_task(domain, folder, name, config.largest_n, config.search_limit, {}) for name in names]


def _read_task(
    domain: str,
    folder: Path,
    name: str,
    shots: int,
    limit: int | None,
    about: Mapping[str, Any],
) -> TestTask:
    pool_path, test_path = folder / f"{name}{SUPPORT_SUFFIX}", folder / f"{name}{TEST_SUFFIX}"
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
    group = about.get("group") or name
    return TestTask(name, domain, pool_path, test_path, pool, test, about.get("trivial"), group)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist: prepare the data again")
    rows = DataFile(path).rows(_COLUMNS, _OPTIONAL_COLUMNS, remedy="make it with prepare_math_science_data.py")
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


class Cell(NamedTuple):
    """One adaptation with its test: what is finished or not. ``step``: update steps, where a curve is measured."""

    task: str
    n_shots: int
    run: int
    step: int | None = None


def plan_cells(tasks: Sequence[str], n_shots: Sequence[int], n_runs: int) -> list[Cell]:
    """Every (task, N, run); N = 0 adapts nothing, so it runs once."""
    return [Cell(task, n, run) for task in tasks for n in sorted(n_shots) for run in range(n_runs if n else 1)]
