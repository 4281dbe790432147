"""Inner optimizer and learning rate for a trainer: short runs over a grid, ranked by the loss after adaptation.

    python benchmarks/sweep_inner_loop.py meta_lora_trainer.py --steps 6 --output docs/results/sweep_meta_lora.json \
        --set meta.num_inner_steps=5 meta.meta_batch_size=2

Every run is the public script with one setting changed: same seed, same episodes. The figures are means over the last
half of the meta-steps, on query examples that no inner step has seen: `before` at the shared parameters, `after` at the
adapted ones, `gain` their difference.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
GRID = ["sgd:0.01", "sgd:0.03", "sgd:0.1", "sgd:0.3", "sgd:1.0", "adamw:0.0003", "adamw:0.001", "adamw:0.003"]


def run(script: str, optimizer: str, lr: str, steps: int, overrides: list[str], work: Path) -> dict[str, float]:
    """One short run; returns the mean query losses of its last half."""
    folder = work / f"{optimizer}_{lr}"
    command = [sys.executable, str(ROOT / script), f"meta.inner_optimizer={optimizer}", f"meta.inner_lr={lr}"]
    command += [f"trainer.total_training_steps={steps}", f"trainer.default_local_dir={folder}", "trainer.logger=[]"]
    command += ["trainer.resume_mode=disable", "meta.adaptation_gain_freq=1", *overrides]
    finished = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "TQDM_DISABLE": "1"}
    )
    if finished.returncode:
        sys.exit(f"{' '.join(command)}\n{finished.stderr[-2000:]}")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    late = records[len(records) // 2 :]

    def mean(key: str) -> float:
        return sum(record[key] for record in late) / len(late)

    return {
        "optimizer": optimizer,
        "lr": float(lr),
        "before": mean("meta/query_loss_before"),
        "after": mean("meta/query_loss_after"),
        "gain": mean("meta/adaptation_gain"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", help="trainer at the repository root, for example meta_lora_trainer.py")
    parser.add_argument("--grid", nargs="+", default=GRID, metavar="OPTIMIZER:LR", help="settings to try")
    parser.add_argument("--steps", type=int, default=6, help="meta-steps per run")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the table")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides for every run")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for setting in tqdm(arguments.grid, unit="run"):
            optimizer, lr = setting.split(":")
            rows.append(run(arguments.script, optimizer, lr, arguments.steps, arguments.set, Path(work)))
            tqdm.write(json.dumps(rows[-1]))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    settings = {"script": arguments.script, "steps": arguments.steps, "overrides": arguments.set}
    arguments.output.write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")
    print("| inner optimizer | lr | query loss before | after | gain |\n|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: row["after"]):
        print(f"| {row['optimizer']} | {row['lr']:g} | {row['before']:.3f} | {row['after']:.3f} | {row['gain']:.3f} |")


if __name__ == "__main__":
    main()
