"""The benchmark's results: kept as JSON, one entry per section, device and dtype, judged by
``studies/performance.yaml`` and written as Markdown by ``templates/performance.md.j2``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, UndefinedError

from metasft.reporting import figures
from metasft.reporting.pages import STUDIES, render

Results = dict[str, dict[str, dict[str, dict[str, Any]]]]
"""section -> device (``cpu``, ``cuda``) -> dtype (``fp32``, ``bf16``, ``any``) -> entry."""

NOT_MEASURED = "not measured"


def read(output: Path) -> Results:
    """The results beside the Markdown file ``output``; empty when there are none yet."""
    file = output.with_suffix(".json")
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def merge(results: Results, section: str, device: str, dtype: str, entry: Mapping[str, Any]) -> Results:
    """``results`` with one entry new or replaced; every other one is kept."""
    merged = json.loads(json.dumps(results))
    merged.setdefault(section, {}).setdefault(device, {})[dtype] = dict(entry)
    return merged


def write(output: Path, results: Results) -> None:
    """Write the Markdown file and the JSON beside it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    output.write_text(page(results, output.stem), encoding="utf-8")
    for device, dtype, of_steps in _steps(results):
        figures.save(figures.cost_of_steps(of_steps), output.with_name(f"{output.stem}_steps_{device}_{dtype}.svg"))


def _steps(results: Results) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for device, kinds in results.get("update_rule", {}).items():
        for dtype, entry in kinds.items():
            if of_steps := entry.get("result", {}).get("of_steps"):
                yield device, dtype, of_steps


def page(results: Results, stem: str = "performance") -> str:
    """The whole Markdown file; ``stem`` is the name of its file, without suffix."""

    def whole(section: str, device: str, dtype: str) -> Mapping[str, Any]:
        """The result of a measurement; empty where there is none, or a quick one, whose settings differ."""
        entry = results.get(section, {}).get(device, {}).get(dtype, {})
        return {} if entry.get("quick") else entry.get("result", {})

    return render(
        "performance.md.j2", stem=stem, results=results, targets=targets(), judge=judge, ratio=ratio, whole=whole
    )


@cache
def targets() -> list[dict[str, Any]]:
    """The ratios that sections must reach."""
    return yaml.safe_load((STUDIES / "performance.yaml").read_text(encoding="utf-8"))


def judge(target: Mapping[str, Any], results: Results, device: str, dtype: str) -> str:
    """``met``, ``missed`` or ``not measured`` with the figure, as a table cell. GPU figures are not judged."""
    kinds = results.get(target["section"], {}).get(device, {})
    entry = kinds.get(dtype) or kinds.get("any")
    if entry is None or entry["quick"] or "result" not in entry:
        return NOT_MEASURED
    expression = Environment().compile_expression(target["value"])
    try:
        value = expression(result=entry["result"], dtype=dtype, smallest=smallest, memory=memory)
    except UndefinedError:
        value = None
    if value is None:
        return NOT_MEASURED
    text = ratio(value)
    if device != "cpu":
        return text
    reached = (value["median"] if isinstance(value, Mapping) else value) >= target["at_least"]
    return f"{text} **{'met' if reached else 'missed'}**"


def smallest(cells: Sequence[Mapping[str, Any]]) -> Mapping[str, float] | None:
    """The smallest ratio of the faster sequential arm over the batched one."""
    ratios = [cell["ratio"][cell["faster_sequential"]] for cell in cells]
    return min(ratios, key=lambda found: found["median"], default=None)


def memory(arms: Mapping[str, Any], dtype: str, *, above: bool = False, lean: bool = False) -> float | None:
    """FOMAML's peak over META-LORA's in ``dtype`` (sgd inside both).

    Args:
        above: without what the process holds before the model.
        lean: both with lean memory settings, META-LORA one task at a time.
    """
    names = ("fomaml_fp32" if dtype == "fp32" else "fomaml_bf16_autocast", f"meta_lora_{dtype}")
    found = [arms.get(f"{name}_lean" if lean else name) for name in names]
    if None in found:
        return None
    full, lora = (arm["peak_bytes"] - (arm["before_model_bytes"] if above else 0) for arm in found)
    return full / lora


def ratio(value: float | Mapping[str, float]) -> str:
    """``1.46 (1.45 to 1.49)``: a ratio of medians, with the smallest and largest ratio of one round."""
    found = value if isinstance(value, Mapping) else {"median": value}
    digits = 2 if found["median"] < 20 else 1
    text = f"{found['median']:.{digits}f}"
    return text if found.get("low") is None else f"{text} ({found['low']:.{digits}f} to {found['high']:.{digits}f})"
