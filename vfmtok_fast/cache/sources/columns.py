"""Which columns of Parquet files hold the images and the labels.

What the files say themselves comes first: Hugging Face's `datasets` stores every column's feature
with the schema. Known names come next. If two columns could be meant, the error asks the user.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from .base import MAX_LABEL

IMAGE_COLUMNS = tuple("image img picture photo jpg jpeg png webp bytes image_bytes".split())
LABEL_COLUMNS = ("label", "labels", "cls", "class", "fine_label")
# Taken if there is none of those.
MORE_LABEL_COLUMNS = ("label_id", "class_id", "class_label", "class_index", "target")
# Means the rule used before columns could be chosen, for an index that does not record a column.
FIRST = ""
NO_LABELS = "none"
# Words in the names of byte structs that hold no image, for files that do not describe them.
_NO_PICTURES = frozenset("audio sound speech voice video wav mp3 flac mp4 pdf".split())
_FIRST_IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes")


@dataclass(frozen=True)
class Columns:
    """The columns that were found.

    Args:
        image: the column of images.
        label: the column of labels, or the key of folders such as label=3; None: no labels.
        values: the sorted values of such folders; None if the labels are a column.
        names: names of the classes, from a ClassLabel; empty if there are none.
        first: (image, label) by the rule used before columns could be chosen.
    """

    image: str
    label: str | None
    values: tuple[str, ...] | None
    names: tuple[str, ...]
    first: tuple[str | None, str | None]

    def record(self) -> dict[str, str]:
        """Return what an index must say about the columns; empty if the first rule finds them."""
        record = {}
        if self.image != self.first[0]:
            record["image_column"] = self.image
        if self.label != self.first[1]:
            record["label_column"] = self.label or NO_LABELS
        return record

    def check(self, schema: pa.Schema, path: Path) -> None:
        """Refuse a file that does not fit what was found in the others.

        Raises:
            ValueError: its columns or the names of its classes differ.
        """
        if not _has(schema, self.image, lambda kind: leaf_of(schema, self.image) is not None):
            wrong = f"has no pictures in the column {self.image!r}, unlike the files before it"
            raise ValueError(f"{path}: {wrong}; leave it out with --exclude; {_listed(schema)}")
        if self.label is None or self.values is not None:
            return
        if not _has(schema, self.label, _is_label):
            wrong = f"has no class numbers in the column {self.label!r}, unlike the files before it"
            raise ValueError(f"{path}: {wrong}; leave it out with --exclude; {_listed(schema)}")
        names = _class_names(_features(schema), self.label)
        if names and self.names and names != self.names:
            raise ValueError(
                f"{path}: the classes of its column {self.label!r} have other names or numbers "
                "than in the files before it; leave it out with --exclude"
            )

    def label_of(self, name: str) -> int | None:
        """Return the label of a file's rows by a folder such as label=3; None if it is in none."""
        value = partitions(name).get(self.label)
        if value is None:
            return None
        return int(value) if self._are_numbers() else self.values.index(value)

    def class_names(self) -> tuple[str, ...]:
        """Return the names of the classes; empty if they are only numbered."""
        return self.names if self.values is None or self._are_numbers() else self.values

    def _are_numbers(self) -> bool:
        return all(v.isascii() and v.isdigit() and int(v) <= MAX_LABEL for v in self.values)


def _has(schema: pa.Schema, name: str, fits: Callable[[pa.DataType], bool]) -> bool:
    """Return whether a column exists and fits; a column without any value has no type and fits."""
    kind = schema.field(name).type if name in schema.names else None
    return kind is not None and (pa.types.is_null(kind) or fits(kind))


def partitions(name: str) -> dict[str, str]:
    """Return keys and values of the folders in a path such as label=3/part-0.parquet."""
    pairs = (folder.partition("=") for folder in name.split("/")[:-1])
    return {
        key: value
        for key, equals, value in pairs
        if equals and key and value != "__HIVE_DEFAULT_PARTITION__"
    }


def find_columns(
    where: Path, schemas: Iterable[tuple[pa.Schema, bool]], names: tuple[str, ...],
    image: str | None, label: str | None,
) -> Columns:  # fmt: skip
    """Find the columns of an input.

    Args:
        where: the input, with which messages start.
        schemas: schema of each file, and whether it has rows; only as many as needed are taken.
        names: names of the files, relative to the input.
        image, label: columns that the user names, or NO_LABELS; None: find them; FIRST: those taken
            before columns could be chosen.

    Raises:
        ValueError: there are no images, two columns could be meant, or a named one is unsuitable.
    """
    first, schema = _merged(schemas, {image, label})
    old = first_image(first), first_label(first)
    image = old[0] if image == FIRST else image
    label = (old[1] or NO_LABELS) if label == FIRST else label
    image = _image(where, schema, image)
    if label == NO_LABELS:
        return Columns(image, None, None, (), old)
    column = _label(where, schema, label)
    if column is not None:
        return Columns(image, column, None, _class_names(_features(schema), column), old)
    keys = [partitions(name) for name in names]
    known = (*LABEL_COLUMNS, *MORE_LABEL_COLUMNS) if label is None else (label,)
    key = next((key for key in known if any(key in found for found in keys)), None)
    if key is None and label is not None:
        raise ValueError(f"{where}: no column {label!r} (--label-column); {_listed(schema)}")
    values = None if key is None else tuple(sorted({found[key] for found in keys if key in found}))
    return Columns(image, key, values, (), old)


def _merged(
    schemas: Iterable[tuple[pa.Schema, bool]], asked: set[str | None]
) -> tuple[pa.Schema, pa.Schema]:  # fmt: skip
    """Return the schema of the first file, and that of the first file with rows.

    A column without any value in a file has no type there, so its type comes from a later file.
    """
    first = merged = None
    for schema, has_rows in schemas:
        first = schema if first is None else first
        if not has_rows:
            continue
        merged = schema if merged is None else _filled(merged, schema)
        wanted = {*IMAGE_COLUMNS, *LABEL_COLUMNS, *MORE_LABEL_COLUMNS, *asked}
        wanted |= {name for name in merged.names if _type(merged, name) in ("Image", "ClassLabel")}
        if not any(pa.types.is_null(column.type) and column.name in wanted for column in merged):
            break
    return first, first if merged is None else merged


def _filled(schema: pa.Schema, later: pa.Schema) -> pa.Schema:
    for place, column in enumerate(schema):
        if pa.types.is_null(column.type) and column.name in later.names:
            schema = schema.set(place, later.field(column.name))
    return schema


def _image(where: Path, schema: pa.Schema, asked: str | None) -> str:
    """Return the column of images."""
    if asked is not None:
        if leaf_of(schema, asked) is None:
            raise ValueError(
                f"{where}: the column {asked!r} (--image-column) must exist, and hold bytes or a "
                f"struct with them; {_listed(schema)}"
            )
        return asked
    leaves = {name: leaf for name in schema.names if (leaf := leaf_of(schema, name))}
    said = [name for name in leaves if _type(schema, name) == "Image"]
    # A column that the files call something else, such as Audio, is not one of images.
    others = [name for name in leaves if _type(schema, name) in (None, "Value")]
    known = [name for name in others if name.lower() in IMAGE_COLUMNS]
    structs = [name for name in others if "." in leaves[name] and not _is_no_picture(name)]
    found = _preferred(said, IMAGE_COLUMNS) or known or structs
    if not found:
        raise ValueError(
            f"{where}: no pictures in it: expected a column struct<bytes, path>, or binary named "
            f"{', '.join(IMAGE_COLUMNS)} (or name one with --image-column); {_listed(schema)}"
        )
    return _only(where, "pictures", "--image-column", found)


def _label(where: Path, schema: pa.Schema, asked: str | None) -> str | None:
    """Return the column of labels; None if there is none."""
    if asked is not None and asked not in schema.names:
        return None
    if asked is not None and _is_label(schema.field(asked).type):
        return asked
    numbers = [column.name for column in schema if _is_label(column.type)]
    said = [name for name in numbers if _type(schema, name) == "ClassLabel"]
    known = [name for name in numbers if name.lower() in LABEL_COLUMNS]
    more = [name for name in numbers if name.lower() in MORE_LABEL_COLUMNS]
    found = _preferred(said, LABEL_COLUMNS) or known or more
    if found and asked is None:
        return _only(where, "labels", "--label-column", found)
    for column in schema:
        empty = pa.types.is_null(column.type)
        if column.name == asked or (column.name.lower() in LABEL_COLUMNS and not empty):
            raise ValueError(
                f"{where}: column {column.name!r} must hold class numbers, got {column.type}; name "
                f"another with --label-column, or take no labels (--label-column {NO_LABELS})"
            )
    return None


def _preferred(found: list[str], known: tuple[str, ...]) -> list[str]:
    return [name for name in found if name.lower() in known] or found


def _only(where: Path, what: str, option: str, found: list[str]) -> str:
    if len(found) > 1:
        raise ValueError(
            f"{where}: {', '.join(found)} could each be the {what}; choose one with {option}"
        )
    return found[0]


def _listed(schema: pa.Schema) -> str:
    columns = ", ".join(f"{column.name}: {column.type}" for column in schema)
    return f"got {columns or 'no columns'}"


def leaf_of(schema: pa.Schema, name: str) -> str | None:
    """Return the leaf column that holds a column's bytes; None if it cannot hold images."""
    if name not in schema.names:
        return None
    kind = schema.field(name).type
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return f"{name}.bytes" if place >= 0 and _is_bytes(kind.field(place).type) else None
    return name if _is_bytes(kind) else None


def _is_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    # Older versions of pyarrow have no binary views.
    is_view = getattr(pa.types, "is_binary_view", lambda kind: False)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or is_view(kind)


def _is_label(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_integer(kind)


def _is_no_picture(name: str) -> bool:
    return not _NO_PICTURES.isdisjoint(re.findall("[a-z0-9]+", name.lower()))


def _features(schema: pa.Schema) -> dict[str, Any]:
    """Return the features that `datasets` stores with a schema; empty for other programs' files."""
    try:
        found = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):  # other programs' metadata, or none
        return {}
    return found if isinstance(found, dict) else {}


def _type(schema: pa.Schema, name: str) -> str | None:
    """Return what the files say a column is: "Image", "ClassLabel", "Audio", ...; or None."""
    feature = _features(schema).get(name)
    return feature.get("_type") if isinstance(feature, dict) else None


def _class_names(features: dict[str, Any], label: str) -> tuple[str, ...]:
    """Return the names of a ClassLabel; empty if there are none."""
    feature = features.get(label)
    names = feature.get("names") if isinstance(feature, dict) else None
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return tuple(names)
    return ()


def first_image(schema: pa.Schema) -> str | None:
    """Return the image column by the rule used before columns could be chosen, or None."""
    leaves = {name: leaf for name in schema.names if (leaf := leaf_of(schema, name))}
    structs = [name for name, leaf in leaves.items() if "." in leaf]
    return next(iter(structs or [name for name in leaves if name in _FIRST_IMAGES]), None)


def first_label(schema: pa.Schema) -> str | None:
    """Return the label column by the rule used before columns could be chosen, or None."""
    return next((name for name in LABEL_COLUMNS if name in schema.names), None)
