"""Hydra configurations of the trainers: overrides from the mappings of arms and scales, and the composed whole."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any


def overrides_of(asked: Mapping[str, Any], own: Mapping[str, Any], arm: str) -> tuple[str, ...]:
    """Words of Hydra's command line.

    Args:
        asked: what arm and scale set.
        own: what the runner sets.

    Raises:
        ValueError: ``asked`` has a key of ``own``, or a value that is neither null, a flag, a number, a text nor a list
            of those.
    """
    for key, value in asked.items():
        if key.lstrip("+~") in own:
            raise ValueError(
                f"arm {arm}: {key} is set to {value!r} there or by the scale, but the runner sets it (--model, "
                "--seeds, --output-dir): remove it"
            )
    return tuple(f"{key}={_hydra_value(value, f'{key} of the arm {arm}')}" for key, value in {**asked, **own}.items())


def _hydra_value(value: Any, where: str) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(_hydra_value(item, where) for item in value)}]"
    if not isinstance(value, str):
        raise ValueError(f"{where} is {value!r}: give a number, a text, true, false, null or a list of those")
    if re.fullmatch(r"[A-Za-z/_.~-][\w/.:~-]*", value, re.ASCII) and not _reads_otherwise(value):
        return value
    # Of backslashes, only those before a quote are escapes.
    return "'" + re.sub(r"(\\*)('|\Z)", lambda match: match[1] * 2 + match[2].replace("'", "\\'"), value) + "'"


def _reads_otherwise(text: str) -> bool:
    """Whether Hydra would take it for something else than a text."""
    if text.lower() in ("true", "false", "null"):
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True


@cache
def compose(folder: Path, name: str, overrides: tuple[str, ...], arm: str) -> Mapping[str, Any]:
    """The whole configuration of a trainer as a plain mapping.

    Raises:
        ValueError: Hydra cannot compose it, or a value in it does not resolve.
    """
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(configuration(folder, name, overrides), resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ValueError(
            f"arm {arm}: {_first_sentences(error)}; correct its overrides, or those of the scale"
        ) from error


def configuration(folder: Path, name: str, overrides: Sequence[str] = ()) -> Any:
    """As Hydra composes it, not resolved; the base is composed once per process, the result is the caller's own."""
    return _with_values(_composed(folder, name), overrides) or _compose(folder, name, overrides)


@cache
def _composed(folder: Path, name: str) -> Any:
    return _compose(folder, name)


def _compose(folder: Path, name: str, overrides: Sequence[str] = ()) -> Any:
    from importlib.util import find_spec

    import hydra

    # By its folder: as pkg://verl.trainer.config Hydra would import veRL, and torch with it.
    defaults = Path(find_spec("verl").origin).parent / "trainer" / "config"
    with hydra.initialize_config_dir(str(folder), version_base=None):
        return hydra.compose(name, overrides=[*overrides, f"hydra.searchpath=[file://{defaults}]"])


def _with_values(config: Any, overrides: Sequence[str]) -> Any:
    """A copy of a composed configuration with other values, a tenth of the work of composing it anew; None where
    overrides do more than that, or name something that is not there."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import OverrideType
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    config = copy.deepcopy(config)
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        is_value = "." in override.key_or_group and override.package is None
        if not is_value or override.type is not OverrideType.CHANGE or override.is_sweep_override():
            return None
        try:
            OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
        except OmegaConfBaseException:
            return None
    return config


def _first_sentences(error: Exception) -> str:
    """Hydra's message in one line, without pointers to its manual and to `+key`, which would hide a misspelt key."""
    lines = [line.strip() for line in str(error).splitlines()]
    return "; ".join(
        line for line in lines if line and not line.startswith(("See http", "To append", "full_key", "object_type"))
    )
