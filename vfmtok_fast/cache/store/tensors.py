"""Read a safetensors file in parts."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np

# Bytes of a shard to fetch first: its header takes 700 or so, and a second round trip costs more.
HEAD = 4096
# A longer header is not one of ours.
MAX_HEADER = 1 << 20

_DTYPES = {"U8": np.uint8, "U16": np.uint16, "I32": np.int32, "I64": np.int64}


class _Bytes(bytes):
    def size(self) -> int:
        return len(self)

    def read_range(self, start: int, end: int) -> bytes:
        return self[start:end]


class Tensors:
    """A safetensors file that is read only as far as needed, and never memory-mapped.

    If a mapped file shrinks while it is read, SIGBUS ends the process. With plain reads this is an
    error of one line.

    Args:
        file: a `Place`, or the bytes of one.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is cut short, or not such a file.
    """

    def __init__(self, file: Any) -> None:
        self.file = _Bytes(file) if isinstance(file, bytes) else file
        size = self.file.size()
        # A store may refuse a range of an empty file.
        head = self.file.read_range(0, HEAD) if size else b""
        (length,) = struct.unpack("<Q", head[:8]) if len(head) >= 8 else (MAX_HEADER + 1,)
        if length > MAX_HEADER:
            raise ValueError("no safetensors header")
        if 8 + length > len(head):
            head = self.file.read_range(0, 8 + length)
        self.start = 8 + length
        self.header = json.loads(head[8 : self.start])
        try:
            self.meta = self.header.pop("__metadata__", {})
            ends = [self.start + int(entry["data_offsets"][1]) for entry in self.header.values()]
            known = all({"dtype", "shape"} <= entry.keys() for entry in self.header.values())
        except (AttributeError, LookupError, TypeError) as error:
            raise ValueError("no safetensors header") from error
        if not known or any(entry["dtype"] not in _DTYPES for entry in self.header.values()):
            raise ValueError("holds dtypes that a shard does not have")
        if max(ends, default=self.start) != size:
            raise ValueError(f"holds {size} bytes instead of {max(ends, default=self.start)}")

    def get(self, name: str) -> np.ndarray:
        entry = self.header[name]
        start, end = (self.start + offset for offset in entry["data_offsets"])
        data = self.file.read_range(start, end) if end > start else b""
        return np.frombuffer(bytearray(data), _DTYPES[entry["dtype"]]).reshape(entry["shape"])
