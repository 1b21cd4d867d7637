"""Fixtures for the cache tests: a fast, exact fake tokenizer and small folders of images."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from vfmtok_fast import cache
from vfmtok_fast.cache.store import LocalPlace

SIDE, TOKENS, CODEBOOK = 16, 4, 1000


@dataclasses.dataclass(frozen=True)
class FakeConfig:
    """The fields of VFMTokConfig that a cache needs, plus `levels`, which only `config` covers."""

    image_size: int = SIDE
    num_regions: int = TOKENS
    codebook_size: int = CODEBOOK
    levels: tuple[int, ...] = (1, 2)


class FakeTokenizer(torch.nn.Module):
    """Tokens are an integer hash of all pixels of an image, and of no other image's pixels."""

    def __init__(self, config: FakeConfig = FakeConfig(), scale: int = 1) -> None:
        super().__init__()
        self.config = config
        self.scale = torch.nn.Parameter(torch.tensor(float(scale)))
        self.batches: list[int] = []

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        assert not self.training and not torch.is_grad_enabled()
        assert images.dtype == torch.float32 and images.shape[1:] == (3, SIDE, SIDE)
        self.batches.append(len(images))
        levels = ((images + 1) * 127.5).round().long().flatten(1)
        weights = torch.arange(levels.shape[1] * TOKENS).reshape(-1, TOKENS) * 7919 % 65521
        return (levels @ weights * int(self.scale)) % self.config.codebook_size


def write_picture(path: Path, seed: int) -> Path:
    """Write a small PNG of noise; each seed gives a different one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 256, (20 + seed % 7, 20 + seed % 5, 3), dtype=np.uint8)
    Image.fromarray(values).save(path, "PNG")
    return path


def make_tree(root: Path, count: int = 11, bad: tuple[int, ...] = ()) -> Path:
    """Write `count` images in three classes; those whose numbers are in `bad` are broken."""
    for number in range(count):
        path = root / f"class{number % 3}" / f"{number:03d}.png"
        write_picture(path, number)
        if number in bad:
            path.write_bytes(path.read_bytes()[:200])
    return root


def add(tree: Path, *names: str) -> None:
    """Add images to a tree that exists already."""
    for name in names:
        write_picture(tree / name, sum(name.encode()))


def read_tree(out: Path) -> dict[str, bytes]:
    """Return every file below a folder with its bytes."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def add_member(archive, name, data=b"", **fields):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    archive.addfile(member, io.BytesIO(data))


def pictures(tree):
    """Return (relative path, bytes, class number) of every image, sorted."""
    return [
        (path.relative_to(tree).as_posix(), path.read_bytes(), int(path.parent.name[5:]))
        for path in sorted(tree.rglob("*.png"))
    ]


def make_tar_of_tars(tree, path):
    with tarfile.open(path, "w") as outer:
        for folder in sorted(tree.iterdir(), reverse=True):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for file in sorted(folder.iterdir(), reverse=True):
                    add_member(archive, file.name, file.read_bytes())
            add_member(outer, f"{folder.name}.tar", inner.getvalue())
    return path


def make_webdataset(tree, root):
    root.mkdir()
    samples = pictures(tree)
    for number, part in enumerate((samples[:5], samples[5:])):
        with tarfile.open(root / f"train-{number:03d}.tar", "w") as archive:
            for position, (_, data, label) in enumerate(part):
                add_member(archive, f"{position:04d}.cls", str(label).encode())
                add_member(archive, f"{position:04d}.PNG", data)
                add_member(archive, f"{position:04d}.json", b"{}")
    return root


def make_parquet(tree, root, group=3, names=("fish", "bird", "cat")):
    root.mkdir()
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    schema = pa.schema(
        [
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("label", pa.int64()),
        ],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    samples = pictures(tree)
    for number, part in enumerate((samples[:4], samples[4:])):
        images = [{"bytes": data, "path": name} for name, data, _ in part]
        table = pa.table([images, [label for _, _, label in part]], schema=schema)
        name = f"train-{number:05d}-of-00002.parquet"
        pq.write_table(table, root / name, row_group_size=group)
    return root


def make_lmdb(tree, root, count=None, extra=()):
    lmdb = pytest.importorskip("lmdb")
    samples = pictures(tree)
    with lmdb.open(str(root), map_size=1 << 24) as database, database.begin(write=True) as writer:
        for number, (_, data, label) in enumerate(samples):
            writer.put(str(number).encode(), pickle.dumps({"image": data, "label": label}))
        for number, record in extra:
            writer.put(str(number).encode(), record)
        writer.put(b"num_samples", pickle.dumps(len(samples) if count is None else count))
    return root


MAKERS = {
    "tar": lambda tree, root: make_tar_of_tars(tree, root.with_suffix(".tar")),
    "webdataset": make_webdataset,
    "parquet": make_parquet,
    "lmdb": make_lmdb,
}


@pytest.fixture
def as_nobody(tmp_path_factory) -> Path:
    """A folder for a test that must run with an ordinary user's rights, even if root starts it."""
    if os.geteuid() != 0:
        yield tmp_path_factory.mktemp("nobody")
        return
    # pytest's own folders are closed to other users. The build below runs first so that everything
    # that is imported lazily has been imported already.
    with tempfile.TemporaryDirectory() as folder:
        warm = Path(folder) / "warm"
        cache.build(make_tree(warm / "p", 1), warm / "t", FakeTokenizer(), workers=1)
        (Path(folder) / "open").mkdir()
        for path in (folder, f"{folder}/open"):
            os.chmod(path, 0o777)
        os.seteuid(65534)
        try:
            yield Path(folder) / "open"
        finally:
            os.seteuid(0)


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts or remounts a file system of a given size at `tmp_path / "disk"`."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting is not allowed here")
        return disk

    yield mount
    if os.path.ismount(disk):
        subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def tokenizer() -> FakeTokenizer:
    return FakeTokenizer()


@pytest.fixture(scope="session")
def fake():
    """This module, for tests that need its classes and functions."""
    return sys.modules[__name__]


@pytest.fixture
def tmp_path(tmp_path: Path) -> LocalPlace:
    """The temporary folder, as a path that the cache's internal functions accept too."""
    return LocalPlace(tmp_path)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder of eleven good images."""
    return make_tree(tmp_path / "pictures")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where a cache may be written; the folder does not exist yet."""
    return tmp_path / "tokens"
