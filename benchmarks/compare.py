"""Report what got slower: `make compare OLD=benchmarks/results NEW=build/benchmarks`.

Compares two folders of results written by `make bench`. Records match by device, op, shape and
provider. A record is *slower* if its median grew by more than 5 % and by more than three times the
noise; it is *faster* if the median shrank by as much. The noise combines both runs: the root of the
sum of the squares of their interquartile ranges. If a record has no quartiles, half of its range
is used instead, which is about the same for seven rounds. A single round has no spread and yields
no verdict.

Exit status: 0 nothing got slower, 1 something did, 2 the folders cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from pathlib import Path

from bounds import duration, table

LEAST, SPREADS = 0.05, 3.0
Key = tuple[str, str, str, str]


class BadInputError(Exception):
    """The folders cannot be compared; the text is one line that says why."""


def read(folder: Path) -> tuple[dict[Key, dict], dict[str, set[str]]]:
    """Return records by device, op, shape and provider, and the versions used on each device."""
    if not folder.is_dir():
        raise BadInputError(f"{folder} is no folder; name one that `make bench` wrote")
    records: dict[Key, dict] = {}
    versions: dict[str, set[str]] = {}
    for path in sorted(folder.glob("*/*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BadInputError(f"{path} is no JSON ({error}); measure anew") from error
        if not isinstance(content, dict) or "records" not in content:
            continue  # Predictions from machine code are not measurements.
        try:
            environment = content["environment"]
            device = environment["device"]
            said = ", ".join(f"{name} {value}" for name, value in environment["versions"].items())
            versions.setdefault(device, set()).add(said)
            for record in content["records"]:
                key = device, record["op"], record["shape"], record["provider"]
                records[key] = {**record, "median_us": float(record["median_us"])}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            why = f"{type(error).__name__}: {error}"
            raise BadInputError(
                f"{path} holds no records as `make bench` writes ({why})"
            ) from error
    if not records:
        raise BadInputError(f"{folder} holds no records; `make bench` writes some")
    return records, versions


def spread(record: dict) -> float | None:
    """Return the interquartile range of the rounds in microseconds; None if it is unknown."""
    if (record.get("rounds") or 0) < 2:
        return None
    if record.get("iqr_us") is not None:
        return record["iqr_us"]
    if record.get("min_us") is None or record.get("max_us") is None:
        return None
    return (record["max_us"] - record["min_us"]) / 2


def verdict(old: dict, new: dict) -> str:
    """Return "slower", "faster", "same", or the reason why there is no verdict."""
    if old.get("timer") != new.get("timer"):
        return f"timed otherwise ({old.get('timer')}, then {new.get('timer')})"
    spreads = spread(old), spread(new)
    if None in spreads:
        return "spread unknown"
    change = new["median_us"] - old["median_us"]
    if abs(change) <= max(LEAST * old["median_us"], SPREADS * math.hypot(*spreads)):
        return "same"
    return "slower" if change > 0 else "faster"


def compare(old_folder: Path, new_folder: Path) -> tuple[list[str], bool]:
    """Return the lines to print, and whether anything got slower."""
    (old, before), (new, after) = read(old_folder), read(new_folder)
    if not before.keys() & after.keys():
        raise BadInputError(
            f"no device in common: {old_folder} has {', '.join(sorted(before))}, "
            f"{new_folder} has {', '.join(sorted(after))}; times of two devices do not compare"
        )
    both = [key for key in old if key in new]
    if not both:
        raise BadInputError(f"no record of {new_folder} is one of {old_folder}'s")
    found = {key: verdict(old[key], new[key]) for key in both}
    first = {"slower": 0, "faster": 1}
    rows = [
        [*key, duration(old[key]["median_us"]), duration(new[key]["median_us"]),
         f"{100 * (new[key]['median_us'] / old[key]['median_us'] - 1):+.1f} %", found[key]]
        for key in sorted(both, key=lambda key: (first.get(found[key], 2), key))
    ]  # fmt: skip
    lines = table(
        ["device", "op", "shape", "provider", "old median", "new median", "change", "verdict"], rows
    )
    lines.append("")
    for device in sorted(before.keys() & after.keys()):
        if before[device] != after[device]:
            sides = (" / ".join(sorted(side[device])) for side in (before, after))
            lines.append(f"other versions on {device}: {', then '.join(sides)}")
    for name, keys in (
        ("only old", old.keys() - new.keys()),
        ("only new", new.keys() - old.keys()),
    ):
        lines += [f"{name}: {', '.join(key)}" for key in sorted(keys)]
    counts = Counter(word.partition(" (")[0] for word in found.values())
    lines.append(", ".join(f"{count} {word}" for word, count in sorted(counts.items())))
    return lines, counts["slower"] > 0


def main() -> int:
    parser = argparse.ArgumentParser(description="whether anything got slower beyond noise")
    parser.add_argument("old", type=Path, help="folder of results to compare with")
    parser.add_argument("new", type=Path, help="folder of results that is asked about")
    args = parser.parse_args()
    try:
        lines, slower = compare(args.old, args.new)
    except BadInputError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return int(slower)


if __name__ == "__main__":
    sys.exit(main())
