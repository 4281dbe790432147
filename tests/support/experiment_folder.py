"""A synthetic experiments folder in the shape that ``run_experiments.py`` leaves, with numbers chosen by the test.

Of every cell the first so many items are right, so that differences and intervals can be worked out by hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from metasft.reporting.statistics import summarise_cells

TASKS = ("calculus", "theorem_proving")
TRAINING_TASKS = ("algebra", "geometry")
SHOTS = (0, 5, 25)
ITEMS = 60  # of each task: two arms that agree on all of them are equivalent within 3 points
MODEL_TYPES = {"lora_single": "lora", "lora_mixed": "lora"}
TRAINED_IN_PARTS = "lora_single"

SETTINGS = {
    "seed": 1, "adaptation_steps": 10, "adaptation_batch_size": 4, "adaptation_optimizer": "sgd",
    "adaptation_lr": 0.05, "adaptation_origin": "checkpoint", "max_new_tokens": 48, "max_length": 1024,
    "decoding": "greedy", "dtype": "float32", "base_model": "models/tiny",
    "data_sha256": {"calculus_support.parquet": "aa", "calculus_test.parquet": "bb", "logic_test.parquet": "cc"},
}  # fmt: skip
"""Of an evaluation that :func:`write_evaluation` writes."""

Answers = Callable[[str, int, int, int], Sequence[bool]]
"""(task, shots, run, seed) -> whether each item was answered right."""


@dataclass(frozen=True)
class FakeArm:
    """One arm and what its runs measured.

    Attributes:
        samples: support examples of a meta-learner, ``query`` those of its query sets (None: as an earlier release
            records it); what standard LoRA trains on.
        zero, few: right answers at 0 shots and above, of the folder's items; ``answers`` gives them one by one instead.
        loss: at 0 shots; with shots it is ``few_loss``, 0.02 more for each further shot set.
        seconds: of the training; ``memory`` (of a process) and ``checkpoint`` in bytes; None writes null.
        sizes: further keys of the summary.
        queries: query loss after adaptation, one per meta-step; ``gains`` likewise.
        speed: update steps -> right answers, of the speed curve.
    """

    label: str
    method: str
    experiment: str | None = None
    samples: int | None = None
    query: int | None = 167
    zero: int = 2
    few: int = 8
    answers: Answers | None = None
    loss: float = 2.0
    few_loss: float = 1.0
    seconds: float | None = 360.0
    step_seconds: float | None = 30.0
    memory: float | None = 2e9
    checkpoint: float | None = 20e6
    sizes: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (1,)
    queries: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
    gains: tuple[float, ...] = (0.3, 0.3, 0.3, 0.2, 0.1, 0.1)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    speed: Mapping[int, int] = field(default_factory=dict)


def matrix_arms(**changes: FakeArm) -> dict[str, FakeArm]:
    """The guide's matrix, in which META-LORA on 100 samples and FOMAML answer alike."""
    arms = {
        "fomaml_300": FakeArm(
            "FOMAML-SFT, 300", "fomaml", "Exp 1", 300, seconds=720.0, step_seconds=60.0, memory=5e9, checkpoint=540e6
        ),
        "meta_lora_100": FakeArm("META-LORA, 100", "meta_lora", "Exp 2", 100),
        "meta_lora_300": FakeArm("META-LORA, 300", "meta_lora", "Exp 3", 300),
        "lora_single": FakeArm("Standard LoRA, one task, 100", "lora_single", "Exp 4", 100, few=6),
        "lora_mixed": FakeArm("Standard LoRA, all tasks, 600", "lora_mixed", "Exp 5", 600, few=6),
        "reptile_300": FakeArm("Reptile-SFT, 300", "reptile", None, 300, seconds=700.0, memory=4e9),
        "base": FakeArm("Base model", "base", few=4),
    }
    return {**arms, **changes}


MATRIX_SUITE = {
    "title": "Experiment matrix",
    "question": "Does META-LORA on 100 examples per task match FOMAML-SFT on 300?",
    "arms": list(matrix_arms()),
    "comparisons": [
        {"a": "meta_lora_100", "b": "fomaml_300", "margin": 0.03},
        {"a": "meta_lora_100", "b": "lora_mixed", "margin": 0.03},
        {"a": "meta_lora_100", "b": "base", "margin": 0.03},
    ],
    "axis": None,
}


def write_experiments(
    folder: Path,
    arms: Mapping[str, FakeArm] | None = None,
    *,
    suites: Mapping[str, Mapping[str, Any]] | None = None,
    states: Mapping[str, Mapping[str, Any]] | None = None,
    items: int = 40,
    runs: int = 2,
    exports: bool = True,
    tasks: Sequence[str] = TASKS,
    shots: Sequence[int] = SHOTS,
    groups: Mapping[str, str] | None = None,
    trivial: Mapping[str, float] | None = None,
) -> Path:
    """Write the folder.

    Args:
        suites: default: the matrix alone.
        states: run -> entries of its record that differ from a finished run's; an unfinished run leaves no files.
        items: test items per task.
        runs: shot sets above 0 shots.
        exports: whether META-LORA's trainings leave their ``.pt`` file and optimizer state.
        groups: of the tasks; None: the settings have no such key, as before there was one.
        trivial: accuracy of each task's best trivial solver; None likewise.

    Returns:
        ``folder``.
    """
    arms = matrix_arms() if arms is None else arms
    states = states or {}
    folder.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {
        "format": 1, "command": "python run_experiments.py --suite matrix --scale cpu", "scale": "cpu",
        "created": "2030-01-02T03:00:00+00:00", "updated": "2030-01-02T04:00:00+00:00", "model": "models/tiny",
        "provenance": {
            "commit": "0123456789abcdef", "dirty": False, "versions": {"torch": "2.13.0", "verl": "0.9.0"},
            "device": "a CPU", "cores": 2, "python": "3.11.7",
            "data_sha256": {"meta_test/calculus_test.parquet": "bb" * 32},
        },
        "evaluation": {"tasks": list(tasks), "n_shots": list(shots), "n_runs": runs},
        "suites": dict(suites or {"matrix": MATRIX_SUITE}), "arms": {},
        "runs": {"data": _record("data", {"needs": []})},
    }  # fmt: skip
    for name, arm in arms.items():
        replicates = []
        for seed in arm.seeds:
            for task in TRAINING_TASKS if arm.method == TRAINED_IN_PARTS else (None,):
                stem = f"{name}-{task}-seed{seed}" if task else f"{name}-seed{seed}"
                train = None if arm.method == "base" else f"train-{stem}"
                replicates.append({"seed": seed, "task": task, "train": train, "evaluate": f"evaluate-{stem}"})
                for kind, run in (("train", train), ("evaluate", f"evaluate-{stem}")):
                    if run is None:
                        continue
                    own = {"arm": name, "seed": seed, "seconds": (arm.seconds or 0.0) + 40.0}
                    document["runs"][run] = _record(kind, {**own, **states.get(run, {})})
                    if document["runs"][run]["state"] == "finished":
                        target = folder / "runs" / run
                        target.mkdir(parents=True)
                        if kind == "train":
                            _write_training(target, arm, seed, exports)
                        else:
                            _write_evaluation(target, arm, seed, items, runs, tasks, shots, groups, trivial)
        document["arms"][name] = {
            "label": arm.label, "experiment": arm.experiment, "method": arm.method,
            "model_type": MODEL_TYPES.get(arm.method, arm.method), **_planned(arm),
            "overrides": dict(arm.overrides), "seeds": list(arm.seeds), "replicates": replicates,
        }  # fmt: skip
    (folder / "experiments.json").write_text(json.dumps(document, indent=1))
    return folder


def _record(kind: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "kind": kind, "arm": None, "seed": None, "state": "finished", "seconds": 12.5, "returncode": 0, "attempts": 1,
        "command": ["python", f"{kind}.py", "--name", "a b"], "environment": {"OMP_NUM_THREADS": "1"},
        "started": "2030-01-02T03:00:00+00:00", "finished": "2030-01-02T03:10:00+00:00", "peak_memory_bytes": 1e9,
        "needs": ["data"], "error": None, **changes,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- training


def _counts(arm: FakeArm) -> tuple[int, int | None, int]:
    """Query examples, labelled examples per task, and in all."""
    query = arm.query if arm.method in ("meta_lora", "fomaml", "reptile") else 0
    per_task = arm.samples + query
    tasks = len(TRAINING_TASKS) if query else 1
    return query, None if arm.method == "lora_mixed" else per_task, tasks * per_task


def _planned(arm: FakeArm) -> dict[str, Any]:
    if arm.samples is None or arm.query is None:
        return {"samples_per_task": arm.samples}
    query, per_task, in_all = _counts(arm)
    return {
        "support_samples": arm.samples, "query_samples": query, "samples_per_task": per_task or in_all,
        "labelled_examples": in_all,
    }  # fmt: skip


def _measured(arm: FakeArm) -> dict[str, Any]:
    if arm.samples is None or arm.query is None:
        return {}
    query, per_task, in_all = _counts(arm)
    return {"query_samples": query, "labelled_examples_per_task": per_task, "labelled_examples": in_all}


def _write_training(folder: Path, arm: FakeArm, seed: int, exports: bool) -> None:
    meta_learned = arm.method in ("meta_lora", "fomaml", "reptile")
    steps = {"meta_steps": len(arm.queries)} if meta_learned else {"steps": 50}
    summary = {
        "method": arm.method, "base_model": "models/tiny", "device_name": "a CPU, 1 threads per process",
        "support_samples": arm.samples, **_measured(arm), **steps, "tokens": 12345, "seconds_total": arm.seconds,
        "seconds_per_step_median": arm.step_seconds, "peak_memory_bytes": arm.memory, "peak_memory_kind": "rss",
        "checkpoint_bytes": arm.checkpoint, "seed": seed, **arm.sizes,
    }  # fmt: skip
    (folder / "run_summary.json").write_text(json.dumps(summary))
    if not meta_learned:
        return
    with (folder / "metrics.jsonl").open("w") as file:
        for step, (query, gain) in enumerate(zip(arm.queries, arm.gains, strict=True), start=1):
            record: dict[str, float] = {"step": step, "meta/grad_norm": 1.0}
            # Two tasks that lie 0.2 apart throughout.
            for task, shift in zip(("", *TRAINING_TASKS), (0.0, -0.1, 0.1), strict=True):
                end = f"/{task}" if task else ""
                record[f"inner/support_loss_first{end}"] = query + 0.5 + shift
                record[f"inner/support_loss_last{end}"] = query + 0.1 + shift / 2
                record[f"meta/query_loss_after{end}"] = query + shift
                record[f"meta/adaptation_gain{end}"] = gain + shift / 10
            file.write(json.dumps(record) + "\n")
    if exports and arm.method == "meta_lora":
        write_export(folder, step=len(arm.queries))


def write_export(
    folder: Path, *, step: int, foreign: str | None = None, moved: bool = True, base_stepped: bool = False
):
    """META-LORA's export and the optimizer's state, of two modules.

    Args:
        foreign: name of a tensor that is none of LoRA's, put into the file too.
        moved: whether the B matrices have left zero.
        base_stepped: whether the optimizer also holds moments of a base matrix.
    """
    import torch
    from safetensors.torch import save_file

    from metasft.checkpoint.exports import FORMAT, FORMAT_VERSION

    tensors = {}
    for module in ("q_proj", "v_proj"):
        name = f"base_model.model.layers.0.{module}"
        tensors[f"{name}.lora_A.weight"] = torch.ones(4, 8)
        tensors[f"{name}.lora_B.weight"] = torch.full((6, 4), 0.1 if moved else 0.0)
    moments = [tensor.shape for tensor in tensors.values()] + ([torch.Size((8, 6))] if base_stepped else [])
    adaptation = {"num_inner_steps": 5, "inner_optimizer": "sgd"}
    (folder / f"adapter_step_{step}").mkdir(exist_ok=True)
    save_file(tensors, folder / f"adapter_step_{step}" / "adapter_model.safetensors")
    (folder / f"adapter_step_{step}" / "adaptation.json").write_text(json.dumps({**adaptation, "step": step}))
    if foreign:
        tensors[foreign] = torch.ones(3)
    content = {
        "format": FORMAT, "version": FORMAT_VERSION, "step": step, "base_model": "models/tiny",
        "adapter_config": {"r": 4, "lora_alpha": 8}, "adaptation": adaptation, "lora": tensors,
    }  # fmt: skip
    torch.save(content, folder / f"meta_lora_checkpoint_step_{step}.pt")
    (folder / f"global_step_{step}").mkdir(exist_ok=True)
    state = {
        i: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(shape), "exp_avg_sq": torch.zeros(shape)}
        for i, shape in enumerate(moments)
    }
    torch.save({"state": state, "param_groups": []}, folder / f"global_step_{step}" / "optim_world_size_1_rank_0.pt")


# -------------------------------------------------------------------------------------------------------- evaluation


def _write_evaluation(
    folder: Path,
    arm: FakeArm,
    seed: int,
    items: int,
    runs: int,
    tasks: Sequence[str],
    shots: Sequence[int],
    groups: Mapping[str, str] | None,
    trivial: Mapping[str, float] | None,
) -> None:
    model_type = MODEL_TYPES.get(arm.method, arm.method)

    def right(task: str, n: int, run: int) -> Sequence[bool]:
        if arm.answers is not None:
            return arm.answers(task, n, run, seed)
        count = arm.zero if n == 0 else arm.few
        return [i < count for i in range(items)]

    cells = [
        (
            {"task": task, "n_shots": n, "run": run},
            right(task, n, run),
            (arm.loss if n == 0 else arm.few_loss) + 0.02 * run,
        )
        for task in tasks
        for n in shots
        for run in range(1 if n == 0 else runs)
    ]
    full = arm.method in ("fomaml", "reptile")
    settings = {
        "model_type": model_type, "model_path": f"runs/{arm.method}", "weights_sha256": "ab" * 32,
        "model_kind": "lora_file" if arm.method == "meta_lora" else "model", "base_model": "models/tiny",
        "adapts": "all parameters" if full else "LoRA, r=16", "protocol": "adaptation", "adaptation_steps": 10,
        "adaptation_optimizer": "adamw", "adaptation_lr": 1e-5 if full else 1e-3, "adaptation_batch_size": 4,
        "seed": 1, "data_sha256": {f"{task}_test.parquet": "bb" for task in tasks},
        **({"group": dict(groups)} if groups else {}),
    }  # fmt: skip
    if trivial:
        settings["trivial_baseline"] = {task: {"name": "echo", "accuracy": share} for task, share in trivial.items()}
    (folder / f"{model_type}_settings.json").write_text(json.dumps(settings))
    write_cells(folder, model_type, cells, trivial=trivial)
    if arm.speed:
        cells = [
            (
                {"task": task, "n_shots": 25, "run": run, "step": n},
                [i < count for i in range(items)],
                2.0 / (1 + n) + 0.02 * run,
            )
            for task in tasks
            for n, count in arm.speed.items()
            for run in range(runs)
        ]
        (folder / f"{model_type}_speed_settings.json").write_text(json.dumps(settings))
        write_cells(folder, model_type, cells, "step", "speed", trivial=trivial)


def write_evaluation(
    folder: Path,
    model_type: str,
    correct: Mapping[tuple[str, int], Sequence[Sequence[int]]],
    losses: Mapping[tuple[str, int], Sequence[float]] | None = None,
    *,
    changes: Mapping[str, Any] | None = None,
    items: Sequence[str] | None = None,
    shots: str = "s-",
) -> Path:
    """An evaluation of its own.

    Args:
        correct: (task, N) -> [runs][items] of 0 and 1.
        losses: (task, N) -> one per run, default 1.
        changes: of :data:`SETTINGS`.
        items, shots: as in :func:`write_cells`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cells = [
        ({"task": task, "n_shots": n, "run": run}, answers, ((losses or {}).get((task, n)) or [1.0] * len(runs))[run])
        for (task, n), runs in correct.items()
        for run, answers in enumerate(runs)
    ]
    write_cells(folder, model_type, cells, items=items, shots=shots)
    (folder / f"{model_type}_settings.json").write_text(json.dumps({**SETTINGS, **(changes or {})}))
    return folder


def write_cells(
    folder: Path,
    model_type: str,
    cells: Sequence[Any],
    by: str = "n_shots",
    kind: str = "results",
    *,
    items: Sequence[str] | None = None,
    shots: str = "",
    majority: float = 0.25,
    trivial: Mapping[str, float] | None = None,
) -> None:
    """What an evaluation leaves: results, predictions and cells.

    Args:
        cells: (place, whether each item was answered right, loss) each.
        by: key of a place that the results are listed by.
        items: ids of the test items; None: made of the task and a number.
        shots: in front of the ids of the shots.
        majority, trivial: accuracies without a model, of every task and by task.
    """
    stem = model_type if kind == "results" else f"{model_type}_{kind}"
    predictions, lines = [], []
    grouped: dict[str, dict[str, list[Any]]] = {}
    for place, answers, loss in cells:
        names = items or [f"{place['task']}-{i}" for i in range(len(answers))]
        of_cell = [
            {
                **place,
                "example_id": name,
                "correct": bool(answer),
                "correct_lenient": bool(answer),
                "formatted": i > 0,
                "truncated": False,
                "output": "a\u2028b",
            }
            for i, (name, answer) in enumerate(zip(names, answers, strict=True))
        ]
        line = {
            **place,
            "n_test": len(of_cell),
            "loss": loss,
            "adapt_steps": 0 if place[by] == 0 else 10,
            "adapt_seconds": 1.0,
            "shots": [f"{shots}{place['task']}-{place['run']}-{i}" for i in range(place["n_shots"])],
        }
        predictions += of_cell
        lines.append(line)
        grouped.setdefault(place["task"], {}).setdefault(str(place[by]), []).append((line, of_cell))
    results = {
        task: {
            n: summarise_cells(
                [line for line, _ in pairs],
                [answers for _, answers in pairs],
                {"majority_baseline": majority, **({"trivial_baseline": trivial[task]} if trivial else {})},
            )
            for n, pairs in by_value.items()
        }
        for task, by_value in grouped.items()
    }
    (folder / f"{model_type}_{kind}.json").write_text(json.dumps(results))
    for name, content in (("predictions", predictions), ("cells", lines)):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in content)
        (folder / f"{stem}_{name}.jsonl").write_text(text, encoding="utf-8")


# --------------------------------------------------------------------------------------------------- what tests share


def report_of(folder: Path, arms: Mapping[str, FakeArm] | None = None, **options: Any) -> dict[str, Any]:
    """The document of a report on a synthetic folder with these arms."""
    return read_report(write_experiments(folder, arms, **{"items": ITEMS, **options}))


def read_report(folder: Path) -> dict[str, Any]:
    """The document of a report on a folder as it stands."""
    from metasft.reporting.arms import read_experiments
    from metasft.reporting.report import document

    return document(read_experiments(folder))


def score_of(report: Mapping[str, Any], arm: str, task: str, shots: int | str) -> dict[str, Any]:
    """The score of an arm at one place."""
    (found,) = [s for s in report["arms"][arm]["scores"] if (s["task"], s["shots"]) == (task, shots)]
    return found


def pooled(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """The row over all tasks and shot counts above 0."""
    (found,) = [row for row in comparison["rows"] if (row["task"], row["shots"]) == ("all", "all > 0")]
    return found


def arm(name: str, **changes: Any) -> dict[str, FakeArm]:
    """An arm of the matrix with something changed."""
    return {name: replace(matrix_arms()[name], **changes)}


def finding(report: Mapping[str, Any], item: str) -> dict[str, Any]:
    """The finding of one item of the checklists."""
    (found,) = [f for findings in report["checklists"].values() for f in findings if f["item"] == item]
    return found


def some_answers(share: float, items: int) -> Answers:
    """Answers that vary between seeds, shot sets and items, and are the same every time."""

    def answer(task: str, n: int, run: int, seed: int) -> list[bool]:
        draw = np.random.default_rng([len(task), n, run, seed])
        return list(draw.random(items) < share + 0.05 * seed)

    return answer
