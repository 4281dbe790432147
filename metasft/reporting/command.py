"""The flags of ``compare_methods.py``, and what it does with them."""

from __future__ import annotations

import argparse
import glob
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from metasft.cli.errors import ArgumentParser, report_error
from metasft.config.result_files import RESULTS_SUFFIX, SUMMARY_FILE, find_files, find_results

# Flag -> default, per way of use. A flag of another way is an error, so that none is ignored in silence.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "overview": {
        "results": None,
        "results_dir": Path("results"),
        "summaries": [],
        "checkpoints_dir": Path("checkpoints"),
        "task": None,
        "shots": None,
        "output": Path("results/comparison_meta_lora_vs_fomaml.png"),
        "table": Path("results/comparison.md"),
    },
    "paired": {"margin": 0.03, "allow_different_protocol": False, "output": None, "table": None},
    "speed": {
        "results": None,
        "results_dir": Path("results"),
        "task": None,
        "output": Path("results/adaptation_speed.png"),
    },
    "rates": {"output": Path("results/inner_rates.png")},
    "report": {"output": None, "comparison_figure": Path("results/comparison_meta_lora_vs_fomaml.png")},
}


def parser(description: str | None = None) -> ArgumentParser:
    command = ArgumentParser(description=description)
    add = command.add_argument
    way = command.add_mutually_exclusive_group()
    way.add_argument("--paired", nargs=2, metavar=("A", "B"), help="result folders, or label=folder: A minus B")
    way.add_argument("--speed", action="store_true", help="draw the adaptation speed")
    way.add_argument("--rates", type=Path, metavar="FOLDER", help="draw the learned inner rates of an exported folder")
    way.add_argument("--report", type=Path, metavar="FOLDER", help="report on the folder that run_experiments.py wrote")
    add("--results", nargs="+", metavar="LABEL=PATH", help="result folders or files (default: all in --results-dir)")
    add("--results-dir", type=Path, help="(default: results)")
    add("--summaries", nargs="+", metavar="LABEL=PATH", help="run_summary.json of a method's training")
    add(
        "--checkpoints-dir",
        type=Path,
        help="where summaries of methods without --summaries are looked up (default: checkpoints)",
    )
    add("--task", help="task of the learning curve, all for the mean (default: calculus, else all)")
    add("--shots", type=int, help="shots in the third panel (default: 10, else the largest)")
    add("--margin", type=float, help="of equivalence, with --paired: a fraction of accuracy (default: 0.03)")
    add(
        "--allow-different-protocol",
        action="store_true",
        default=None,
        help="with --paired: compare although the adaptations were done differently",
    )
    add(
        "--output",
        type=Path,
        help="figure (default: results/comparison_meta_lora_vs_fomaml.png; --speed: results/adaptation_speed.png; "
        "--rates: results/inner_rates.png), or JSON file (--paired: results/paired_<A>_<B>.json), or folder (--report: "
        "<FOLDER>/report)",
    )
    add("--table", type=Path, help="Markdown (default: results/comparison.md; --paired: results/paired_<A>_<B>.md)")
    add(
        "--comparison-figure",
        type=Path,
        help="with --report: where the overview figure goes too (default: results/comparison_meta_lora_vs_fomaml.png)",
    )
    return command


def _settings(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """(way of use, its flags with their defaults filled in)."""
    ways = {"paired": options.paired, "speed": options.speed, "rates": options.rates, "report": options.report}
    way = next((name for name, asked in ways.items() if asked), "overview")
    given = {k: v for k, v in vars(options).items() if k not in ways and v is not None}
    foreign = [key for key in given if key not in _DEFAULTS[way]]
    if foreign:
        flag = f"--{foreign[0].replace('_', '-')}"
        with_way = "without --paired" if way == "overview" else f"with --{way}"
        raise ValueError(f"{flag} has no meaning {with_way}: leave it out")
    return way, {**_DEFAULTS[way], **given}


def _check_targets(read: Iterable[Path], **targets: Path) -> None:
    """Raise ValueError where two flags name one file, or one names a file of the evaluations or trainings compared."""
    taken = {os.path.realpath(path): "one of the files compared" for path in read}
    for name, path in targets.items():
        place = os.path.realpath(path)
        if place in taken:
            raise ValueError(f"--{name} is {path}, which is {taken[place]}: give another file")
        taken[place] = f"the file of --{name} too"


def _files_of(results: Path, suffix: str) -> list[Path]:
    """What an evaluation left, given as its file or as the folder that holds it."""
    if results.is_dir():
        return list(results.iterdir())
    return list(results.parent.glob(f"{glob.escape(results.name.removesuffix(suffix))}_*"))


def _write(path: Path, text: str, flag: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{flag} is {path}, which cannot be written ({error}): give another") from error


def _overview(options: argparse.Namespace) -> None:
    from metasft.reporting import compare, figures

    given = options.results
    pairs = find_results(options.results_dir) if given is None else compare.parse_pairs(given, "--results")
    summaries = compare.parse_pairs(options.summaries, "--summaries")
    read = [file for path in pairs.values() for file in _files_of(path, RESULTS_SUFFIX)]
    read += [*summaries.values(), *options.checkpoints_dir.glob(f"*/{SUMMARY_FILE}")]
    _check_targets(read, output=options.output, table=options.table)
    methods = [compare.read_method(label, path) for label, path in pairs.items()]
    compare.match_summaries(methods, summaries, options.checkpoints_dir)
    figures.save(compare.overview_figure(methods, options.task, options.shots), options.output)
    page = compare.overview_page(methods)
    _write(options.table, page, "--table")
    print(page)
    for caveat in compare.caveats(methods):
        print(f"note: {caveat}", file=sys.stderr)
    print(f"wrote {options.output} and {options.table}")


def _paired(sides: list[str], options: argparse.Namespace) -> None:
    import json

    from metasft.reporting import compare
    from metasft.reporting.evaluations import read_evaluation

    (a_label, a_path), (b_label, b_path) = (compare.parse_side(side) for side in sides)
    if a_label == b_label:
        raise ValueError(f"--paired has two sides named {a_label}: name them, such as one={a_path} other={b_path}")
    a, b = read_evaluation(a_label, a_path), read_evaluation(b_label, b_path)
    different = bool(options.allow_different_protocol)
    found, page = compare.paired(a, b, margin=options.margin, allow_different_protocol=different)
    stem = f"paired_{a_label}_{b_label}".replace("/", "-")
    output, table = options.output or Path(f"results/{stem}.json"), options.table or Path(f"results/{stem}.md")
    read = [file for path in (a.path, b.path) for file in _files_of(path, RESULTS_SUFFIX)]
    _check_targets(read, output=output, table=table)
    _write(output, json.dumps(found, indent=2, ensure_ascii=False) + "\n", "--output")
    _write(table, page, "--table")
    print(page)
    print(f"wrote {output} and {table}")


def _speed(options: argparse.Namespace) -> None:
    from metasft.reporting import compare, figures
    from metasft.reporting.evaluations import SPEED_SUFFIX

    if options.results is None:
        pairs = find_files(options.results_dir, SPEED_SUFFIX, compare.SPEED_REMEDY)
    else:
        pairs = compare.parse_pairs(options.results, "--results")
    read = [file for path in pairs.values() for file in _files_of(path, SPEED_SUFFIX)]
    _check_targets(read, output=options.output)
    methods = [compare.read_speed(label, path) for label, path in pairs.items()]
    figures.save(compare.speed_figure(methods, options.task), options.output)
    print(f"wrote {options.output}")


def _rates(folder: Path, options: argparse.Namespace) -> None:
    from metasft.reporting import figures
    from metasft.reporting.exports import RATES_FILES, read_rates

    _check_targets([folder / name for name in RATES_FILES], output=options.output)
    figures.save(figures.rates(read_rates(folder)), options.output)
    print(f"wrote {options.output}")


def _report(folder: Path, options: argparse.Namespace) -> None:
    from metasft.reporting.report import COMPARISON_FIGURE, write_report

    report = write_report(folder, options.output)
    figure = report / COMPARISON_FIGURE
    if figure.is_file():
        try:
            options.comparison_figure.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(figure, options.comparison_figure)
        except OSError as error:
            flag = f"--comparison-figure is {options.comparison_figure}"
            raise ValueError(f"{flag}, which cannot be written ({error}): give another") from error
    print(f"wrote {report / 'index.html'}, report.md and report.json")


def main(argv: list[str] | None = None, description: str | None = None) -> int:
    """Returns the exit code: 0, or 2 after a one-line message on stderr when a setting or file is unusable."""
    options = parser(description).parse_args(argv)
    try:
        way, settings = _settings(options)
        if way == "paired":
            _paired(options.paired, argparse.Namespace(**settings))
        elif way == "speed":
            _speed(argparse.Namespace(**settings))
        elif way == "rates":
            _rates(options.rates, argparse.Namespace(**settings))
        elif way == "report":
            _report(options.report, argparse.Namespace(**settings))
        else:
            _overview(argparse.Namespace(**settings))
    except (ValueError, OSError) as error:
        return report_error(error)
    return 0
