"""Whether anything got slower between two folders of results: `make compare OLD=a NEW=b`.

Records match by device, op, shape and provider. One counts as slower (or faster) where medians are
further apart than 5 % and than the noise of both: a record's noise is half of the span between its
best and its worst round, which is far above the deviation of a median of several rounds. Records
that kept no rounds have the 5 % alone. Exit status: 0 nothing is slower, 1 something is, 2 the
folders cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bounds import duration, table

# Below this share of the old median nothing is said to have changed.
LEAST = 0.05

Key = tuple[str, str, str, str]


class Incomparable(ValueError):
    """The two folders share nothing, or one of them cannot be read."""


def records(folder: Path) -> dict[Key, dict]:
    """All records below a folder of results, by device, op, shape and provider."""
    if not folder.is_dir():
        raise Incomparable(f"{folder}: no such folder of results")
    found: dict[Key, dict] = {}
    for path in sorted(folder.glob("*/*.json")):
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise Incomparable(f"{path}: is not JSON ({error})") from error
        for record in content.get("records", []) if isinstance(content, dict) else []:
            if missing := {"op", "shape", "provider", "median_us"} - record.keys():
                raise Incomparable(f"{path}: a record lacks {', '.join(sorted(missing))}")
            key = path.parent.name, record["op"], record["shape"], record["provider"]
            versions = content.get("environment", {}).get("versions")
            found[key] = {**record, "versions": versions}
    if not found:
        raise Incomparable(f'{folder}: holds no records (DEVICE/OP.json with "records")')
    return found


def noise(record: dict) -> float:
    """Microseconds within which a record's median may lie by chance."""
    low, high = record.get("min_us"), record.get("max_us")
    return 0.0 if low is None or high is None else (high - low) / 2


def verdict(old: dict, new: dict) -> str:
    """ "slower", "faster" or "same"."""
    change = new["median_us"] - old["median_us"]
    if abs(change) <= max(LEAST * old["median_us"], noise(old), noise(new)):
        return "same"
    return "slower" if change > 0 else "faster"


def compare(old: dict[Key, dict], new: dict[Key, dict]) -> tuple[list[str], bool]:
    """Lines to print, and whether something got slower."""
    both = sorted(old.keys() & new.keys())
    if not both:
        devices = [", ".join(sorted({key[0] for key in side})) for side in (old, new)]
        raise Incomparable(
            f"no record is in both: devices there {devices[0]}, here {devices[1]}; "
            "compare results of one device and one benchmark"
        )
    rows, counts = [], {"slower": 0, "faster": 0, "same": 0}
    for key in both:
        found = verdict(old[key], new[key])
        counts[found] += 1
        if found != "same":
            before, after = old[key]["median_us"], new[key]["median_us"]
            rows.append([*key, duration(before), duration(after), f"{after / before:.2f} x", found])
    head = ["device", "op", "shape", "provider", "old, median", "new, median", "time", "verdict"]
    lines = table(head, sorted(rows, key=lambda row: row[-1] != "slower")) if rows else []
    lines.append(", ".join(f"{count} {name}" for name, count in counts.items()))
    if gone := len(old.keys() - new.keys()):
        lines.append(f"{gone} records are in the old folder only")
    if came := len(new.keys() - old.keys()):
        lines.append(f"{came} records are in the new folder only")
    if any(old[key]["versions"] != new[key]["versions"] for key in both):
        lines.append("note: versions of torch or Triton differ between the two")
    return lines, counts["slower"] > 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old", type=Path, help="folder of results, as benchmarks/results")
    parser.add_argument("new", type=Path)
    options = parser.parse_args(arguments)
    try:
        lines, slower = compare(records(options.old), records(options.new))
    except Incomparable as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return int(slower)


if __name__ == "__main__":
    sys.exit(main())
