"""The token cache without a model: images per second of each stage and end to end.

The photos are synthetic JPEGs of 500 x 375 pixels, the average size in ImageNet. `decode+resize` is
the rate of the workers with nothing else to do. `pipeline` is a whole `cache.build` with an encoder
that does nothing: the work of a GPU (cutting the views, 8 bit to float) is left out. It must reach
85 % of `decode+resize`. `simulated 2000 img/s` is the same with an encoder that sleeps.

`python benchmarks/bench_cache.py` prints a cost sheet, computed from the results and the file
sizes.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import costs
import harness
import numpy as np
import pytest
import torch
from PIL import Image

from vfmtok_fast import cache
from vfmtok_fast.cache.format import crops, views
from vfmtok_fast.cache.make import encode
from vfmtok_fast.images import decode_image

PHOTOS, SIZE, BATCH = 256, 336, 32
TURNS = 7
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
SETS = {"center": ["center"], "ten-crop": ["ten-crop"], "random-0..1": ["random-0..1"]}
# The simplest set is also run with a single worker.
RUNS = [("center", 1)] * (CPUS > 1) + [(declared, CPUS) for declared in SETS]
KEEPS = 0.85
DEVICE_RATE = 2000
# With a GPU, the timer would measure an empty CUDA graph, and nothing here needs the GPU.
pytestmark = pytest.mark.skipif(harness.GPU, reason="nothing here uses a GPU")


@dataclasses.dataclass(frozen=True)
class Config:
    """The part of VFMTokConfig that a cache needs."""

    image_size: int = SIZE
    num_regions: int = 256
    codebook_size: int = 16384


class Nothing(torch.nn.Module):
    """A tokenizer that is never called: `encoder` replaces it."""

    def __init__(self) -> None:
        super().__init__()
        self.config = Config()

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        raise AssertionError("`encoder` was to take its place")


@contextlib.contextmanager
def encoder(seconds_per_view: float) -> Iterator[None]:
    """Replace the device in the pipeline by one that takes this long and does nothing."""

    def sleep(tokenizer, batch, manifest):
        if seconds_per_view:
            time.sleep(seconds_per_view * len(batch))
        return np.zeros((manifest.batch_size, manifest.num_tokens), np.uint16)

    original, encode._encode_batch = encode._encode_batch, sleep
    try:
        yield
    finally:
        encode._encode_batch = original


@functools.cache
def photos(count: int = PHOTOS) -> Path:
    """Make a folder of synthetic photos: smooth shapes and noise, for typical file sizes."""
    root = Path(tempfile.mkdtemp(prefix="bench-cache-")) / "photos"
    atexit.register(shutil.rmtree, root.parent, ignore_errors=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        path = root / f"class{number % 4}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = smooth + rng.normal(0, 6, smooth.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=95)
    return root


@functools.cache
def files() -> list[Path]:
    return sorted(photos().rglob("*.jpg"))


def over_all(workers: int, work: Callable[[Path], object]) -> int:
    """Process every photo in a thread pool, and return how many were processed."""
    with ThreadPoolExecutor(workers) as pool:
        return sum(1 for _ in pool.map(work, files()))


def stage(name: str, workers: int, declared: list[str]) -> Callable[[], int]:
    plan = views.plan_views(views.parse_views(declared), SIZE)

    def resize(path: Path) -> None:
        crops.make_bases(decode_image(path.read_bytes()), plan, path=path.name)

    work = {
        "read": lambda path: path.read_bytes(),
        "decode": lambda path: decode_image(path.read_bytes()),
        "decode+resize": resize,
    }[name]
    return lambda: over_all(workers, work)


def pipeline(
    workers: int, declared: list[str], seconds_per_view: float = 0.0, shard_size: int = 64
) -> Callable[[], int]:
    def run() -> int:
        out = photos().parent / "tokens"
        shutil.rmtree(out, ignore_errors=True)
        with encoder(seconds_per_view):
            settings = {"batch_size": BATCH, "shard_size": shard_size, "workers": workers}
            return cache.build(photos(), out, Nothing(), views=declared, **settings).encoded

    return run


def measure(
    benchmark,
    shape: str,
    provider: str,
    fn: Callable[[], int],
    times: list[float] | None = None,
    **facts: object,
) -> None:
    def check(done: int) -> dict[str, object]:
        assert done == PHOTOS
        return {"images": PHOTOS, **facts}

    size = sum(path.stat().st_size for path in files())
    work = harness.Work(bytes=size, flops=0)
    harness.measure(
        benchmark, op="cache", shape=shape, provider=provider, fn=fn, check=check, work=work,
        slow=True, times=times,
    )  # fmt: skip
    record = harness.session.records[-1]
    record["images_s"] = round(PHOTOS / record["median_us"] * 1e6, 1)


@pytest.mark.parametrize("workers", sorted({1, CPUS}))
@pytest.mark.parametrize("name", ["read", "decode"])
def bench_stage(benchmark, name: str, workers: int):
    measure(benchmark, f"{name} workers={workers}", name, stage(name, workers, ["center"]))


@functools.cache
def in_turns(declared: str, workers: int) -> dict[str, list[float]]:
    """Time decode+resize and the pipeline in turns, so that a busy machine slows both alike."""
    runs = {
        "decode+resize": stage("decode+resize", workers, SETS[declared]),
        "pipeline": pipeline(workers, SETS[declared]),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    files()  # Not timed.
    for _ in range(TURNS):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


@pytest.mark.parametrize(("declared", "workers"), RUNS)
def bench_decode_resize(benchmark, declared: str, workers: int):
    times = in_turns(declared, workers)["decode+resize"]
    alone = stage("decode+resize", workers, SETS[declared])
    measure(benchmark, f"{declared} workers={workers}", "decode+resize", alone, times)


@pytest.mark.parametrize(("declared", "workers"), RUNS)
def bench_pipeline(benchmark, declared: str, workers: int):
    """Take the median of the turns' ratios, because the machine's speed may vary between turns."""
    times = in_turns(declared, workers)
    turns = zip(times["decode+resize"], times["pipeline"], strict=True)
    kept = statistics.median(alone / whole for alone, whole in turns)
    shape, whole = f"{declared} workers={workers}", pipeline(workers, SETS[declared])
    facts = {"of_decode_resize": round(kept, 3)}
    measure(benchmark, shape, "pipeline", whole, times["pipeline"], **facts)
    print(f"{shape}: the pipeline keeps {kept:.1%} of decode+resize")
    assert kept >= KEEPS, f"the pipeline keeps {kept:.1%} of decode+resize"


def bench_simulated_device(benchmark):
    """Run with a simulated device (marked as such): 1/2000 s per view, ten views per photo.

    There is one shard, because the pipeline runs dry for a batch or two at the end of each, which
    is negligible in a shard of 8192 photos.
    """
    run = pipeline(CPUS, SETS["ten-crop"], 1 / DEVICE_RATE, shard_size=PHOTOS)
    measure(benchmark, f"ten-crop workers={CPUS}", f"simulated {DEVICE_RATE} img/s", run)
    record = harness.session.records[-1]
    record["views_s"] = round(10 * record["images_s"], 1)
    record["of_device"] = round(record["views_s"] / DEVICE_RATE, 3)


if __name__ == "__main__":
    results = harness.RESULTS / harness.device_name() / "cache.json"
    if not results.exists():
        sys.exit(f"{results}: not there; run make bench ARGS=benchmarks/bench_cache.py first")
    print("\n".join(costs.cost_sheet(json.loads(results.read_text()))))
