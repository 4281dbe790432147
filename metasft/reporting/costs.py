"""What trainings cost, as they recorded it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from metasft.config.result_files import model_memory

_KEYS = {
    "seconds": ("seconds_total",),
    "step_seconds": ("seconds_per_step_median",),
    "checkpoint": ("checkpoint_bytes",),
    "steps": ("meta_steps", "steps"),
    "tokens": ("tokens",),
}

_LARGEST = 1e300  # what is larger would leave the finite range in the first sum


def number(values: Mapping[str, Any] | None, key: str) -> float | None:
    """A finite number of a JSON mapping, None where there is none."""
    value = (values or {}).get(key)
    return float(value) if type(value) in (int, float) and abs(value) < _LARGEST and math.isfinite(value) else None


def cost(summaries: Sequence[Mapping[str, Any] | None], process_seconds: Sequence[float | None] = ()) -> dict[str, Any]:
    """One training of an arm: mean, smallest and largest over its trainings; None where nothing was measured.

    Args:
        summaries: their ``run_summary.json``.
        process_seconds: of their whole processes, imports and loading included.

    Returns:
        ``seconds`` (of the training loop), ``step_seconds`` (median of a (meta-)step), ``memory`` (peak bytes of all
        processes that hold one copy of the model; ``memory_kind`` is ``rss`` or ``device``), ``checkpoint`` (bytes of
        one export), ``steps``, ``tokens``, ``process_seconds``, each ``{mean, low, high, count}``; ``device``.
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
        "memory": spread([_model_memory(summary) for summary in summaries]),
        "process_seconds": spread(process_seconds),
        "memory_kind": agreed("peak_memory_kind"),
        "device": agreed("device_name"),
    }


def _model_memory(summary: Mapping[str, Any] | None) -> float | None:
    keys = ("model_memory_bytes", "peak_memory_bytes", "task_group_size", "world_size")
    return model_memory({key: number(summary, key) for key in keys})


def ratio(cost_of: str, a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> dict[str, float | None]:
    """A cost of arm ``a`` over that of arm ``b``; None where a side was not measured."""
    ours, theirs = ((side or {}).get(cost_of) for side in (a, b))
    values = [side["mean"] if side else None for side in (ours, theirs)]
    return {
        "value": values[0] / values[1] if None not in values and values[1] else None,
        "a": values[0],
        "b": values[1],
    }
