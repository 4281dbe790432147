"""What trainings cost, as they recorded it, and the benchmark's ratios beside it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from metasft.result_files import read_json
from metasft.shapes import LARGEST, is_number

PERFORMANCE_FILE = Path(__file__).resolve().parents[2] / "docs" / "performance.json"
_KEYS = {
    "seconds": ("seconds_total",),
    "step_seconds": ("seconds_per_step_median",),
    "memory": ("peak_memory_bytes",),
    "checkpoint": ("checkpoint_bytes",),
    "steps": ("meta_steps", "steps"),
    "tokens": ("tokens",),
}
_FACTORS = {
    "samples": "sample count",
    "optimizer_traffic": "optimizer and restore traffic",
    "flops": "FLOPs",
    "batching": "task batching",
    "communication": "communication",
}


def number(values: Mapping[str, Any] | None, key: str) -> float | None:
    """A finite number of a JSON mapping, None where there is none."""
    value = (values or {}).get(key)
    return float(value) if is_number(value) and abs(value) < LARGEST and math.isfinite(value) else None


def cost(summaries: Sequence[Mapping[str, Any] | None], process_seconds: Sequence[float | None] = ()) -> dict[str, Any]:
    """One training of an arm: mean, smallest and largest over its trainings; None where nothing was measured.

    Args:
        summaries: their ``run_summary.json``.
        process_seconds: of their whole processes, imports and loading included.

    Returns:
        ``seconds`` (of the training loop), ``step_seconds`` (median of a (meta-)step), ``memory`` (peak bytes of a
        process; ``memory_kind`` is ``rss`` or ``device``), ``checkpoint`` (bytes of one export), ``steps``, ``tokens``,
        ``process_seconds``, each ``{mean, low, high, count}``; ``device``.
    """

    def spread(values: Sequence[float | None]) -> dict[str, float] | None:
        found = [value for value in values if value is not None]
        return (
            found and {"mean": statistics.fmean(found), "low": min(found), "high": max(found), "count": len(found)}
        ) or None

    def agreed(key: str) -> str | None:
        return " / ".join(sorted({str(s[key]) for s in summaries if s and s.get(key)})) or None

    return {
        **{
            name: spread([next((v for k in keys if (v := number(s, k)) is not None), None) for s in summaries])
            for name, keys in _KEYS.items()
        },
        "process_seconds": spread(process_seconds),
        "memory_kind": agreed("peak_memory_kind"),
        "device": agreed("device_name"),
    }


def ratio(cost_of: str, a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> dict[str, float | None]:
    """A cost of arm ``a`` over that of arm ``b``; None where a side was not measured."""
    ours, theirs = ((side or {}).get(cost_of) for side in (a, b))
    values = [side["mean"] if side else None for side in (ours, theirs)]
    return {
        "value": values[0] / values[1] if None not in values and values[1] else None,
        "a": values[0],
        "b": values[1],
    }


def factors(path: Path, device: str) -> list[dict[str, Any]]:
    """The benchmark's ratios, FOMAML over META-LORA, for ``device`` (``cpu`` or ``cuda``).

    Returns:
        ``group``, ``name``, ``value``, ``low`` and ``high`` of one round. Empty where it was not run; quick runs, whose
        settings are smaller, are left out.
    """
    try:
        results = read_json(path)
        return [
            {"low": None, "high": None, **factor}
            for dtype in ("fp32", "bf16", "any")
            for section, read in (("fomaml", _times), ("memory", _memory), ("checkpoint", _checkpoint))
            if "result" in (entry := results.get(section, {}).get(device, {}).get(dtype, {})) and not entry.get("quick")
            for factor in read(entry["result"], dtype)
        ]
    except (ValueError, AttributeError, KeyError, TypeError):
        return []


def _times(result: Mapping[str, Any], dtype: str) -> Iterator[dict[str, Any]]:
    samples = result["full_pass_samples"]
    for optimizer, values in result["inner_optimizers"].items():
        group = f"time, {dtype}, {optimizer} inside"
        for name, found in (
            ("meta-step at equal samples", values["equal_samples"]),
            (f"one pass, {samples['fomaml']} samples against {samples['meta_lora']}", values["full_pass"]),
        ):
            spread = {"low": found.get("low"), "high": found.get("high")}
            yield {"group": group, "name": name, "value": found["median"], **spread}
        for key, words in _FACTORS.items():
            yield {"group": group, "name": f"factor: {words}", "value": values["factors"][key]}
        yield {"group": group, "name": "product of the factors", "value": values["product"]}


def _memory(result: Mapping[str, Any], _: str) -> Iterator[dict[str, Any]]:
    arms = result["arms"]
    for dtype, full, lora in (
        ("fp32", "fomaml_fp32", "meta_lora_fp32"),
        ("bf16", "fomaml_bf16_autocast", "meta_lora_bf16"),
    ):
        if full in arms and lora in arms:
            value = arms[full]["peak_bytes"] / arms[lora]["peak_bytes"]
            yield {"group": "memory", "name": f"peak of the process, {dtype}", "value": value}


def _checkpoint(result: Mapping[str, Any], _: str) -> Iterator[dict[str, Any]]:
    for arm, value in result["ratio"].items():
        name = f"bytes of an export, LoRA rank {arm.removeprefix('meta_lora_r')}"
        yield {"group": "checkpoint", "name": name, "value": value}
