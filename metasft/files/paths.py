"""Paths as users write them."""

from __future__ import annotations

from pathlib import Path


def user_path(text: str | Path, *, resolve: bool = False) -> Path:
    """A path as a user writes it, with ``~`` for a home; with ``resolve`` absolute, and its links followed.

    Raises:
        ValueError: there is no such home, or a link in it leads back to itself.
    """
    try:
        path = Path(text).expanduser()
        return path.resolve() if resolve else path
    except RuntimeError as error:
        raise ValueError(f"{text} leads nowhere ({error}): give another path") from error
