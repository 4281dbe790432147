"""Settings of the meta-learners, by successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943).

    python benchmarks/sweep.py data/experiments/sweeps/rules.yaml --scale cpu --rungs 10 20 40 --output results/sweep

The file is a suite: its arms are the candidates. A rung trains every candidate that is left to so many meta-steps,
going on from the rung before, and keeps the better half by the loss after adaptation on the validation tasks
(``valid/loss`` of ``trainer.test_freq``). Two runs at a time (``--workers``), one thread each. Started again, it
continues: what is trained is not trained again. Writes ``sweep.json`` and prints the table.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from metasft.experiments.plan import Plan, make_plan
from metasft.experiments.suites import ROOT, Scale, Suite, read_scale, read_suites
from metasft.files.atomic import write_json

VALID = "valid/loss"


def plan_rung(suite: Suite, scale: Scale, output: Path, arms: Sequence[str], steps: int) -> Plan:
    """The runs that train ``arms`` to ``steps`` meta-steps, and measure there."""
    more = {"trainer.total_training_steps": steps, "trainer.test_freq": steps}
    kept = {name: suite.arms[name].model_copy(update={"overrides": suite.arms[name].overrides | more}) for name in arms}
    return make_plan([suite.model_copy(update={"arms": kept, "comparisons": ()})], scale, output)


def train(command: Sequence[str], folder: Path, steps: int) -> dict[str, Any] | None:
    """Run a trainer to ``steps`` unless it is there already; its metrics of that meta-step, None where it failed."""
    metrics = folder / "metrics.jsonl"
    if not (found := _line(metrics, steps)):
        folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
        with (folder / "log.txt").open("a") as log:
            subprocess.run([sys.executable, *command[1:]], cwd=ROOT, env=environment, stdout=log, stderr=log)
        found = _line(metrics, steps)
    return found


def _line(metrics: Path, step: int) -> dict[str, Any] | None:
    lines = map(json.loads, metrics.read_text().splitlines()) if metrics.is_file() else ()
    return next((line for line in lines if line["step"] == step and VALID in line), None)


def halve(suite: Suite, scale: Scale, output: Path, rungs: Sequence[int], workers: int) -> list[dict[str, Any]]:
    """One entry per candidate and rung: arm, meta-steps, seed, loss (nats per response token; None where it failed)."""
    entries: list[dict[str, Any]] = []
    left = list(suite.arms)
    for steps in rungs:
        plan = plan_rung(suite, scale, output, left, steps)
        for run in (run for run in plan.runs.values() if run.kind in ("data", "model")):
            if not all((ROOT / file).exists() for file in run.results):
                subprocess.run([sys.executable, *run.command[1:]], cwd=ROOT, check=True)
        jobs = [(name, replicate) for name in left for replicate in plan.arms[name].replicates]
        bar = tqdm(total=len(jobs), desc=f"{len(left)} candidates to {steps} meta-steps", unit="run")
        with ThreadPoolExecutor(workers) as pool, bar:

            def one(job: Any, plan: Plan = plan, steps: int = steps, bar: Any = bar) -> dict[str, Any]:
                name, replicate = job
                run = plan.runs[replicate.train]
                found = train(run.command, ROOT / output / "runs" / run.name, steps) or {}
                bar.update()
                loss = found.get(VALID)
                return {"arm": name, "meta_steps": steps, "seed": replicate.seed, "loss": loss, "metrics": found}

            measured = list(pool.map(one, jobs))
        entries += measured
        write_json(ROOT / output / "sweep.json", {"suite": suite.name, "scale": scale.name, "entries": entries})
        means = {name: mean_loss(measured, name) for name in left}
        print(f"| after {steps} meta-steps | {VALID} |\n|---|---:|")
        ranked = sorted(left, key=means.__getitem__)
        print("\n".join(f"| {suite.arms[name].label} | {means[name]:.3f} |" for name in ranked))
        left = ranked[: math.ceil(len(ranked) / 2)]
    return entries


def mean_loss(entries: Sequence[dict[str, Any]], arm: str) -> float:
    """Over seeds; infinite where a run failed or its loss is not finite, so that it is never kept before another."""
    losses = [entry["loss"] for entry in entries if entry["arm"] == arm]
    return sum(losses) / len(losses) if all(isinstance(x, float) and math.isfinite(x) for x in losses) else math.inf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", help="YAML file whose arms are the candidates")
    parser.add_argument("--scale", default="cpu", help="name or path (default: %(default)s)")
    parser.add_argument("--model", help="folder or hub name (default: that of the scale)")
    parser.add_argument("--rungs", nargs="+", type=int, required=True, metavar="STEPS", help="meta-steps, ascending")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="(default: those of the scale)")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="folder for the runs and sweep.json")
    arguments = parser.parse_args()
    (suite,) = read_suites([arguments.suite])
    scale = read_scale(arguments.scale)
    given = {"model": arguments.model, "seeds": arguments.seeds and tuple(arguments.seeds)}
    scale = scale.model_copy(update={key: value for key, value in given.items() if value})
    halve(suite, scale, arguments.output, sorted(arguments.rungs), arguments.workers)


if __name__ == "__main__":
    main()
