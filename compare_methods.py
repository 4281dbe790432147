"""Compare methods from measured results: accuracy, training time, peak memory, checkpoint size.

    python compare_methods.py --results-dir results --checkpoints-dir checkpoints
    python compare_methods.py --results base=results/base meta_lora=results/meta_lora \
        --summaries meta_lora=checkpoints/meta_lora/run_summary.json

draws the few-shot curves, the costs of training and the trade-off between them, and writes the numbers as a table.

    python compare_methods.py --paired results/meta_lora results/fomaml --margin 0.03

compares two methods item by item: differences with 95% intervals, p-values, and whether the accuracies are equivalent
within the margin; as JSON and as a table (metasft/reporting/statistics.py says how it is judged).

    python compare_methods.py --speed --results-dir results

draws accuracy and loss against the update steps of the adaptation, from the <model type>_speed.json files.

    python compare_methods.py --rates checkpoints/meta_lora/adapter_step_3000

draws the inner rates that a training with meta.learned_inner_lr has learned, layer by layer and step by step.

    python compare_methods.py --report results/experiments/cpu

writes the comparison report of what run_experiments.py ran, as one folder of Markdown, HTML, JSON and plots.
"""

import sys

from metasft.cli.requirements import require

require("matplotlib", "scipy", "pandas", "jinja2", "pydantic")

from metasft.reporting.command import main  # noqa: E402  (after the check above)

if __name__ == "__main__":
    sys.exit(main(description=__doc__))
