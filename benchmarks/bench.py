"""Measure speed, memory and checkpoint size of the trainers, and write docs/performance.md (JSON beside it).

    python benchmarks/bench.py                                     # all sections, fp32 and bf16: hours on 2 cores
    python benchmarks/bench.py --sections inner_step --dtype fp32  # one section anew, the others stay as they are
    python benchmarks/bench.py --quick                             # a few small cells, to results/bench/
    python benchmarks/bench.py --take-in results/gpu_run           # what benchmarks/gpu_run.py measured on a GPU

Every section runs in a process of its own with a fixed number of threads. Arms are checked to compute the same
meta-gradient, then run in turn (A B, B A, ...); tables give medians, and ratios of medians with the smallest and
largest ratio of one round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if Path(sys.path[0]).resolve() == ROOT / "benchmarks":  # run as a script: its modules are those of a package
    sys.path[0] = str(ROOT)

from benchmarks.arms import Settings  # noqa: E402
from metasft.cli.requirements import require  # noqa: E402
from metasft.config.training import check_model_path  # noqa: E402

SECTION_NAMES = (
    "inner_step",
    "peft_loop",
    "verl_sft",
    "fomaml",
    "update_rule",
    "top_layers",
    "memory",
    "sizes",
    "checkpoint",
    "two_processes",
    "evaluation",
    "adapt",
)
WITHOUT_DTYPE = ("memory", "checkpoint")
"""Sections that fix the dtype of every arm themselves; their entry is kept under ``any``."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sections", nargs="+", choices=SECTION_NAMES, default=list(SECTION_NAMES), help="default: all")
    add("--dtype", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"], help="default: both")
    add("--repeats", type=int, help="timed rounds of all arms (default: 5; 2 with --quick)")
    add("--cell-seconds", type=float, default=120.0, help="no further round after this long (default: %(default)g)")
    add("--test-items", type=int, default=16, metavar="N", help="per cell of the evaluation's grid (default: 16)")
    add(
        "--largest-cell",
        type=int,
        default=16384,
        metavar="TOKENS",
        help="leave out inner steps of more tokens over all tasks (default: %(default)s)",
    )
    add("--model", default="models/SmolLM2-135M-Instruct", help="Hugging Face folder (default: %(default)s)")
    add("--task-dir", default="data/math_science_meta/meta_train", help="meta-training tasks (default: %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda where there is one")
    add("--threads", type=int, default=1, help="per process (default: %(default)s)")
    add("--seed", type=int, default=1, help="of data, episodes and adapters (default: %(default)s)")
    add("--quick", action="store_true", help="a few small cells; no target is judged on them")
    add(
        "--full-pass",
        action="store_true",
        help="also time 100 and 300 support examples directly (10 minutes on 2 cores)",
    )
    add(
        "--deviate",
        metavar="ARM",
        help="change the inner learning rate of ARM by 10%%: the gradient check must then fail",
    )
    add("--output", type=Path, help="Markdown file (default: docs/performance.md; results/bench/ with --quick)")
    instead = parser.add_mutually_exclusive_group().add_argument
    instead("--report-only", action="store_true", help="only write the Markdown again from the JSON beside it")
    instead("--take-in", type=Path, metavar="FOLDER", help="only take in the output of benchmarks/gpu_run.py on a GPU")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    """Raise ValueError for what a measurement cannot use."""
    for flag, value, least in (
        ("--repeats", arguments.repeats, 2),
        ("--threads", arguments.threads, 1),
        ("--seed", arguments.seed, 0),
        ("--largest-cell", arguments.largest_cell, 16),
        ("--test-items", arguments.test_items, 1),
        ("--cell-seconds", arguments.cell_seconds, 0),
    ):
        if value < least:
            raise ValueError(f"{flag} is {value}: use at least {least}")
    for flag, values in (("--sections", arguments.sections), ("--dtype", arguments.dtype)):
        if len(set(values)) != len(values):
            raise ValueError(f"{flag} names something more than once: give every value once")
    if not arguments.output.suffix == ".md":
        raise ValueError(
            f"--output is {arguments.output}: give a file that ends in .md (the JSON is written beside it)"
        )
    if arguments.report_only:
        if not arguments.output.with_suffix(".json").is_file():
            raise ValueError(f"--report-only: {arguments.output.with_suffix('.json')} does not exist: measure first")
        return
    if arguments.take_in is not None:
        return
    check_model_path(arguments.model)
    if not list(Path(arguments.task_dir).glob("*_support.parquet")):
        raise ValueError(
            f"--task-dir is {arguments.task_dir}, which holds no <task>_support.parquet: make the data with "
            "`python prepare_math_science_data.py`"
        )


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0; 2 for an unusable setting; 3 when arms computed different things; 1 otherwise."""
    arguments = _parser().parse_args(argv)
    if arguments.repeats is None:
        arguments.repeats = 2 if arguments.quick else 5
    if arguments.output is None:
        arguments.output = Path("results/bench/performance.md" if arguments.quick else "docs/performance.md")
    from benchmarks.take_in import read_entries
    from metasft.reporting.performance import merge, read, write

    try:
        _check(arguments)
        taken = {} if arguments.take_in is None else read_entries(arguments.take_in)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if arguments.report_only or taken:
        results = read(arguments.output)
        for (section, dtype), entry in taken.items():
            results = merge(results, section, "cuda", dtype, entry)
        write(arguments.output, results)
        if taken:
            print(f"bench: took in {', '.join(' '.join(place) for place in taken)}; wrote {arguments.output}")
        return 0
    require("torch", "verl", "peft", "transformers", "pyarrow")
    try:
        device = _device(arguments.device)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    environment = _environment(arguments.threads, device)
    code = 0
    for section in arguments.sections:
        for dtype in ["any"] if section in WITHOUT_DTYPE else arguments.dtype:
            settings = Settings(
                model=str(Path(arguments.model).resolve()) if Path(arguments.model).exists() else arguments.model,
                task_dir=str(Path(arguments.task_dir).resolve()),
                device=device,
                dtype="fp32" if dtype == "any" else dtype,
                repeats=arguments.repeats,
                largest_cell=arguments.largest_cell,
                test_items=arguments.test_items,
                cell_seconds=arguments.cell_seconds,
                seed=arguments.seed,
                threads=arguments.threads,
                quick=arguments.quick,
                full_pass=arguments.full_pass,
                deviate=arguments.deviate,
            )
            print(f"bench: {section}, {dtype}, {device}", flush=True)
            finished, result = _run_section(section, settings, environment)
            if finished:
                code = max(code, finished if finished in (2, 3) else 1)
                print(f"bench: {section} ({dtype}) was not recorded", file=sys.stderr)
                continue
            entry = {**_circumstances(arguments, device), **result}
            # Written after every section, so that an interrupted run loses one.
            write(arguments.output, merge(read(arguments.output), section, device, dtype, entry))
    if arguments.output.exists():
        print(f"bench: wrote {arguments.output} and {arguments.output.with_suffix('.json').name}")
    return code


def _device(name: str) -> str:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but torch sees no CUDA device: choose cpu")
    return name if name != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")


def _environment(threads: int, device: str) -> dict[str, str]:
    fixed = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    fixed["TOKENIZERS_PARALLELISM"] = "false"
    if device == "cpu":
        fixed |= {"VERL_PLATFORM": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **fixed}


def _run_section(name: str, settings: Settings, environment: dict[str, str]) -> tuple[int, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        job, out = Path(folder) / "settings.json", Path(folder) / "out.json"
        job.write_text(json.dumps(asdict(settings)))
        command = [sys.executable, "-m", "benchmarks.sections", name, str(job), str(out)]
        finished = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=False)
        return finished.returncode, json.loads(out.read_text()) if finished.returncode == 0 else {}


def _circumstances(arguments: argparse.Namespace, device: str) -> dict[str, Any]:
    """Under what a section was measured."""
    from importlib.metadata import version

    import torch

    return {
        "date": date.today().isoformat(),
        "device_name": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": arguments.threads,
        "seed": arguments.seed,
        "repeats": arguments.repeats,
        "quick": arguments.quick,
        "model": Path(arguments.model).name if Path(arguments.model).exists() else arguments.model,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "verl")},
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
