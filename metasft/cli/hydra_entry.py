"""Hydra's entry point: what is wrong with a command line or a YAML file in one line, as everywhere."""

from __future__ import annotations

import difflib
import functools
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from metasft.cli.errors import one_line, report_error_on_rank_0
from metasft.config.training import GROUPS, METHOD_TITLES, MetaConfig

CONFIGS = (Path(__file__).parents[1] / "shipped" / "math_science_meta").resolve()
"""Folder of the shipped configurations, in a clone and in an installed package."""


def hydra_main(*, config_name: str) -> Callable[[Callable[[Any], None]], Callable[[], None]]:
    """:func:`hydra.main` on a shipped configuration, except that one which cannot be composed ends in one line and exit
    code 2, where Hydra prints several lines and leaves with 1. Errors of the run itself come through as they are.
    """

    def decorate(task: Callable[[Any], None]) -> Callable[[], None]:
        composed = False

        @functools.wraps(task)
        def run(config: Any) -> None:
            nonlocal composed
            composed = True
            task(config)

        @functools.wraps(task)
        def main() -> None:
            # Otherwise Hydra itself reports, and ends the process.
            os.environ.setdefault("HYDRA_FULL_ERROR", "1")
            _check_flags()
            try:
                hydra.main(config_path=str(CONFIGS), config_name=config_name, version_base=None)(run)()
            except (HydraException, OmegaConfBaseException, YAMLError, ValueError, OSError) as error:
                if composed:
                    raise
                sys.exit(report_error_on_rank_0(why_not_composed(error)))

        return main

    return decorate


def _check_flags() -> None:
    """Hydra's flags before Hydra reads them: its parser prints the whole usage."""
    parser = get_args_parser()

    def wrong_flag(message: str) -> None:
        sys.exit(report_error_on_rank_0(f"{message}; settings are written key=value, see --help for the flags"))

    parser.error = wrong_flag  # type: ignore[method-assign, assignment]
    parser.parse_args()


def why_not_composed(error: Exception) -> str:
    """What is wrong, and the remedy, for what Hydra, OmegaConf or YAML raised."""
    said = str(error)
    shipped = ", ".join(sorted(path.stem for path in CONFIGS.glob("config_*.yaml")))
    cause = error.__cause__
    if found := re.match(r"Could not override '(?P<key>.+?)'", said):
        key = getattr(cause, "full_key", None) or found["key"]
        return f"{found['key']} cannot be set: {_unknown_key(cause, key)}; the shipped configurations are {shipped}"
    if isinstance(error, OverrideParseException):
        detail = next((line for line in said.splitlines() if not re.match("Error parsing|See https", line)), "")
        return (
            f"{one_line(error.override)!r} is no setting ({detail}); write <key>=<value>, such as "
            "meta.inner_lr=0.05, and quote what the shell would take apart"
        )
    if "Cannot find primary config" in said:
        name = one_line(said.splitlines()[0])
        return f"--config-name: {name.partition('. ')[0]}; {CONFIGS} has {shipped}, --config-path names another folder"
    if "Primary config" in said or "config_path" in said:
        return (
            f"--config-path: {one_line(said)}; it is a folder relative to the script, such as data/math_science_meta, "
            "and --config-name a file in it without .yaml"
        )
    if "Config group override" in said:
        given = [argument for argument in sys.argv[1:] if argument.partition("=")[0].lstrip("+~") in GROUPS]
        return f"{' '.join(given)} cannot be set ({one_line(said)}); set single keys of a group, such as optim.lr=1e-4"
    return f"the configuration cannot be composed: {one_line(said)}; start from one of {shipped} in {CONFIGS}"


def _unknown_key(cause: BaseException | None, key: str) -> str:
    parent = getattr(cause, "parent_node", None)
    name = key.rpartition(".")[2]
    if key == f"meta.{name}" and (setting := MetaConfig.model_fields.get(name)):
        titles = ", ".join(METHOD_TITLES[method] for method in setting.json_schema_extra["methods"])
        return (
            f"it is a setting of {titles} that this configuration leaves out; leave it out too, or write +{key}=<value>"
        )
    known = sorted(map(str, parent.keys())) if isinstance(parent, DictConfig) else []
    if close := difflib.get_close_matches(name, known, n=1):
        return f"there is no {key}, did you mean {key.removesuffix(name)}{close[0]}?"
    listed = f"; known there: {', '.join(known)}" if known else ""
    return f"there is no {key} in this configuration{listed}"
