"""What the arms' trainings cost, as measured, and the ratios between them with the factors measured in isolation."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from metasft.experiment_report.results import Arm, Run, number
from metasft.result_files import model_memory, read_json

PERFORMANCE_FILE = (Path(__file__).parents[1] / "shipped" / "performance.json").resolve()
FACTORS = {
    "samples": "sample count",
    "optimizer_traffic": "optimizer and restore traffic",
    "flops": "FLOPs",
    "batching": "task batching",
    "communication": "communication",
}


@dataclass(frozen=True)
class Figure:
    """One measured quantity over the trainings of an arm: their mean, smallest and largest."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Cost:
    """One training of an arm, mean over its replicates; None where it was not measured.

    Attributes:
        seconds: of the training loop; ``process_seconds``: of the whole process, imports and loading included.
        step_seconds: median of a (meta-)step.
        memory: peak bytes of all processes that hold one copy of the model; ``memory_kind`` is ``rss`` or ``device``.
        checkpoint: bytes of one export.
        steps: meta-steps, of veRL's trainer update steps; ``tokens``: trained on.
    """

    seconds: Figure | None = None
    step_seconds: Figure | None = None
    memory: Figure | None = None
    checkpoint: Figure | None = None
    steps: Figure | None = None
    tokens: Figure | None = None
    process_seconds: Figure | None = None
    memory_kind: str | None = None
    device: str | None = None


def cost(arm: Arm) -> Cost:
    summaries = [replicate.summary or {} for replicate in arm.replicates if replicate.train_folder is not None]

    def figure(*keys: str) -> Figure | None:
        values = [next((v for key in keys if (v := number(s, key)) is not None), None) for s in summaries]
        return _figure([value for value in values if value is not None])

    def agreed(key: str) -> str | None:
        values = {str(summary[key]) for summary in summaries if summary.get(key)}
        return values.pop() if len(values) == 1 else " / ".join(sorted(values)) or None

    runs = [replicate.train for replicate in arm.replicates if replicate.train_folder is not None]
    return Cost(
        seconds=figure("seconds_total"),
        step_seconds=figure("seconds_per_step_median"),
        memory=_figure([memory for s in summaries if (memory := _model_memory(s)) is not None]),
        checkpoint=figure("checkpoint_bytes"),
        steps=figure("meta_steps", "steps"),
        tokens=figure("tokens"),
        process_seconds=_figure([run.seconds for run in runs if run is not None and run.seconds is not None]),
        memory_kind=agreed("peak_memory_kind"),
        device=agreed("device_name"),
    )


def _model_memory(summary: Mapping[str, Any]) -> float | None:
    keys = ("model_memory_bytes", "peak_memory_bytes", "task_group_size", "world_size")
    return model_memory({key: number(summary, key) for key in keys})


def _figure(values: Sequence[float]) -> Figure | None:
    return Figure(statistics.fmean(values), min(values), max(values), len(values)) if values else None


@dataclass(frozen=True)
class Ratio:
    """FOMAML over META-LORA; ``expected``: the guide's expectation of it, a factor."""

    name: str
    value: float | None
    expected: str
    fomaml: float | None = None
    meta_lora: float | None = None


def ratios(fomaml: Cost | None, meta_lora: Cost | None) -> list[Ratio]:
    """The four costs of the guide; a value is None where one side was not measured."""
    found = []
    for name, key, expected in (
        ("time per meta-step", "step_seconds", "not stated"),
        ("training time", "seconds", "10 to 100"),
        ("peak memory", "memory", "2 to 5"),
        ("checkpoint", "checkpoint", "100"),
    ):
        sides = [getattr(side, key) if side is not None else None for side in (fomaml, meta_lora)]
        ours, theirs = (side.mean if side is not None else None for side in sides)
        value = ours / theirs if ours is not None and theirs else None
        found.append(Ratio(name, value, expected, ours, theirs))
    return found


@dataclass(frozen=True)
class Factor:
    """One ratio of the benchmark, FOMAML over META-LORA; ``low`` and ``high``: of one round, None where single."""

    group: str
    name: str
    value: float
    low: float | None = None
    high: float | None = None


def factors(path: Path, device: str) -> list[Factor]:
    """The benchmark's ratios for ``device`` (``cpu`` or ``cuda``); empty where it was not run.

    Quick runs of the benchmark, whose settings are smaller, are left out.
    """
    try:
        results = read_json(path)
        found = []
        for dtype in ("fp32", "bf16", "any"):
            for section, read in (("fomaml", _times), ("memory", _memory), ("checkpoint", _checkpoint)):
                entry = results.get(section, {}).get(device, {}).get(dtype, {})
                if "result" in entry and not entry.get("quick"):
                    found += read(entry["result"], dtype)
    except (ValueError, AttributeError, KeyError, TypeError):
        return []
    return found


def _times(result: Mapping[str, Any], dtype: str) -> list[Factor]:
    found = []
    samples = result["full_pass_samples"]
    for optimizer, values in result["inner_optimizers"].items():
        group = f"time, {dtype}, {optimizer} inside"

        def ratio(name: str, value: Mapping[str, float], group: str = group) -> Factor:
            return Factor(group, name, value["median"], value.get("low"), value.get("high"))

        found.append(ratio("meta-step at equal samples", values["equal_samples"]))
        found.append(
            ratio(f"one pass, {samples['fomaml']} samples against {samples['meta_lora']}", values["full_pass"])
        )
        found += [Factor(group, f"factor: {words}", values["factors"][key]) for key, words in FACTORS.items()]
        found.append(Factor(group, "product of the factors", values["product"]))
    return found


def _memory(result: Mapping[str, Any], _: str) -> list[Factor]:
    arms = result["arms"]
    pairs = (("fp32", "fomaml_fp32", "meta_lora_fp32"), ("bf16", "fomaml_bf16_autocast", "meta_lora_bf16"))
    return [
        Factor("memory", f"peak of the process, {dtype}", arms[full]["peak_bytes"] / arms[lora]["peak_bytes"])
        for dtype, full, lora in pairs
        if full in arms and lora in arms
    ]


def _checkpoint(result: Mapping[str, Any], _: str) -> list[Factor]:
    return [
        Factor("checkpoint", f"bytes of an export, LoRA rank {arm.removeprefix('meta_lora_r')}", value)
        for arm, value in result["ratio"].items()
    ]


def sharing(runs: Sequence[Run], others: Sequence[Run]) -> int:
    """How many of ``runs`` had to share the machine with another of ``others`` for part of their time."""
    spans = {run.name: span for run in (*runs, *others) if (span := _span(run)) is not None}

    def overlap(one: str, other: str) -> bool:
        (start, end), (other_start, other_end) = spans[one], spans[other]
        return one != other and start < other_end and other_start < end

    return sum(any(overlap(run.name, other) for other in spans) for run in runs if run.name in spans)


def _span(run: Run) -> tuple[float, float] | None:
    """Start and end of a run in seconds since the epoch."""
    try:
        start, end = (datetime.fromisoformat(time or "").timestamp() for time in (run.started, run.finished))
    except (TypeError, ValueError):
        return None
    return start, end
