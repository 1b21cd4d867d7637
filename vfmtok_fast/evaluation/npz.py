"""ADM's .npz files, read a batch at a time: arr_0 images, arr_1 labels, mu and sigma.

50,000 images are 10 GB, so they are never in memory together.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from .metrics import Statistics

PICTURES, LABELS = "arr_0", "arr_1"
# Names for pool_3, and for mixed_6/conv, which sFID compares.
STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class Archive:
    """An .npz file of images, of statistics, or of both.

    Args:
        path: the file, or a folder that `vfmtok-fast sample` has filled, for its samples.npz.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an .npz, is damaged, or its images are not uint8 [N, H, W, 3].
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(os.path.expanduser(path))
        if self.path.is_dir():
            self.path = self.path / "samples.npz"
        if not self.path.is_file():
            raise FileNotFoundError(
                f"{self.path}: no such file; pictures are evaluated as ADM's .npz, which "
                "`vfmtok-fast sample` writes"
            )
        with self._errors(), zipfile.ZipFile(self.path) as archive:
            self.members = {name.removesuffix(".npy") for name in archive.namelist()}
        self.count, self.height, self.width = 0, 0, 0
        if PICTURES in self.members:
            with self._member(PICTURES) as (_, shape, dtype):
                if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8:
                    raise ValueError(
                        f"{self.path}: {PICTURES} must be uint8 pictures [N, H, W, 3], got {dtype} "
                        f"{list(shape)}"
                    )
            self.count, self.height, self.width = shape[:3]

    def sha256(self) -> str:
        """SHA-256 of the file."""
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def check_pictures(self, count: int, size: int) -> None:
        """Require at least ``count`` images of ``size`` pixels a side."""
        if PICTURES not in self.members:
            raise ValueError(f"{self.path}: holds no pictures ({PICTURES})")
        if (self.height, self.width) != (size, size):
            raise ValueError(
                f"{self.path}: pictures must have {size}x{size} pixels, got "
                f"{self.width}x{self.height}; --size evaluates other sizes"
            )
        if self.count < count:
            evaluates = f"; --num {self.count} evaluates those, and says so" if self.count else ""
            raise ValueError(
                f"{self.path}: {count} pictures were asked for, it holds {self.count}{evaluates}"
            )

    def pictures(self, count: int, batch_size: int) -> Iterator[np.ndarray]:
        """Yield the first ``count`` images in batches, uint8 [b, H, W, 3]."""
        with self._member(PICTURES) as (file, shape, _):
            each = int(np.prod(shape[1:]))
            for start in range(0, count, batch_size):
                here = min(batch_size, count - start)
                data = file.read(here * each)
                if len(data) != here * each:
                    raise ValueError(f"{self.path}: ends before its last picture; make it again")
                yield np.frombuffer(bytearray(data), np.uint8).reshape(here, *shape[1:])

    def labels(self, count: int) -> np.ndarray:
        """Return the classes of the first images, int64 [count].

        Raises:
            ValueError: there are no labels, too few, or they are not valid numbers.
        """
        if LABELS not in self.members:
            raise ValueError(
                f"{self.path}: holds no labels ({LABELS}); --no-labels evaluates it without"
            )
        labels = self._array(LABELS)
        whole = labels.ndim == 1 and labels.dtype.kind in "iu" and (labels >= 0).all()
        if not whole or len(labels) < count:
            raise ValueError(
                f"{self.path}: {LABELS} must be integers of at least 0, one per picture, got "
                f"{labels.dtype} {list(labels.shape)} for {self.count} pictures"
            )
        return labels[:count].astype(np.int64)

    def statistics(self, which: str) -> Statistics | None:
        """Return the statistics of "pool" or "spatial" features, or None if the file has none.

        Raises:
            ValueError: one of mean and covariance is missing, their shapes do not match, or the
                values are not a covariance.
        """
        names = STATISTICS[which]
        there = [name for name in names if name in self.members]
        if not there:
            return None
        if len(there) == 1:
            raise ValueError(f"{self.path}: has {there[0]}, but not both of {' and '.join(names)}")
        arrays = [self._array(name) for name in names]
        if any(array.dtype.kind not in "fiu" for array in arrays):
            raise ValueError(
                f"{self.path}: {' and '.join(names)} must be real numbers, got "
                f"{arrays[0].dtype} and {arrays[1].dtype}"
            )
        mean, covariance = (torch.from_numpy(array.astype(np.float64)) for array in arrays)
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                f"{self.path}: {' and '.join(names)} must be [D] and [D, D], got "
                f"{list(mean.shape)} and {list(covariance.shape)}"
            )
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError(f"{self.path}: {' and '.join(names)} hold NaN or infinite values")
        # Published covariances are symmetric up to rounding.
        if not torch.allclose(covariance, covariance.T, rtol=1e-3, atol=1e-6):
            raise ValueError(f"{self.path}: {names[1]} is not a covariance: it is not symmetric")
        return Statistics(mean, covariance)

    def _array(self, name: str) -> np.ndarray:
        with self._open(name) as file:
            try:
                return np.lib.format.read_array(file, allow_pickle=False)
            except ValueError as error:
                raise ValueError(f"{self.path}: {name}: {error}") from error

    @contextlib.contextmanager
    def _member(self, name: str) -> Iterator[tuple[BinaryIO, tuple[int, ...], np.dtype]]:
        """Yield the file at an array's first value, and the array's shape and dtype."""
        with self._open(name) as file:
            read = _READERS[np.lib.format.read_magic(file)]
            shape, fortran, dtype = read(file)
            if fortran or dtype.hasobject:
                raise ValueError(f"{self.path}: {name} must be plain numbers in C order")
            yield file, shape, dtype

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[BinaryIO]:
        with self._errors(), zipfile.ZipFile(self.path) as archive:
            with archive.open(f"{name}.npy") as file:
                yield file

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        # RuntimeError: encrypted, or compressed in a way that Python does not know.
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError) as error:
            raise ValueError(f"{self.path}: is not an .npz, or is damaged ({error})") from error
