"""Formatting of records: the resource that bounds them, times in readable units, tables."""

from __future__ import annotations

# Percent of the time that a resource must be busy to be called the bound. A kernel that loads,
# multiplies and stores one after the other, without overlap, keeps each resource busy for about a
# third of the time; below a quarter, not even that explains the time it takes.
BUSY = 25.0


def bound(percent_of_copy: float, percent_of_matmul: float) -> str:
    """Say whether bytes, operations or latency bound a call.

    Args:
        percent_of_copy: percentage of the time that its bytes take at the rate of a copy.
        percent_of_matmul: percentage of the time that its operations take at the rate of a matrix
            product.

    Returns:
        "bytes" or "operations", whichever takes longer; "latency" where both take less than a
        quarter of the time. Such a call waits for launches or for dependent loads, or issues
        instructions that are not floating-point operations.
    """
    if max(percent_of_copy, percent_of_matmul) < BUSY:
        return "latency"
    return "bytes" if percent_of_copy >= percent_of_matmul else "operations"


def duration(microseconds: float) -> str:
    """Format a time with three digits or more, in the unit that needs the fewest digits."""
    for limit, unit in ((1e3, "us"), (1e6, "ms")):
        if microseconds < limit:
            value = microseconds / limit * 1e3
            return f"{value:.2f} {unit}" if value < 10 else f"{value:.1f} {unit}"
    return f"{microseconds / 1e6:.2f} s"


def table(head: list[str], rows: list[list[object]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
