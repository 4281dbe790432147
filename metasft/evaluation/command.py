"""The flags of ``evaluate_few_shot.py``, and what it does with them."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Literal, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo

from metasft.cli.errors import ArgumentParser, report_error
from metasft.config.schema import members_of
from metasft.evaluation.evaluate import evaluate
from metasft.evaluation.protocol import EvaluationConfig
from metasft.reporting.tables import results_text


def parser(description: str | None = None) -> ArgumentParser:
    """The flags are the fields of :class:`EvaluationConfig`."""
    command = ArgumentParser(description=description)
    kinds = get_type_hints(EvaluationConfig, include_extras=True)
    for field in fields(EvaluationConfig):
        told = FieldInfo.from_annotation(kinds[field.name]).description or ""
        default = None if field.default is MISSING else field.default
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        flag = {
            "default": default,
            "required": field.default is MISSING,
            "help": f"{told} (default: {shown})" if shown not in (None, "", False) else told,
        }
        (inner,) = members_of(kinds[field.name])
        if inner is bool:
            flag["action"] = "store_true"
        elif get_origin(inner) is tuple:
            flag |= {"nargs": "+", "type": members_of(get_args(inner)[0])[0]}
        elif get_origin(inner) is Literal:
            flag["choices"] = get_args(inner)
        else:
            flag["type"] = inner
        command.add_argument(f"--{field.name.replace('_', '-')}", **flag)
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
