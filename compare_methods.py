"""Compare methods from measured results: accuracy, training time, peak memory, checkpoint size.

    python compare_methods.py --results-dir results --checkpoints-dir checkpoints
    python compare_methods.py --results base=results/base meta_lora=results/meta_lora \
        --summaries meta_lora=checkpoints/meta_lora/run_summary.json

Draws the few-shot curves, the costs of training and the trade-off between them, and writes the numbers as a table.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from metasft.installed import require
from metasft.report import (
    ALL_TASKS,
    choose_shots,
    choose_tasks,
    differences,
    draw_comparison,
    find_results,
    markdown_table,
    match_summaries,
    parse_pairs,
    read_method,
    save_figure,
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--results", nargs="+", metavar="LABEL=PATH", help="result folders or files (default: all in --results-dir)")
    add("--results-dir", type=Path, default=Path("results"), help="(default: %(default)s)")
    add("--summaries", nargs="+", default=[], metavar="LABEL=PATH", help="run_summary.json of a method's training")
    add(
        "--checkpoints-dir",
        type=Path,
        default=Path("checkpoints"),
        help="where summaries of methods without --summaries are looked up (default: %(default)s)",
    )
    add("--task", help=f"task of the learning curve, {ALL_TASKS} for the mean (default: calculus, else {ALL_TASKS})")
    add("--shots", type=int, help="shots in the third panel (default: 10, else the largest)")
    add(
        "--output", type=Path, default=Path("results/comparison_meta_lora_vs_fomaml.png"), help="(default: %(default)s)"
    )
    add("--table", type=Path, default=Path("results/comparison.md"), help="(default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after a one-line message on stderr when a setting or file is unusable."""
    options = _parser().parse_args(argv)
    try:
        pairs = (
            find_results(options.results_dir) if options.results is None else parse_pairs(options.results, "--results")
        )
        methods = [read_method(label, path) for label, path in pairs.items()]
        methods = match_summaries(methods, parse_pairs(options.summaries, "--summaries"), options.checkpoints_dir)
        tasks, shots = choose_tasks(methods, options.task), choose_shots(methods, options.shots)
        save_figure(draw_comparison(methods, tasks=tasks, shots=shots), options.output)
        table = markdown_table(methods)
        try:
            options.table.parent.mkdir(parents=True, exist_ok=True)
            options.table.write_text(table, encoding="utf-8")
        except OSError as error:
            raise ValueError(f"--table is {options.table}, which cannot be written ({error}): give another") from error
    except ValueError as error:
        print(f"compare_methods: {error}", file=sys.stderr)
        return 2
    print(table)
    for note in differences(methods):
        print(f"note: {note}", file=sys.stderr)
    print(f"wrote {options.output} and {options.table}")
    return 0


if __name__ == "__main__":
    require("matplotlib", "scipy")
    sys.exit(main())
