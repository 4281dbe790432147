"""Few-shot evaluation: adapt a model on N shots of an unseen task, then test the adapted model.

The protocol, chosen so that numbers can be compared across N and across methods:

* The test items of a task are the same for every N, run and model type, and no shot is among them.
* The shots of run r are the first N of a permutation of the shot pool seeded by (seed, task, r): shot sets are nested.
* Every adaptation takes the same number of update steps whatever N is; N = 0 is the model as it stands, and runs once.
* Losses and generations are taken while the adapted parameters are loaded; afterwards the parameters are put back.

This module plans, checks and counts, without torch; :mod:`metasft.few_shot_model` holds everything that needs a model.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from metasft.checkpoint import ADAPTATION_FILE, write_json
from metasft.config import INNER_OPTIMIZERS

MODEL_TYPES = ("base", "fomaml", "meta_lora", "reptile", "lora")
DTYPES = ("float32", "bfloat16")
DEFAULT_LORA_RANK = 16
DEFAULT_LORA_ALPHA = 32.0
DEFAULT_OPTIMIZER = "adamw"
DEFAULT_LR_LORA = 1e-3
DEFAULT_LR_ALL = 1e-5
LEVEL = 0.95
EMBEDDED_MODEL = "models/SmolLM2-135M-Instruct"
_ARCHITECTURE_KEYS = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")

_SUPPORT, _TEST = "_support.parquet", "_test.parquet"
_COLUMNS = ("messages", "prompt", "answer", "data_source", "example_id")
_OPTIONAL_COLUMNS = ("extra_info",)  # the scorers of some data sources need it
_KIND_NAMES = {
    "model": "a Hugging Face model folder",
    "lora_file": "a meta_lora_checkpoint_step_<N>.pt file",
    "lora_folder": "a PEFT adapter folder",
    "verl_folder": "a veRL checkpoint folder (global_step_<N>)",
}
_KINDS: dict[str, tuple[str, ...]] = {
    "base": ("model",),
    "fomaml": ("model",),
    "meta_lora": ("lora_file", "lora_folder"),
    "reptile": ("model", "lora_file", "lora_folder"),
    "lora": ("lora_folder", "lora_file", "verl_folder"),
}
# What may differ between the run that wrote the finished cells and the run that continues it.
_NOT_COMPARED = ("versions", "trained_parameters")


@dataclass(frozen=True)
class EvaluationConfig:
    """What to evaluate, one attribute per flag of ``evaluate_few_shot.py``.

    Attributes:
        model_path: model or checkpoint, see :func:`find_model_source`.
        model_type: one of ``MODEL_TYPES``; names the result files.
        output_dir: folder for the result files.
        eval_tasks: unseen tasks; empty means every task in ``data_dir/meta_test``.
        n_shots: shot counts N.
        base_model: model under an adapter; None means what the checkpoint records.
        data_dir: folder made by ``prepare_math_science_data.py``.
        n_runs: shot sets per task and N above 0.
        adaptation_steps: update steps of one adaptation.
        adaptation_lr: None means what the checkpoint records, else the default for what is adapted.
        adaptation_optimizer: likewise.
        adaptation_batch_size: examples per update step; N where there are fewer shots.
        batch_size: test items per batch, for losses and generation.
        max_new_tokens: longest generation in tokens.
        limit: test items per task, the first ones; None means all.
        seed: of shots, adaptation batches and fresh LoRA weights.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:<index>``.
        dtype: of the frozen weights. With all parameters adapted they stay in float32 and this is the autocast dtype.
        max_length: longest example in tokens; longer ones are an error.
        lora_rank: rank of the fresh LoRA that ``base`` adapts; None means 16.
        lora_alpha: scale of the fresh LoRA; None means 32.
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
    batch_size: int = 16
    max_new_tokens: int = 48
    limit: int | None = None
    seed: int = 1
    device: str = "auto"
    dtype: str = "float32"
    max_length: int = 1024
    lora_rank: int | None = None
    lora_alpha: float | None = None
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
        for flag, values in (("--n-shots", self.n_shots), ("--eval-tasks", self.eval_tasks)):
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
        ):
            if value is not None and value < least:
                raise ValueError(f"{flag} is {value}: use at least {least}")
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
        if self.output_dir.exists() and not self.output_dir.is_dir():
            raise ValueError(f"--output-dir is {self.output_dir}, which is a file: give a folder")


# ---------------------------------------------------------------------------------------------------- tasks and shots


@dataclass(frozen=True)
class TestTask:
    """One unseen task: its shot pool and its test items, as rows of the data files.

    Attributes:
        name: task name.
        pool_path, test_path: the parquet files.
        pool: all rows of the shot pool.
        test: the test rows in use, at most ``limit``.
    """

    __test__ = False  # pytest would take it for a test class

    name: str
    pool_path: Path
    test_path: Path
    pool: list[dict[str, Any]]
    test: list[dict[str, Any]]


def read_test_tasks(config: EvaluationConfig) -> list[TestTask]:
    """Read and check the shot pool and the test items of every task in ``config``.

    Raises:
        ValueError: a task or file is missing or unusable, the pool is smaller than the largest N, or a test item occurs
            in the pool.
    """
    folder = config.data_dir / "meta_test"
    remedy = "make the data with `python prepare_math_science_data.py`, or give --data-dir"
    if not folder.is_dir():
        raise ValueError(f"--data-dir is {config.data_dir}, which holds no meta_test folder: {remedy}")
    found = sorted(file.name.removesuffix(_TEST) for file in folder.glob(f"*{_TEST}"))
    if not found:
        raise ValueError(f"{folder} holds no <task>{_TEST}: {remedy}")
    unknown = [task for task in config.eval_tasks if task not in found]
    if unknown:
        raise ValueError(
            f"--eval-tasks names {', '.join(unknown)}, but {folder} has {', '.join(found)}: choose from those"
        )
    return [_read_task(folder, task, config) for task in config.eval_tasks or found]


def _read_task(folder: Path, name: str, config: EvaluationConfig) -> TestTask:
    pool_path, test_path = folder / f"{name}{_SUPPORT}", folder / f"{name}{_TEST}"
    pool = _read_rows(pool_path)
    test = _read_rows(test_path)[: config.limit]
    if len(pool) < max(config.n_shots):
        raise ValueError(
            f"--n-shots asks for {max(config.n_shots)} shots, but {pool_path} holds {len(pool)}: ask for at most "
            f"{len(pool)}, or prepare a larger pool (--shot-pool)"
        )
    if not test:
        raise ValueError(f"{test_path} holds no test item: prepare the data again")
    for column in ("example_id", "prompt"):
        shared = {row[column] for row in pool} & {row[column] for row in test}
        if shared:
            raise ValueError(
                f"{len(shared)} test items of {test_path} occur in {pool_path.name} too ({column} "
                f"{sorted(map(str, shared))[0]!r}): shots must not be test items, prepare the data again"
            )
    return TestTask(name, pool_path, test_path, pool, test)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise ValueError(f"{path} does not exist: prepare the data again")
    try:
        columns = pq.read_schema(path).names
        missing = [column for column in _COLUMNS if column not in columns]
        if missing:
            raise ValueError(f"{path} has no column {missing[0]!r}: make it with prepare_math_science_data.py")
        wanted = [*_COLUMNS, *(column for column in _OPTIONAL_COLUMNS if column in columns)]
        rows = pq.read_table(path, columns=wanted).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file ({error}): prepare the data again") from error
    for number, row in enumerate(rows):
        messages = row["messages"] or []
        roles = [message.get("role") for message in messages]
        if len(roles) < 2 or roles[-1] != "assistant" or not (messages[-1].get("content") or "").strip():
            raise ValueError(f"{path} row {number} does not end with an assistant response: complete or remove it")
    return rows


def shot_indices(pool_size: int, n_shots: int, *, seed: int, task: str, run: int) -> list[int]:
    """The shots of one run as indices into the shot pool: the first N of a permutation that does not depend on N."""
    order = list(range(pool_size))
    # A string seeds random.Random through SHA-512: the same in every process and Python build.
    random.Random(f"{seed}/shots/{task}/{run}").shuffle(order)
    return order[:n_shots]


class Cell(NamedTuple):
    """One adaptation with its test: what is finished or not."""

    task: str
    n_shots: int
    run: int


def plan_cells(tasks: Sequence[str], n_shots: Sequence[int], n_runs: int) -> list[Cell]:
    """Every (task, N, run); N = 0 adapts nothing, so it runs once."""
    return [Cell(task, n, run) for task in tasks for n in sorted(n_shots) for run in range(n_runs if n else 1)]


# ---------------------------------------------------------------------------------------------------- models on disk


@dataclass(frozen=True)
class ModelSource:
    """What ``--model-path`` turned out to be.

    Attributes:
        kind: ``model``, ``lora_file``, ``lora_folder`` or ``verl_folder``.
        path: the file or folder to load, or the hub name.
        sha256: hash over its weights; None for a model of the hub.
        base_model: model to load under an adapter; None where only the weights file (``lora_file``) can tell.
    """

    kind: str
    path: str
    sha256: str | None
    base_model: str | None = None


def find_model_source(config: EvaluationConfig) -> ModelSource:
    """Look at ``config.model_path`` without loading it, and check that it fits the model type.

    ``base`` and ``fomaml`` take a Hugging Face model folder (or hub name); ``meta_lora`` the exported ``.pt`` file or
    the PEFT folder beside it; ``reptile`` either kind; ``lora`` an adapter, or veRL's ``global_step_<N>`` folder, or
    the run folder above it (its latest step).

    Raises:
        ValueError: nothing is there, or something of another kind.
    """
    path = Path(config.model_path).expanduser()
    expected = " or ".join(_KIND_NAMES[kind] for kind in _KINDS[config.model_type])
    if not path.exists():
        if "model" in _KINDS[config.model_type] and _looks_like_hub_name(config.model_path):
            return ModelSource("model", config.model_path, None, _base_model("model", path, config))
        raise ValueError(
            f"--model-path is {path}, which does not exist: --model-type {config.model_type} takes {expected}"
        )
    kind, place = _recognise(path)
    if kind not in _KINDS[config.model_type]:
        found = _KIND_NAMES.get(kind, kind)
        raise ValueError(
            f"--model-path {path} is {found}, but --model-type {config.model_type} takes {expected}{_suggestion(path)}"
        )
    base_model = _base_model(kind, place, config)
    return ModelSource(kind, str(place), _hash_weights(place), base_model)


def _base_model(kind: str, place: Path, config: EvaluationConfig) -> str | None:
    """The model under an adapter, as far as it can be told without reading the weights."""
    if config.base_model is not None:
        if kind == "model":
            raise ValueError(
                f"--base-model is {config.base_model}, but --model-path {config.model_path} is no adapter: leave it out"
            )
        check_model_folder(config.base_model, "--base-model is")
        return config.base_model
    if kind == "lora_folder":
        recorded = _read_json(place / "adapter_config.json").get("base_model_name_or_path")
        if not recorded:
            raise ValueError(f"--model-path {place} does not record its base model: give --base-model")
        check_model_folder(recorded, f"--model-path {place} was trained on")
        return recorded
    if kind == "verl_folder":
        return _base_of_verl_folder(place)
    return None


def _base_of_verl_folder(place: Path) -> str:
    """veRL saves the configuration of the model it trained but not its path: the embedded model is tried."""
    trained, known = place / "huggingface" / "config.json", Path(EMBEDDED_MODEL) / "config.json"
    if trained.is_file() and known.is_file():
        ours, theirs = _read_json(known), _read_json(trained)
        if all(ours.get(key) == theirs.get(key) for key in _ARCHITECTURE_KEYS):
            return EMBEDDED_MODEL
    raise ValueError(
        f"--model-path {place} does not record its base model: give --base-model, the model.path it was trained with"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not readable JSON ({error}): export the model again") from error


def check_model_folder(name: str, introduction: str) -> None:
    """Raise ValueError, opening with ``introduction``, unless ``name`` is a model folder or may be a hub name."""
    path = Path(name).expanduser()
    if not path.exists() and not _looks_like_hub_name(name):
        raise ValueError(f"{introduction} {name}, which does not exist: give --base-model, a Hugging Face model folder")
    if path.exists() and _recognise(path)[0] != "model":
        kind = _recognise(path)[0]
        raise ValueError(f"{introduction} {name}, which is {_KIND_NAMES.get(kind, kind)}, not {_KIND_NAMES['model']}")


def _looks_like_hub_name(name: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not name.startswith(
        (".", "models/", "checkpoints/", "results/", "data/")
    )


def _recognise(path: Path) -> tuple[str, Path]:
    """(kind, the place to load from). Unknown things have a description as their kind."""
    if path.is_file():
        return ("lora_file" if path.suffix == ".pt" else "a file that is no .pt", path)
    if (path / "adapter_config.json").is_file():
        return "lora_folder", path
    if (path / "config.json").is_file():
        if any(path.glob("*.safetensors")) or any(path.glob("pytorch_model*.bin")):
            return "model", path
        return "a folder with a config.json but without weights", path
    if any(path.glob("model_world_size_*_rank_*.pt")):
        return "verl_folder", path
    tracker = path / "latest_checkpointed_iteration.txt"
    if tracker.is_file():
        latest = path / f"global_step_{tracker.read_text(encoding='utf-8').strip()}"
        if any(latest.glob("model_world_size_*_rank_*.pt")):
            return "verl_folder", latest
        return f"a training folder without {latest.name}", path
    return "a folder without a model", path


def _suggestion(path: Path) -> str:
    """`: try X` where an export lies inside the folder that was given."""
    if not path.is_dir():
        return ""
    exports = [e for pattern in ("meta_lora_checkpoint_step_*.pt", "step_*") for e in path.glob(pattern)]
    if not exports:
        return ""
    newest = max(exports, key=lambda entry: int("0" + re.sub(r"\D", "", entry.name)))
    return f": try {newest}"


def _hash_weights(place: Path) -> str:
    """SHA-256 over the weights (and their configuration): continuing with another model must not go unnoticed."""
    if place.is_file():
        files = [place]
    else:
        patterns = (
            "*.safetensors",
            "pytorch_model*.bin",
            "model_world_size_*.pt",
            "config.json",
            "adapter_config.json",
        )
        files = sorted(file for pattern in patterns for file in place.glob(pattern))
    total = hashlib.sha256()
    for file in files:
        total.update(_hash_file(file).encode())
    return total.hexdigest()


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Adaptation(NamedTuple):
    """How parameters are adapted: ``optimizer`` at learning rate ``lr``, and where the two come from."""

    optimizer: str
    lr: float
    origin: str


def resolve_adaptation(config: EvaluationConfig, recorded: Mapping[str, Any], *, lora: bool) -> Adaptation:
    """Flags over what the checkpoint records (``inner_optimizer``, ``inner_lr``) over the defaults.

    Raises:
        ValueError: another optimizer than the recorded or default one, without its learning rate.
    """
    if recorded.get("inner_lr") is not None and recorded.get("inner_optimizer") is not None:
        optimizer, lr, origin = recorded["inner_optimizer"], float(recorded["inner_lr"]), "checkpoint"
    else:
        optimizer, lr, origin = DEFAULT_OPTIMIZER, DEFAULT_LR_LORA if lora else DEFAULT_LR_ALL, "default"
    wanted = config.adaptation_optimizer or optimizer
    if config.adaptation_lr is not None:
        return Adaptation(wanted, config.adaptation_lr, "flags")
    if wanted != optimizer:
        raise ValueError(
            f"--adaptation-optimizer is {wanted}, but the learning rate {lr:g} ({origin}) belongs to {optimizer}: give "
            "--adaptation-lr too"
        )
    return Adaptation(optimizer, lr, origin)


def recorded_adaptation(source: ModelSource) -> dict[str, Any]:
    """The inner-loop settings that a trainer left in a full-parameter export; empty when there are none."""
    file = Path(source.path) / ADAPTATION_FILE
    return _read_json(file) if file.is_file() else {}


# ---------------------------------------------------------------------------------------------------- statistics


def accuracy_interval(correct: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """95% interval of an accuracy measured with several shot sets (runs) on the same test items.

    Wilson's score interval with an effective sample size. Runs and items are crossed: the variance of the mean is
    estimated as s_items^2 / n + s_runs^2 / R, from the means per item and the means per run (Owen, "The pigeonhole
    bootstrap", 2007: slightly conservative, since noise within a cell counts in both terms), and n_eff = p(1-p) /
    variance. The quantile is Student's t with the Welch-Satterthwaite degrees of freedom, so that three runs that
    disagree give an honestly wide interval. With one run, and where all or no answers are correct, it is Wilson's
    interval over the n items; unlike the bootstrap it does not collapse there. With one run it covers the choice of
    test items only, not the choice of shots.

    Args:
        correct: [R runs][n items].

    Returns:
        (low, high), fractions in [0, 1] around the mean.
    """
    import numpy as np
    from scipy.special import stdtrit

    values = np.asarray(correct, dtype=float)
    runs, items = values.shape
    p = float(values.mean())
    effective, freedom = float(items), np.inf
    if runs > 1 and items > 1 and 0 < p < 1:
        by_item = values.mean(axis=0).var(ddof=1) / items
        by_run = values.mean(axis=1).var(ddof=1) / runs
        variance = by_item + by_run
        if variance > 0:
            # Never more information than independent answers, never less than one.
            effective = float(min(max(p * (1 - p) / variance, 1.0), items * runs))
            freedom = variance**2 / (by_item**2 / (items - 1) + by_run**2 / (runs - 1))
    t = float(stdtrit(freedom, 0.5 + LEVEL / 2))
    shrink = 1 + t * t / effective
    centre = (p + t * t / (2 * effective)) / shrink
    half = t / shrink * float(np.sqrt(p * (1 - p) / effective + t * t / (4 * effective**2)))
    # Rounding must not push the mean out of its interval.
    return max(0.0, min(centre - half, p)), min(1.0, max(centre + half, p))


def summarise_cells(
    cells: Sequence[Mapping[str, Any]], predictions: Sequence[Sequence[Mapping[str, Any]]], baseline: float
) -> dict[str, Any]:
    """One entry of the results: all runs of one task and N.

    Args:
        cells: one record per run.
        predictions: the predictions of each run, in the order of the test items.
        baseline: accuracy of always giving the most frequent answer.
    """
    import numpy as np

    correct = np.array([[p["correct"] for p in run] for run in predictions], dtype=float)
    per_run = correct.mean(axis=1)
    return {
        "accuracy_mean": float(correct.mean()),
        "accuracy_std": float(per_run.std(ddof=1)) if len(per_run) > 1 else 0.0,
        "ci95": list(accuracy_interval(correct)),
        "n_runs": len(cells),
        "n_test": correct.shape[1],
        "loss_mean": float(np.mean([cell["loss"] for cell in cells])),
        "format_accuracy": float(np.mean([[p["formatted"] for p in run] for run in predictions])),
        "majority_baseline": baseline,
        "adapt_steps": cells[0]["adapt_steps"],
        "adapt_seconds": float(np.mean([cell["adapt_seconds"] for cell in cells])),
    }


# ---------------------------------------------------------------------------------------------------- result files


class ResultStore:
    """The result files of one model type in one folder; knows which cells are finished.

    ``<type>_predictions.jsonl`` and ``<type>_cells.jsonl`` grow by one cell at a time, the line in the cells file last:
    a cell counts as finished when that line is there, so an interruption costs the cell it hits and nothing else.
    """

    def __init__(self, folder: Path, model_type: str) -> None:
        self.folder = folder
        self.results_path = folder / f"{model_type}_results.json"
        self.settings_path = folder / f"{model_type}_settings.json"
        self.predictions_path = folder / f"{model_type}_predictions.jsonl"
        self.cells_path = folder / f"{model_type}_cells.jsonl"
        self.cells: dict[Cell, dict[str, Any]] = {}
        self.predictions: dict[Cell, list[dict[str, Any]]] = {}

    def open(self, settings: Mapping[str, Any], *, overwrite: bool) -> None:
        """Continue what earlier runs with the same settings left, or start afresh.

        Raises:
            ValueError: the folder holds results made with other settings, or cannot be written.
        """
        files = (self.results_path, self.settings_path, self.predictions_path, self.cells_path)
        remedy = "give another --output-dir, or --overwrite to start again"
        kept = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if overwrite:
                for file in files:
                    file.unlink(missing_ok=True)
            elif any(file.exists() for file in files):
                kept = self._check_settings(settings, remedy)
                self._read_finished()
            write_json(self.settings_path, {**settings, **kept})
        except OSError as error:
            raise ValueError(f"--output-dir is {self.folder}, which cannot be used ({error}): {remedy}") from error

    def _check_settings(self, settings: Mapping[str, Any], remedy: str) -> dict[str, Any]:
        """What the settings file knows beyond ``settings``: figures that only a loaded model gives."""
        if not self.settings_path.is_file():
            raise ValueError(f"{self.folder} holds results without {self.settings_path.name}: {remedy}")
        try:
            earlier = json.loads(self.settings_path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.settings_path} is not readable ({error}): {remedy}") from error
        current = json.loads(json.dumps(settings))
        keys = [k for k in {**earlier, **current} if k not in _NOT_COMPARED and earlier.get(k) != current.get(k)]
        if keys:
            key = keys[0]
            raise ValueError(
                f"{self.folder} holds results made with other settings ({key}: {earlier.get(key)!r} there, "
                f"{current.get(key)!r} now): {remedy}"
            )
        return {key: value for key, value in earlier.items() if key not in current}

    def _read_finished(self) -> None:
        predictions: dict[Cell, list[dict[str, Any]]] = {}
        for line in _read_lines(self.predictions_path):
            predictions.setdefault(_cell_of(line), []).append(line)
        for record in _read_lines(self.cells_path):
            cell = _cell_of(record)
            if len(predictions.get(cell, ())) == record["n_test"]:
                self.cells[cell], self.predictions[cell] = record, predictions[cell]
        # What an interrupted cell left behind would be there twice after it ran again.
        _write_lines(self.predictions_path, [line for cell in self.cells for line in self.predictions[cell]])
        _write_lines(self.cells_path, list(self.cells.values()))

    def add(self, record: dict[str, Any], predictions: list[dict[str, Any]]) -> None:
        """Append one finished cell."""
        _append_lines(self.predictions_path, predictions)
        _append_lines(self.cells_path, [record])
        cell = _cell_of(record)
        self.cells[cell], self.predictions[cell] = record, predictions


def _cell_of(line: Mapping[str, Any]) -> Cell:
    return Cell(line["task"], line["n_shots"], line["run"])


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file; the last one may have been cut off by an interruption."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    complete = lines[:-1]  # what follows the last newline is empty or cut off
    return [json.loads(line) for line in complete]


def _write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    from metasft.checkpoint import replacing_file

    with replacing_file(path) as temporary:
        temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def _append_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())


# ---------------------------------------------------------------------------------------------------- the evaluation


def evaluate(config: EvaluationConfig) -> tuple[dict[str, dict[str, dict[str, Any]]], ResultStore]:
    """Run what is missing of an evaluation and write its result files.

    Everything that can be checked without a model is checked before torch is imported.

    Returns:
        The results (task -> shot count as text -> entry, as in ``<model_type>_results.json``) and the store that wrote
        them.

    Raises:
        ValueError: a setting, a data file or a checkpoint is unusable.
    """
    config.check()
    tasks = read_test_tasks(config)
    source = find_model_source(config)

    from tqdm import tqdm

    from metasft.few_shot_model import FewShotModel, open_model
    from metasft.tasks import majority_baseline

    opened = open_model(config, source)
    store = ResultStore(config.output_dir, config.model_type)
    settings = _settings(config, tasks, source, opened)
    store.open(settings, overwrite=config.overwrite)
    planned = plan_cells([task.name for task in tasks], config.n_shots, config.n_runs)
    missing = [cell for cell in planned if cell not in store.cells]
    if missing:
        model = FewShotModel(config, opened)
        write_json(store.settings_path, {**settings, "trained_parameters": model.trained_parameters})
        by_name = {task.name: task for task in tasks}
        model.prepare(by_name.values(), needed_shots(config, missing, by_name))
        with tqdm(total=len(planned), initial=len(planned) - len(missing), desc="evaluating", unit="cell") as progress:
            for cell in missing:
                progress.set_postfix_str(f"{cell.task}, {cell.n_shots} shots, run {cell.run}")
                store.add(*_run_cell(model, by_name[cell.task], cell, config))
                progress.update()

    results: dict[str, dict[str, dict[str, Any]]] = {}
    for task in tasks:
        baseline = majority_baseline(task.test)
        results[task.name] = {}
        for n in sorted(config.n_shots):
            cells = [cell for cell in planned if cell.task == task.name and cell.n_shots == n]
            results[task.name][str(n)] = summarise_cells(
                [store.cells[cell] for cell in cells], [store.predictions[cell] for cell in cells], baseline
            )
    write_json(store.results_path, results)
    return results, store


def needed_shots(
    config: EvaluationConfig, cells: Sequence[Cell], tasks: Mapping[str, TestTask]
) -> dict[str, list[int]]:
    """Task -> indices of the shots that ``cells`` adapt on."""
    needed: dict[str, set[int]] = {name: set() for name in tasks}
    for cell in cells:
        pool = len(tasks[cell.task].pool)
        needed[cell.task].update(shot_indices(pool, cell.n_shots, seed=config.seed, task=cell.task, run=cell.run))
    return {name: sorted(indices) for name, indices in needed.items()}


def _run_cell(
    model: Any, task: TestTask, cell: Cell, config: EvaluationConfig
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Adapt on the cell's shots and test: (record of the cell, one prediction per test item)."""
    from metasft.tasks import score

    shots = shot_indices(len(task.pool), cell.n_shots, seed=config.seed, task=task.name, run=cell.run)
    outcome = model.adapt_and_test(task.name, shots, run=cell.run)
    place = {"task": cell.task, "n_shots": cell.n_shots, "run": cell.run}
    predictions = []
    for row, output in zip(task.test, outcome.outputs, strict=True):
        verdict = score(output, row)
        predictions.append(
            {
                **place,
                "example_id": row["example_id"],
                "prompt": row["prompt"],
                "gold": row["answer"],
                "output": output,
                "extracted": verdict.extracted,
                "correct": verdict.correct,
                "formatted": verdict.formatted,
            }
        )
    record = {
        **place,
        "n_test": len(predictions),
        "accuracy": sum(p["correct"] for p in predictions) / len(predictions),
        "loss": outcome.loss,
        "adapt_steps": len(outcome.support_losses),
        "adapt_seconds": outcome.adapt_seconds,
        "support_losses": outcome.support_losses,
        "shots": [task.pool[index]["example_id"] for index in shots],
    }
    return record, predictions


def _settings(config: EvaluationConfig, tasks: Sequence[TestTask], source: ModelSource, opened: Any) -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "model_type": config.model_type,
        "model_path": config.model_path,
        "model_kind": source.kind,
        "weights_sha256": source.sha256,
        "base_model": opened.base_model,
        "adapts": opened.adapts,
        "adaptation_steps": config.adaptation_steps,
        "adaptation_optimizer": opened.adaptation.optimizer,
        "adaptation_lr": opened.adaptation.lr,
        "adaptation_origin": opened.adaptation.origin,
        "adaptation_batch_size": config.adaptation_batch_size,
        "eval_tasks": [task.name for task in tasks],
        "n_shots": sorted(config.n_shots),
        "n_runs": config.n_runs,
        "seed": config.seed,
        "limit": config.limit,
        "n_test": {task.name: len(task.test) for task in tasks},
        "shot_pool": {task.name: len(task.pool) for task in tasks},
        "data_sha256": {file.name: _hash_file(file) for t in tasks for file in (t.pool_path, t.test_path)},
        "decoding": "greedy",
        "max_new_tokens": config.max_new_tokens,
        "max_length": config.max_length,
        "batch_size": config.batch_size,
        "device": opened.device_name,
        "dtype": config.dtype,
        "versions": {name: version(name) for name in ("metasft", "torch", "transformers", "peft", "reasoning-gym")},
    }


def format_table(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The results as text: one line per task and N."""
    width = max(len("task"), *(len(task) for task in results))
    lines = [f"{'task':<{width}}  shots  accuracy  95% interval   format    loss  majority"]
    for task, by_shots in results.items():
        for shots, entry in by_shots.items():
            low, high = entry["ci95"]
            lines.append(
                f"{task:<{width}}  {shots:>5}  {entry['accuracy_mean']:>7.1%}  [{low:>5.1%}, {high:>6.1%}]"
                f"  {entry['format_accuracy']:>7.1%}  {entry['loss_mean']:>6.3f}  {entry['majority_baseline']:>7.1%}"
            )
    return "\n".join(lines)
