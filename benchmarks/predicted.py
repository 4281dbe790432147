"""Compare what :mod:`metasft.plan` predicts with every measured cell of docs/performance.json, and write docs/plan.md.

    python benchmarks/predicted.py

Of each section and dtype three numbers are fitted, those of the machine (operations and bytes a second, seconds to
start a pass): cells were measured on different processors, which other work shared.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
if Path(sys.path[0]).resolve() == ROOT / "benchmarks":  # run as a script: its modules are those of a package
    sys.path[0] = str(ROOT)

from benchmarks.sections.common import TOGETHER  # noqa: E402
from benchmarks.sections.memory import MEMORY_ARMS  # noqa: E402
from metasft.plan.flops import ModelShape  # noqa: E402
from metasft.plan.machines import MACHINES, Machine  # noqa: E402
from metasft.plan.meta_step import MetaStep, cost  # noqa: E402

TOLERANCE = 0.25
RESPONSE = 0.26
"""Share of the tokens of the project's tasks that are predicted."""
EXAMPLE = 84.0
"""Tokens of an example of theirs."""
USUAL = MetaStep(lora_rank=16, tokens=EXAMPLE, response=RESPONSE * EXAMPLE)


class Measured(NamedTuple):
    """A cell: its section and dtype, a name, what was run on which model, and seconds or bytes."""

    section: str
    dtype: str
    name: str
    step: MetaStep
    value: float
    model: str = "smollm2-135m"


class Predicted(NamedTuple):
    """A cell, and what the arithmetic says of it."""

    cell: Measured
    value: float

    @property
    def ratio(self) -> float:
        return self.value / self.cell.value

    @property
    def right(self) -> bool:
        return 1 - TOLERANCE <= self.ratio <= 1 + TOLERANCE


def cells(results: Mapping[str, Any]) -> Iterator[Measured]:
    """What was measured of the project's own trainers on a CPU."""
    for section, read in READERS.items():
        for dtype, entry in results.get(section, {}).get("cpu", {}).items():
            if "result" not in entry or entry["quick"]:
                continue
            size = 2 if dtype == "bf16" else 4
            usual = replace(USUAL, weight_bytes=size, product_bytes=size)
            for name, step, value, *model in read(entry["result"], usual):
                yield Measured(section, dtype, name, step, value, *model)


def _inner_step(result: Any, usual: MetaStep) -> Iterator[tuple[Any, ...]]:
    for cell in result["cells"]:
        step = replace(
            usual,
            tasks=cell["tasks"],
            inner_steps=1,
            inner_batch=cell["examples"],
            query_batch=0,
            tokens=cell["length"],
            response=cell["response"],
        )
        for arm in ("batched", "one_at_a_time"):
            together = max(1, 8192 // cell["tokens"]) if arm == "batched" else 1
            name = f"{cell['tasks']} x {cell['tokens']} tokens, {arm.replace('_', ' ')}"
            yield name, replace(step, tasks_per_pass=together), cell["seconds"][arm]["median"]


def _meta_step(result: Any, usual: MetaStep) -> Iterator[tuple[Any, ...]]:
    for name, step in _ways(usual):
        if name in result["seconds"]:
            yield name.replace("_", " "), step, result["seconds"][name]["median"]


def _fomaml(result: Any, usual: MetaStep) -> Iterator[tuple[Any, ...]]:
    for optimizer, found in result["inner_optimizers"].items():
        for name, step in _ways(replace(usual, adamw=optimizer == "adamw")):
            yield f"{name.replace('_', ' ')}, {optimizer}", step, found["seconds"][name]["median"]


def _ways(usual: MetaStep) -> Iterator[tuple[str, MetaStep]]:
    yield "batched", replace(usual, tasks_per_pass=usual.tasks)
    yield "one_at_a_time", usual
    yield "fomaml", replace(usual, lora_rank=0, weight_bytes=4)


def _update_rule(result: Any, usual: MetaStep) -> Iterator[tuple[Any, ...]]:
    step = replace(usual, tasks_per_pass=4, adamw=True)
    exact = {"meta.order=2": 5, "meta.order=2, meta.second_order_steps=2": 2}
    for name, seconds in result["seconds"].items():
        yield name, replace(step, exact_steps=exact.get(name, 0)), seconds["median"]
    for count, orders in result["of_steps"].items():
        for order, seconds in orders.items():
            steps = int(count)
            alone = replace(step, tasks=1, inner_steps=steps, exact_steps=steps if order == "2" else 0)
            yield f"one task, K = {count}, order {order}", alone, seconds["median"]


def _top_layers(result: Any, usual: MetaStep) -> Iterator[tuple[Any, ...]]:
    step = replace(usual, tasks_per_pass=4, adamw=True, inner_steps=result["steps"], query_batch=0)
    for use, shots in result["shots"].items():
        for layers, seconds in result["seconds"][use].items():
            top = None if layers == "all" else int(layers)
            name = f"{use.replace('_', ' ')}, {layers} layers"
            yield name, replace(step, shots=shots, top_layers=top), seconds["median"]


def _sizes(result: Any, usual: MetaStep) -> Iterator[tuple[Any, ...]]:
    step = replace(usual, tasks=2, inner_steps=2, tasks_per_pass=2)
    for model, found in result["models"].items():
        tokens = found["fomaml"]["tokens"] / 24
        of_model = replace(step, tokens=tokens, response=RESPONSE * tokens)
        full = replace(of_model, lora_rank=0, weight_bytes=4)
        for method, one in {"meta_lora": of_model, "fomaml": full}.items():
            yield f"{model}, {method}", one, found["fomaml"]["seconds"][method]["median"], model


def _memory(result: Any, usual: MetaStep) -> Iterator[tuple[Any, ...]]:
    for arm, found in result["arms"].items():
        of_arm = MEMORY_ARMS[arm]
        if of_arm["method"] in ("meta_lora", "fomaml"):
            lora, narrow = of_arm["method"] == "meta_lora", of_arm["dtype"] == "bf16"
            step = replace(
                usual,
                lora_rank=16 if lora else 0,
                inner_steps=result["inner_steps"],
                tasks_per_pass=4 if of_arm.get("overrides") == TOGETHER else 1,
                adamw="meta.inner_optimizer=adamw" in of_arm.get("overrides", ()),
                weight_bytes=2 if lora and narrow else 4,
                product_bytes=2 if narrow else 4,
            )
            yield f"peak, {arm.replace('_', ' ')}", step, found["peak_bytes"]


READERS = {
    "inner_step": _inner_step,
    "peft_loop": _meta_step,
    "fomaml": _fomaml,
    "update_rule": _update_rule,
    "top_layers": _top_layers,
    "sizes": _sizes,
    "memory": _memory,
}


def fitted(measured: Sequence[Measured]) -> Machine:
    """The machine with which the cells' seconds are predicted best, in relative terms."""
    import numpy as np
    from scipy.optimize import least_squares

    costs = [cost(cell.step, ModelShape.of(cell.model)) for cell in measured]
    seconds = np.log([cell.value for cell in measured])
    usual = MACHINES["cpu"]
    start = np.log([usual.flops, usual.bandwidth, usual.pass_seconds])

    def machine(logs: Any) -> Machine:
        flops, bandwidth, pass_seconds = map(math.exp, logs)
        return replace(usual, flops=flops, bandwidth=bandwidth, pass_seconds=pass_seconds)

    def off(logs: Any) -> Any:
        predicted = np.log([sum(one.seconds(machine(logs)).values()) for one in costs])
        # What few cells do not tell stays near the usual machine.
        return np.concatenate([(predicted - seconds) / 0.1, 0.3 * (logs - start) / np.array([3.0, 0.3, 0.5])])

    return machine(least_squares(off, start, loss="soft_l1").x)


def predictions(results: Mapping[str, Any]) -> list[Predicted]:
    """Every measured cell with its prediction."""
    by_entry: dict[tuple[str, str], list[Measured]] = {}
    for cell in cells(results):
        by_entry.setdefault((cell.section, cell.dtype), []).append(cell)
    found = []
    for (section, _), measured in by_entry.items():
        machine = MACHINES["cpu"] if section == "memory" else fitted(measured)
        for cell in measured:
            of_cell = cost(cell.step, ModelShape.of(cell.model))
            value = of_cell.memory + machine.overhead if section == "memory" else sum(of_cell.seconds(machine).values())
            found.append(Predicted(cell, value))
    return found


def page(results: Mapping[str, Any]) -> str:
    """docs/plan.md."""
    import pandas as pd

    found = predictions(results)
    rows = [
        {
            "section": f"{one.cell.section}, {one.cell.dtype}",
            "cell": one.cell.name,
            "measured": _shown(one.cell, one.cell.value),
            "predicted": _shown(one.cell, one.value),
            "predicted over measured": f"{one.ratio:.2f}" + ("" if one.right else " **off**"),
        }
        for one in found
    ]
    right = sum(one.right for one in found)
    return f"""# What a meta-step costs, by arithmetic

    python -m metasft.plan meta_lora --model llama-3.1-8b --machine h100 --processors 64 meta.num_inner_steps=10

prints, for every size of a task group, what each processor computes, moves, sends and holds in a meta-step, the seconds
that each of these takes, and which group to choose. It needs no GPU and no weights. Data sheets of GPUs count with 40%
of their FLOPs; give what you measured with `--flops`, `--bandwidth` and `--network`. Nothing is assumed to overlap: the
sum is an upper bound.

## Against what was measured

`python benchmarks/predicted.py` compares it with every cell of [performance.md](performance.md). Of a section, three
numbers are fitted, those of the machine; what is tested is whether the arithmetic orders and scales its cells.
**{right} of {len(found)} cells are within {TOLERANCE:.0%}.** The others are of sections that were measured beside other
work, where twice the tokens can take five times as long. GPUs: not measured.

{pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)}
"""


def _shown(cell: Measured, value: float) -> str:
    return f"{value / 2**20:,.0f} MiB" if cell.section == "memory" else f"{value:.2f} s"


def main() -> int:
    """Write the page."""
    docs = ROOT / "docs"
    (docs / "plan.md").write_text(page(json.loads((docs / "performance.json").read_text())), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
