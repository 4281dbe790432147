"""Schemas of settings and files: strict pydantic models, and one sentence for the first value that does not fit.

A field is one line with its type, bounds and meaning; rules over several fields are validators of the model, whose
messages are whole sentences. Nothing is converted: a text that reads like a number is not a number.
"""

from __future__ import annotations

import difflib
import functools
import reprlib
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import (
    AfterValidator,
    AllowInfNan,
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    TypeAdapter,
    ValidationError,
    WrapValidator,
)
from pydantic.fields import FieldInfo
from typing_extensions import is_typeddict

from metasft.files.untrusted import printable, read_json

STRICT = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)
LOC = tuple[int | str, ...]
T = TypeVar("T")

_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxother = _shorten.maxlong = 120
_WORDS = {
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "none_required": "must be null",
    "too_short": "must have at least {min_length} entries",
    **dict.fromkeys(("list_type", "tuple_type"), "must be a list"),
    **dict.fromkeys(("dict_type", "model_type"), "must be a mapping"),
}
"""Pydantic's errors in the words of YAML and JSON, where its own would be those of Python."""


class Schema(BaseModel):
    """A mapping with these keys and no others."""

    model_config = STRICT


class Record(BaseModel):
    """A mapping of which these keys are read; any others are left alone."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)


def rule(holds: Callable[[Any], bool], words: str) -> AfterValidator:
    """For ``Annotated``: a value for which ``holds`` is not true gets the message ``<key>=<value> must be <words>``."""

    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(f"must be {words}")
        return value

    return AfterValidator(check)


def _each_once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if repeated := sorted({value for value in values if values.count(value) > 1}):
        names = ", ".join(printable(str(value)) for value in repeated)
        raise ValueError(f"names {names} more than once; give every one once")
    return values


def _with_names(entries: Any, validate: Callable[[Any], Any]) -> Any:
    if isinstance(entries, Mapping):
        entries = {
            name: {"name": name, **entry} if isinstance(entry, Mapping) else entry for name, entry in entries.items()
        }
    checked = validate(entries)
    if other := [name for name, entry in checked.items() if entry.name != name]:
        raise ValueError(f"has a name in {other[0]}, which is called as its entry is; leave it out")
    return checked


Text = Annotated[str, Field(min_length=1)]
Line = Annotated[str, rule(str.isprintable, "text of one line")]
Share = Annotated[float, Field(ge=0, le=1)]
Number = Annotated[float, Field(ge=0, lt=1e300)]  # what is larger would leave the finite range in the first sum
AnyNumber = Annotated[float, AllowInfNan(True)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Tuple = Strict(False)  # for Annotated: YAML and JSON have lists
Unique = AfterValidator(_each_once)
Named = WrapValidator(_with_names)  # for Annotated mappings of what has a name: that of its entry


def dotted(loc: LOC) -> str:
    """``("runs", "a", "needs", 0)`` as ``runs.a.needs[0]``."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{printable(str(step))}" for step in loc).lstrip(".")


def validated(
    kind: type[T], values: Any, *, where: str = "", name: Callable[[LOC], str] = dotted, context: Any = None
) -> T:
    """``values`` as ``kind``, a model or any other type that pydantic knows.

    Args:
        where: opens the message, such as ``"suite.yaml: "``.
        name: of the place of a value, as the user knows it.
        context: for the validators of ``kind``.

    Raises:
        ValueError: one sentence with key, value and remedy, about the first value that does not fit.
    """
    try:
        return _adapter(kind).validate_python(values, context=context)
    except ValidationError as error:
        raise ValueError(where + explain(error, kind, name)) from None


_adapter: Callable[[Any], TypeAdapter] = functools.cache(TypeAdapter)


def read_checked(path: Path, kind: Any, *, writer: str, remedy: str) -> dict[str, Any]:
    """The object in a JSON file as it is there, once it is known to be a ``kind``.

    Args:
        path: the file, which may have come from elsewhere or been edited.
        kind: as of :func:`validated`.
        writer: the script that writes such files.
        remedy: ends the message, without a full stop.

    Raises:
        ValueError: it cannot be read, or is not what ``writer`` writes.
    """
    content = read_json(path, remedy)
    try:
        validated(kind, content)
    except ValueError as error:
        raise ValueError(f"{path} is not what {writer} writes ({error}): {remedy}") from None
    return content


def explain(error: ValidationError, kind: Any, name: Callable[[LOC], str] = dotted) -> str:
    """The first of the errors that pydantic found in a ``kind``, in one sentence."""
    first = error.errors(include_url=False)[0]
    fault, loc, value, context = first["type"], first["loc"], first["input"], first.get("ctx", {})
    kinds = _kinds(kind, loc)
    of_several = len(kinds) <= len(loc) and members_of(kinds[-1])[1:]
    loc = loc[: len(kinds) - 1] if of_several else loc  # what follows is which of the members was tried
    siblings = fields_of(kinds[len(loc) - 1]) if loc and len(kinds) >= len(loc) else {}
    doc = siblings[loc[-1]].description if loc and loc[-1] in siblings else None
    key = name(loc) or "it"
    given = f"{key}={_shorten.repr(value)}"
    if loc[-1:] == ("[key]",):
        given = f"{name(loc[:-2]) or 'it'} has the key {_shorten.repr(value)}, which"
    if fault == "missing" or (value is None and fault.endswith("_type")):
        return f"{key} is not set; give {doc}" if doc else f"{key} is missing"
    if fault == "extra_forbidden":
        return f"{given} is not known; {hint(loc[-1], siblings, lambda known: name((*loc[:-1], known)))}"
    if of_several and doc:
        return f"{given} must be {doc}"
    if fault == "value_error":
        said = str(context["error"])
        if len(kinds) <= len(loc) or not fields_of(kinds[-1]):
            return f"{given} {said}"
        return said if said.startswith(name(loc)) else f"{name(loc)}: {said}"
    numbers = {name: f"{bound:g}" if isinstance(bound, float) else bound for name, bound in context.items()}
    words = _WORDS[fault].format(**numbers) if fault in _WORDS else first["msg"].replace("Input should", "must")
    return f"{given} {words}{f' ({doc})' if doc else ''}"


def hint(word: Any, known: Iterable[str], name: Callable[[str], str] = str) -> str:
    """What may have been meant, or what there is."""
    close = difflib.get_close_matches(str(word), known, n=1)
    return f"did you mean {name(close[0])}?" if close else f"choose from {', '.join(known)}"


def fields_of(kind: Any) -> Mapping[Any, Any]:
    """Key -> pydantic's description of a field, of a model or TypedDict; empty for any other type."""
    if is_typeddict(kind):
        return {name: FieldInfo.from_annotation(one) for name, one in get_type_hints(kind, include_extras=True).items()}
    return {field.alias or name: field for name, field in getattr(kind, "__pydantic_fields__", {}).items()}


def members_of(kind: Any) -> list[Any]:
    """The types that a value may have: one, but for unions; null aside."""
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) not in (Union, types.UnionType):
        return [kind]
    return [member for one in get_args(kind) if one is not types.NoneType for member in members_of(one)]


def _kinds(kind: Any, loc: LOC) -> list[Any]:
    """The type of the whole and of what each step of ``loc`` leads to, as far as they are known."""
    kinds = [kind]
    for step in loc:
        (kind, *others), fields = members_of(kind), fields_of(members_of(kind)[0])
        inner = [one for one in get_args(kind) if one is not Ellipsis]
        if others or (step not in fields and not inner):
            return kinds
        kind = fields[step].annotation if step in fields else inner[-1]
        kinds.append(kind if len(members_of(kind)) > 1 else members_of(kind)[0])
    return kinds
