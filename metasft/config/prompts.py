"""What turns a conversation into a prompt: a chat template and its arguments, the same in training and in evaluation.

A template that prints the day's date (``strftime_now``, or ``date_string`` in Llama 3) prints a fixed one, so that a
run today and a run tomorrow see the same prompts. Imports neither torch nor veRL.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import partial
from typing import Any, NamedTuple

from metasft.config.verl_groups import TEMPLATE_ARGUMENTS
from metasft.files.paths import user_path
from metasft.files.untrusted import printable, read_template

DATE_ARGUMENT = "date_string"
DEFAULT_DATE = "26 Jul 2024"
"""What Llama 3 prints where it knows no other."""
_DATE_FORMAT = "%d %b %Y"
_TODAY = "strftime_now"
"""What transformers gives templates to look at the clock with."""


class Prompts(NamedTuple):
    """How conversations are rendered.

    Attributes:
        template: the chat template, a Jinja text.
        arguments: plain values that the template reads, the date among them where it prints one.
    """

    template: str
    arguments: dict[str, Any]

    @classmethod
    def of(cls, renderer: Any, data_config: Mapping[str, Any]) -> Prompts:
        """By the template of a tokenizer or processor, with the arguments in veRL's group ``data``."""
        template = renderer.chat_template
        if not isinstance(template, str):  # several by name, or none
            template = (template or {}).get("default", "")
        given = {DATE_ARGUMENT: DEFAULT_DATE, **given_arguments(data_config)}
        return cls(template, {name: given[name] for name in _read(template, given)})

    @property
    def keywords(self) -> dict[str, Any]:
        """For ``apply_chat_template``: the arguments, and a clock that stands still for a template that reads one."""
        if not _mentions(self.template, _TODAY):
            return dict(self.arguments)
        return {**self.arguments, _TODAY: partial(_strftime, self.arguments[DATE_ARGUMENT])}

    @property
    def sha256(self) -> str:
        """Of the template, hexadecimal."""
        return hashlib.sha256(self.template.encode()).hexdigest()


def given_arguments(data_config: Mapping[str, Any]) -> dict[str, Any]:
    """Template arguments that the group ``data`` sets: ``apply_chat_template_kwargs``, ``enable_thinking_default``."""
    from omegaconf import OmegaConf

    given = data_config.get("apply_chat_template_kwargs") or {}
    plain: Any = OmegaConf.to_container(given, resolve=True) if OmegaConf.is_config(given) else given
    given = dict(plain)
    thinking = data_config.get("enable_thinking_default")
    # veRL's own default is the text "none", which its dataset takes for true, whatever the arguments say.
    return given if thinking in (None, "none") else {**given, "enable_thinking": thinking}


def check_arguments(template: str, given: Mapping[str, Any], setting: str) -> None:
    """Raise ValueError, naming ``setting``, where a template does not read an argument; a date does no harm."""
    unread = set(given) - {*_read(template, given), DATE_ARGUMENT}
    if unread:
        raise ValueError(
            f"{setting} names {printable(min(unread))}, which the chat template does not read; correct the name, or "
            "leave it out"
        )


def _read(template: str, names: Iterable[str]) -> list[str]:
    dated = (DATE_ARGUMENT,) if _mentions(template, _TODAY) else ()
    return [name for name in names if name in dated or _mentions(template, name)]


def _mentions(template: str, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", template) is not None


def _strftime(date: str, form: str) -> str:
    try:
        return datetime.strptime(date, _DATE_FORMAT).strftime(form)
    except (TypeError, ValueError):
        raise ValueError(f"{DATE_ARGUMENT}={date!r} is no date such as {DEFAULT_DATE}") from None


# ---- flags ----------------------------------------------------------------------------------------------------------


def chosen_template(value: str, flag: str) -> str:
    """The template that a flag gives, as a Jinja text or as the path of a file with one.

    Raises:
        ValueError: it cannot be read.
    """
    if "{" in value:
        return value
    path = user_path(value)
    if not path.exists():
        raise ValueError(f"{flag} is {value}, which does not exist: give a file with a Jinja text, or the text")
    return read_template(path, f"give {flag} another file")


def chosen_arguments(value: str, flag: str) -> dict[str, Any]:
    """The template arguments that a flag gives as a JSON object.

    Raises:
        ValueError: it is something else, or names what a template gets from elsewhere.
    """
    try:
        arguments = json.loads(value)
    except (ValueError, RecursionError):
        arguments = None
    if not are_arguments(arguments):
        raise ValueError(
            f"{flag} is {value!r}: give a JSON object, such as '{{\"enable_thinking\": false}}', with "
            f"none of the names {', '.join(TEMPLATE_ARGUMENTS)}"
        )
    return arguments


def are_arguments(value: Any) -> bool:
    """Whether a value out of a file can be template arguments."""
    return isinstance(value, dict) and all(isinstance(n, str) and n not in TEMPLATE_ARGUMENTS for n in value)
