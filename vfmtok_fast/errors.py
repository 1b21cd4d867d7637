"""Other people's errors in one line of ours."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def one_line(error: BaseException) -> str:
    """All of an error's message as one line, or its type."""
    return " ".join(str(error).split()) or type(error).__name__
