"""How records are shown: the resource that bounds them, times in readable units, tables."""

from __future__ import annotations

# A resource must be busy for this percentage of the time to be called the bound. A kernel that
# loads, multiplies and stores one after the other without overlap keeps each resource busy for
# about a third of the time; below a quarter, not even that explains the time.
BUSY = 25.0


def bound(percent_of_copy: float | None, percent_of_matmul: float | None) -> str:
    """Say whether bytes, operations or latency bound a call.

    Args:
        percent_of_copy: share of the time that its bytes take at the rate of copying; None if they
            were not counted.
        percent_of_matmul: share of the time that its operations take at the rate of a matrix
            product; None likewise.

    Returns:
        "bytes" or "operations", whichever takes longer; "latency" if both take less than a quarter
        of the time. Such a call waits for launches or for loads that depend on each other, or
        issues instructions that are not floating-point operations. "" if that cannot be told.
    """
    counted = [share for share in (percent_of_copy, percent_of_matmul) if share is not None]
    if len(counted) < 2 and max(counted, default=0) < 50:
        return ""  # The one that was not counted may take longer.
    if max(counted) < BUSY:
        return "latency"
    percent_of_copy, percent_of_matmul = percent_of_copy or 0, percent_of_matmul or 0
    return "bytes" if percent_of_copy >= percent_of_matmul else "operations"


def duration(microseconds: float) -> str:
    """Format with three digits or more, in the unit that needs the fewest."""
    for limit, unit in ((1e3, "us"), (1e6, "ms")):
        if microseconds < limit:
            value = microseconds / limit * 1e3
            return f"{value:.2f} {unit}" if value < 10 else f"{value:.1f} {unit}"
    return f"{microseconds / 1e6:.2f} s"


def table(head: list[str], rows: list[list[object]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
