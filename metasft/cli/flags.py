"""Flags of a command from the fields of its settings, a dataclass whose annotations carry help and bounds."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo

from metasft.cli.errors import ArgumentParser
from metasft.config.schema import members_of


def parser_of(settings: Any, description: str | None = None, names: Mapping[str, str] | None = None) -> ArgumentParser:
    """A flag for every field: of a boolean that is on by default, the one that turns it off.

    Args:
        settings: the dataclass; a field without a default is a required flag.
        names: field -> flag, where it is not called after the field.
    """
    command = ArgumentParser(description=description)
    kinds = get_type_hints(settings, include_extras=True)
    # Required flags first: a dataclass that extends another has its own behind those of that one.
    for field in sorted(fields(settings), key=lambda field: field.default is not MISSING):
        told = FieldInfo.from_annotation(kinds[field.name]).description or ""
        default = None if field.default is MISSING else field.default
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        flag: dict[str, Any] = {
            "dest": field.name,
            "default": default,
            "required": field.default is MISSING,
            "help": f"{told} (default: {shown})" if shown not in (None, "", False) else told,
        }
        (inner,) = members_of(kinds[field.name])
        if inner is bool:
            flag["action"] = argparse.BooleanOptionalAction if default else "store_true"
        elif get_origin(inner) is tuple:
            flag |= {"nargs": "+", "type": members_of(get_args(inner)[0])[0]}
        elif get_origin(inner) is Literal:
            flag["choices"] = get_args(inner)
        else:
            flag["type"] = inner
        command.add_argument((names or {}).get(field.name) or f"--{field.name.replace('_', '-')}", **flag)
    return command


def given_flags(command: ArgumentParser, argv: Sequence[str] | None) -> dict[str, Any]:
    """Field -> value, with lists as tuples."""
    values = vars(command.parse_args(argv))
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
