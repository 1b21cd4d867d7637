"""Split an emoji set into training and held-out images, with one skin tone of each emoji.

    python examples/emoji/prepare.py emoji.parquet examples/emoji/data

OUT receives ``train.parquet``, and ``heldout/`` with one folder per group. The input has the
columns ``image`` (Hugging Face's: {bytes, path}), ``label``, ``subgroup`` and ``name``. An emoji
and its variants (man, woman, person) are in the same split, by a hash of what their names have in
common.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

# One base name in this many is held out.
HELD_OUT = 12
SPLITS = ("train", "heldout")
PEOPLE = re.compile(r"\b(wo)?m[ae]n\b|\bpersons?\b|\bpeople\b|\bgirl\b|\bboy\b")


def base_name(name: str) -> str:
    """The name that all variants of an emoji share: "man judge", "woman judge" become "judge"."""
    name = re.sub(r"\b(medium-)?(light|medium|dark) skin tone\b", "", name)
    rest = re.sub(r"[\s:,]+", " ", PEOPLE.sub("", name)).strip()
    return rest or name.strip()


def is_held_out(name: str) -> bool:
    digest = hashlib.sha256(base_name(name).encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT == 0


def split(table: pa.Table) -> dict[str, pa.Table]:
    """Split the rows of a set that do not show a chosen skin tone.

    Args:
        table: columns ``image``, ``label``, ``subgroup`` and ``name``.

    Returns:
        Tables with the same columns under "train" and "heldout".
    """
    names = table["name"].to_pylist()
    plain = [i for i, name in enumerate(names) if "skin tone" not in name]
    sides = {False: [], True: []}
    for i in plain:
        sides[is_held_out(names[i])].append(i)
    return {side: table.take(sides[side == "heldout"]) for side in SPLITS}


def write_folders(table: pa.Table, out: Path) -> None:
    """Write images as files into class folders, whose order is that of the groups."""
    groups = [slug(name) for name in json.loads(table.schema.metadata[b"groups"])]
    for row in table.to_pylist():
        number = Path(row["image"]["path"]).stem
        path = out / groups[row["label"]] / f"{number}-{slug(row['name'])}.webp"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row["image"]["bytes"])


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    sides = split(pq.read_table(options.source))
    pq.write_table(sides["train"], options.out / "train.parquet", row_group_size=256)
    write_folders(sides["heldout"], options.out / "heldout")
    for side, rows in sides.items():
        print(f"{side}: {rows.num_rows} pictures")


if __name__ == "__main__":
    main()
