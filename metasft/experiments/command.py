"""The flags of ``run_experiments.py``, and what it does with them."""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from metasft.cli.errors import ArgumentParser, report_error
from metasft.experiments.plan import Plan, make_plan, shell_line
from metasft.experiments.runner import run_all
from metasft.experiments.store import ExperimentStore, finished_searches, known_runs, locked
from metasft.experiments.suites import ROOT, check_seeds, read_scale, read_suites
from metasft.files.atomic import check_place
from metasft.files.paths import user_path
from metasft.reporting.report import write_report

_UNUSABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def parser(description: str | None = None) -> ArgumentParser:
    command = ArgumentParser(description=description)
    add = command.add_argument
    add("--suite", nargs="+", default=["matrix"], metavar="SUITE", help="names, paths, or all (default: matrix)")
    add("--scale", default="smoke", help="name or path (default: %(default)s)")
    add("--model", help="folder or hub name (default: that of the scale)")
    add(
        "--seeds",
        nargs="+",
        type=int,
        metavar="SEED",
        help="one replicate of every arm each (default: those of the scale)",
    )
    add("--arms", nargs="+", metavar="ARM", help="run these arms of the suites only")
    add("--output-dir", type=Path, help="(default: results/experiments/<scale>)")
    add("--address", help="of a Ray cluster, such as 10.0.0.1:6379 or auto (default: start Ray here)")
    add("--retry-failed", action="store_true", help="run again what failed, and what was skipped because of it")
    add("--dry-run", action="store_true", help="print the commands, run nothing")
    add("--report-only", action="store_true", help="write the report of what is there, run nothing")
    return command


def main(argv: Sequence[str] | None = None, description: str | None = None) -> int:
    """Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    options = parser(description).parse_args(argv)
    try:
        return _run(options, ["python", "run_experiments.py", *argv])
    except ValueError as error:
        return report_error(error)
    except OSError as error:
        if error.errno not in _UNUSABLE:
            return report_error(error)
        where = error.filename or "--output-dir"
        print(
            f"error: {where} cannot be used ({error.strerror}): make room or give access, the same command "
            "resumes here",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("run_experiments: interrupted; the same command resumes here", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace, command: Sequence[str]) -> int:
    scale = read_scale(options.scale)
    if options.model is not None:
        scale = scale.model_copy(update={"model": _model(options.model)})
    if options.seeds is not None:
        scale = scale.model_copy(update={"seeds": check_seeds(options.seeds)})
    output = _output_folder(options.output_dir or Path("results/experiments") / scale.name)
    if options.report_only:
        return _report(output)
    plan = make_plan(read_suites(options.suite), scale, output, known_runs(output), finished_searches(output))
    selected = plan.needed_by(_chosen_arms(options.arms, plan))
    _print_searches(plan, selected)
    if options.dry_run:
        _print_commands(plan, selected)
        return 0
    try:
        with locked(ROOT / output):
            store = ExperimentStore(plan, command)
            store.open(retry_failed=options.retry_failed)
            run_all(store, selected, address=options.address)
            code = _summary(store, selected)
    except BlockingIOError:
        raise ValueError(
            f"another run_experiments.py works in {output}: wait for it, or give another --output-dir"
        ) from None
    return max(code, _report(output))


def _output_folder(path: Path) -> Path:
    check_place(user_path(path), "--output-dir")
    return _from_root(user_path(path, resolve=True))


def _model(name: str) -> str:
    """A folder as seen from the repository root, where runs are started; a hub name as it is."""
    path = user_path(name)
    return str(_from_root(Path(os.path.abspath(path)))) if path.exists() else name


def _from_root(path: Path) -> Path:
    """Relative to the repository root where it lies inside, so that commands read the same on every machine."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def _chosen_arms(names: Sequence[str] | None, plan: Plan) -> list[str]:
    for name in names or ():
        if name not in plan.arms:
            raise ValueError(f"--arms names {name}, which is in none of the suites: choose from {', '.join(plan.arms)}")
    return list(names or plan.arms)


def _print_searches(plan: Plan, selected: Sequence[str]) -> None:
    needed = {need for name in selected for need in plan.runs[name].needs} | set(selected)
    for model_type, search in plan.searches.items():
        if search.run in needed:
            because = f" ({search.reason})" if search.reason else ""
            print(f"# adaptation of every {model_type} arm: optimizer and rate that {search.run} finds{because}")


def _print_commands(plan: Plan, selected: Sequence[str]) -> None:
    print(f"# in {ROOT}, with {Path(sys.executable).parent} first on the PATH")
    for key, value in plan.scale.environment.items():
        print(f"export {key}={shlex.quote(value)}")
    if not any(plan.runs[name].resources.gpus for name in selected):
        print("export CUDA_VISIBLE_DEVICES=")
    for name in selected:
        print(f"\n# {name}\n{shell_line(plan.runs[name].command)}")


def _summary(store: ExperimentStore, selected: Sequence[str]) -> int:
    records = [(name, store.records[name]) for name in selected]
    states = [record["state"] for _, record in records]
    counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    print(f"\n{len(states)} runs: {counted}")
    for name, record in records:
        if record["state"] == "failed":
            print(f"\n{name} failed:")
            print("\n".join(f"    {line}" for line in (record["error"] or "").splitlines()))
    if "interrupted" in states:
        print("\nthe same command resumes what was interrupted, and runs what waits for it")
    if "failed" in states:
        print("\n--retry-failed runs them again")
    return 0 if set(states) == {"finished"} else 1


def _report(output: Path) -> int:
    print(f"report: {write_report(ROOT / output)}")
    return 0
