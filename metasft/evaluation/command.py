"""The flags of ``evaluate_few_shot.py``, and what it does with them."""

from __future__ import annotations

from metasft.cli.errors import report_error
from metasft.cli.flags import given_flags, parser_of
from metasft.evaluation.evaluate import evaluate
from metasft.evaluation.protocol import EvaluationConfig
from metasft.reporting.tables import results_text


def main(argv: list[str] | None = None, description: str | None = None) -> int:
    """Returns the exit code: 0, or 2 after a one-line message on stderr when a setting or file is unusable."""
    values = given_flags(parser_of(EvaluationConfig, description), argv)
    try:
        results, stores = evaluate(EvaluationConfig(**values))
    except (ValueError, OSError) as error:
        return report_error(error)
    if results:
        print(results_text(results))
    for store in stores:
        print(f"wrote {store.results_path}, {store.settings_path.name} and {store.predictions_path.name}")
    return 0
