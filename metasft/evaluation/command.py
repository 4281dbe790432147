"""The flags of ``evaluate_few_shot.py``, and what it does with them."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path

from metasft.cli.errors import ArgumentParser, report_error
from metasft.data.unseen_tasks import FOLDERS
from metasft.evaluation.evaluate import evaluate
from metasft.evaluation.protocol import DTYPES, MODEL_TYPES, SEARCH_GRID, EvaluationConfig
from metasft.reporting.tables import results_text


def parser(description: str | None = None) -> ArgumentParser:
    command = ArgumentParser(description=description)
    add = command.add_argument
    add("--model-path", required=True, help="model folder, adapter (.pt or PEFT folder) or veRL checkpoint folder")
    add("--model-type", required=True, choices=MODEL_TYPES, help="what it is; names the result files")
    add("--output-dir", required=True, type=Path, help="folder for the result files")
    add(
        "--split",
        choices=FOLDERS,
        help="tasks of DATA_DIR/meta_test, or of DATA_DIR/meta_valid by their role (default: %(default)s)",
    )
    add(
        "--eval-tasks",
        nargs="+",
        metavar="TASK",
        help="tasks of the split (default: all); those of meta_train are tested in-domain",
    )
    add("--n-shots", nargs="+", type=int, metavar="N", help="shot counts (default: 0 5 10 25 50)")
    add("--base-model", help="model under an adapter (default: what the checkpoint records)")
    add("--data-dir", type=Path, help="data folder (default: %(default)s)")
    add("--n-runs", type=int, help="shot sets per task and N (default: %(default)s)")
    add(
        "--adaptation-steps",
        type=int,
        help="update steps of one adaptation, the same for every N (default: %(default)s)",
    )
    add(
        "--adaptation-lr",
        type=float,
        help="learning rate (default: what the checkpoint records, else 1e-3 for LoRA, 1e-5 for all parameters)",
    )
    add("--adaptation-optimizer", choices=("sgd", "adamw"), help="(default: what the checkpoint records, else adamw)")
    add(
        "--adaptation-batch-size",
        type=int,
        help="examples per update step, N if there are fewer (default: %(default)s)",
    )
    add("--batch-size", type=int, help="rows generated together, over all cells of a batch (default: %(default)s)")
    add(
        "--cells-per-batch",
        type=int,
        metavar="N",
        help="LoRA adaptations done and tested together, results unchanged; 1 = one at a time (default: automatic)",
    )
    add(
        "--search-adaptation",
        action="store_true",
        help="choose optimizer and learning rate for every shot count, from one grid, on the tasks of --split search; "
        "where there are none, on held-out items of the training tasks",
    )
    add(
        "--adaptation-settings",
        metavar="FILE",
        help="the <model-type>_search.json of another evaluation: adapt with what it chose for every shot count",
    )
    add(
        "--search-grid",
        nargs="+",
        metavar="OPTIMIZER:RATE",
        help=f"what it chooses from (default: {' '.join(SEARCH_GRID)})",
    )
    add(
        "--search-steps",
        nargs="+",
        type=int,
        metavar="S",
        help="numbers of update steps to choose from as well (default: --adaptation-steps)",
    )
    add("--search-limit", type=int, help="test items per task of that search (default: %(default)s)")
    add("--full", action="store_true", help="with --model-type base: adapt all parameters in place of a fresh LoRA")
    add("--shots-in-prompt", action="store_true", help="in-context: the shots are earlier turns, nothing is adapted")
    add(
        "--speed-steps",
        nargs="+",
        type=int,
        metavar="S",
        help="also measure after S update steps, such as 0 1 2 5 10 20 (<model-type>_speed.json)",
    )
    add("--speed-shots", type=int, help="shots of the speed curve (default: %(default)s)")
    add("--speed-only", action="store_true", help="measure the speed curve alone")
    add("--max-new-tokens", type=int, help="per answer (default: %(default)s)")
    add("--limit", type=int, help="use the first LIMIT test items of each task (default: all)")
    add("--seed", type=int, help="of shots and fresh LoRA weights (default: %(default)s)")
    add("--device", help="auto, cpu, cuda or cuda:<index> (default: %(default)s)")
    add("--dtype", choices=DTYPES, help="of frozen weights (default: %(default)s)")
    add("--max-length", type=int, help="longest example in tokens (default: %(default)s)")
    add(
        "--chat-template",
        metavar="FILE",
        help="file with a Jinja text, or the text (default: what the checkpoint records, else the model's own)",
    )
    add(
        "--chat-template-kwargs",
        metavar="JSON",
        help="arguments of the template, such as '{\"enable_thinking\": false}' (default: what the checkpoint records)",
    )
    add("--lora-rank", type=int, help="rank of the fresh LoRA that --model-type base adapts (default: 16)")
    add("--lora-alpha", type=float, help="scale of that LoRA (default: 32)")
    add("--overwrite", action="store_true", help="drop earlier results of this model type in the output folder")
    command.set_defaults(**{f.name: f.default for f in fields(EvaluationConfig) if f.default is not MISSING})
    return command


def main(argv: list[str] | None = None, description: str | None = None) -> int:
    """Returns the exit code: 0, or 2 after a one-line message on stderr when a setting or file is unusable."""
    values = vars(parser(description).parse_args(argv))
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    try:
        results, stores = evaluate(EvaluationConfig(**values))
    except (ValueError, OSError) as error:
        return report_error(error)
    if results:
        print(results_text(results))
    for store in stores:
        print(f"wrote {store.results_path}, {store.settings_path.name} and {store.predictions_path.name}")
    return 0
