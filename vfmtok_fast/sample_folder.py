"""A folder of generated images that any number of processes fill; any of them may stop.

    OUT/
      samples.json                 what the images depend on; a run that differs is refused
      shards/pictures-00000.npy    uint8 [64, size, size, 3], written atomically
      samples.npz                  ADM's format: arr_0 images, arr_1 labels; written last

A shard is a function of its number and samples.json: images are identified by their index, which
keys the noise, and are decoded in groups that do not depend on how many are generated at a time.
(With other batch sizes, only codes that are tied within rounding may differ.)
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from .cache.format.differences import differences
from .cache.format.fingerprint import fast_ops, weights_checksum
from .cache.store import LocalPlace, atomic
from .generator import Generator, Sampling
from .generator.decoder import STEP_OPS, Progress
from .generator.memory import fastest_batch
from .temporary import is_temporary
from .tokenizer import VFMTok
from .tokenizer.model import DECODE_OPS

SHARD = 64
# Number of images decoded together, always the same: the rounding of matrix products depends on it.
GROUP = 16
SETTINGS = "samples.json"
RESULT = "samples.npz"


@dataclass(frozen=True)
class Job:
    """A folder of samples that is ready to receive shards.

    Attributes:
        class_ids: int64 [N].
        size: side of an image, in pixels.
        sampling: settings of `Generator.generate`.
        kv_dtype: dtype of keys and values, see `Generator.generate`.
    """

    gpt: Generator
    tokenizer: VFMTok
    out: Path
    class_ids: torch.Tensor
    size: int
    sampling: dict[str, Any]
    kv_dtype: torch.dtype | None = None

    @property
    def shards(self) -> int:
        return -(-len(self.class_ids) // SHARD)

    def path(self, number: int) -> Path:
        return self.out / "shards" / f"pictures-{number:05d}.npy"

    def rows(self, number: int) -> torch.Tensor:
        """Indices of a shard's images."""
        end = min((number + 1) * SHARD, len(self.class_ids))
        return torch.arange(number * SHARD, end, device="cpu")


def describe(job: Job) -> dict[str, Any]:
    """List everything that the images depend on, with the ops that are enabled now; plain JSON."""
    ops = {*fast_ops(job.gpt, STEP_OPS), *fast_ops(job.tokenizer, DECODE_OPS)}
    described = {
        "num": len(job.class_ids),
        "classes_sha256": weights_checksum({"class_ids": job.class_ids}),
        "size": job.size,
        "dtype": str(job.gpt.dtype).removeprefix("torch."),
        # Not every field of a config shows in the shapes of the weights.
        "gpt": dataclasses.asdict(job.gpt.config),
        "gpt_sha256": weights_checksum(job.gpt.state_dict()),
        "tokenizer": dataclasses.asdict(job.tokenizer.config),
        "tokenizer_sha256": weights_checksum(job.tokenizer.state_dict()),
        # The tokenizer's checksum does not cover this.
        **({"tf32": True} if getattr(job.tokenizer, "tf32", False) else {}),
        **({} if job.kv_dtype is None else {"kv_dtype": str(job.kv_dtype)[6:]}),
        **({"fast_ops": sorted(ops)} if ops else {}),
        **job.sampling,
    }
    # A round trip through JSON turns tuples into lists, as when read back.
    return json.loads(json.dumps(described))


def prepare(job: Job, *, extend: bool = False) -> None:
    """Make the folder, or check that its content belongs to the same job.

    The ops that `make_shards` will use must be enabled already.

    Args:
        job: what the folder is to hold.
        extend: accept a folder that holds fewer images of the same job; they stay.

    Raises:
        FileExistsError: the folder holds samples made with other weights or settings.
        cache.CacheWriteError: the folder cannot be written.
    """
    described = describe(job)
    path = job.out / SETTINGS
    # Check this before the settings: another process may write them meanwhile, and shards after
    # that.
    foreign = job.out.exists() and (not job.out.is_dir() or _holds_something(job.out))
    if path.exists():
        there = _settings(path)
        if _is_beginning(there, described, job.class_ids):
            if not extend:
                raise FileExistsError(
                    f"{job.out} holds {there['num']} of these {len(job.class_ids)} images; choose "
                    "another folder, or let `sample --extend` make the others"
                )
            # In this order, so that a run that dies between the two leaves no samples.npz that
            # samples.json does not describe.
            LocalPlace(job.out / RESULT).remove()
            LocalPlace(path).put(_encoded(described))
        _check_settings(path, described)
    elif foreign:
        raise FileExistsError(f"{job.out} is there and not a folder of samples; choose another")
    for folder in (LocalPlace(job.out), LocalPlace(job.out / "shards")):
        folder.make_folder()
        folder.sweep()
    if not path.exists():
        LocalPlace(path).put_first(_encoded(described))
    # Another process may have started meanwhile.
    _check_settings(path, described)


def _encoded(described: dict[str, Any]) -> bytes:
    return (json.dumps(described, indent=1) + "\n").encode()


def _settings(path: Path) -> dict[str, Any]:
    try:
        there = json.loads(path.read_text())
        if not isinstance(there, dict):
            raise ValueError("it must hold an object")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it and run again") from error
    return there


def _is_beginning(
    there: dict[str, Any], described: dict[str, Any], class_ids: torch.Tensor
) -> bool:
    """Whether a folder's settings ask for the first of the same images, and for no more."""
    num = there.get("num")
    if not isinstance(num, int) or not 0 < num < len(class_ids):
        return False
    first = {"num": num, "classes_sha256": weights_checksum({"class_ids": class_ids[:num]})}
    return not differences(there, described | first)


def _check_settings(path: Path, described: dict[str, Any]) -> None:
    if differing := differences(_settings(path), described):
        raise FileExistsError(
            f"{path.parent} holds other samples ({differing}); choose another folder"
        )


def _holds_something(out: Path) -> bool:
    """Whether a folder without settings holds more than the remains of a run that died early."""
    shards = out / "shards"
    inside = [*out.iterdir(), *(shards.iterdir() if shards.is_dir() else ())]
    return any(path != shards and not is_temporary(path.name) for path in inside)


def pending(job: Job) -> list[int]:
    """Numbers of the shards that are missing or incomplete.

    Raises:
        ValueError: a complete shard does not belong to this job. This is found now, not at the end.
            Or another process has extended the folder since `prepare`.
    """
    _check_count(job)
    return [number for number in range(job.shards) if not _is_whole(job, number)]


def _is_whole(job: Job, number: int) -> bool:
    """Whether a shard is complete; mapping it reads only its header and its size."""
    try:
        pictures = np.lib.format.open_memmap(job.path(number), mode="r")
    except (FileNotFoundError, EOFError, ValueError):
        return False
    rows, *side = _shape(job, number)
    if pictures.dtype == np.uint8 and [*pictures.shape[1:]] == side and 0 < len(pictures) < rows:
        return False  # It was the last shard before the folder was extended.
    _check_shard(job, number, pictures)
    return True


def _shape(job: Job, number: int) -> tuple[int, ...]:
    return len(job.rows(number)), job.size, job.size, 3


def _check_shard(job: Job, number: int, pictures: np.ndarray) -> None:
    wanted = _shape(job, number)
    if pictures.shape != wanted or pictures.dtype != np.uint8:
        raise ValueError(
            f"{job.path(number)} is not a shard of this job: it holds {pictures.dtype} "
            f"{list(pictures.shape)}, not uint8 {list(wanted)}; remove it, run again"
        )


def make_shards(
    job: Job,
    numbers: list[int],
    batch_size: int | None,
    advance: Callable[[int], None],
    progress: Progress | None = None,
) -> None:
    """Generate, decode and commit shards; the bytes do not depend on the process.

    On a GPU, a thread with its own stream decodes and commits shards while the next codes are
    generated: generation is bound by memory, decoding by arithmetic.

    Args:
        job: a job that `prepare` has accepted.
        numbers: which shards; their codes are generated together if the batch size allows.
        batch_size: images generated at a time; None takes the fastest size that fits.
        advance: called with the number of images finished; may raise to stop.
        progress: called with (codes done, codes in all) for the images generated together.
    """
    guided, count = Sampling(**job.sampling).guided(0), len(job.class_ids)
    at_once = fastest_batch(job.gpt, count, guided, batch_size, None, job.kv_dtype)
    together = max(1, at_once // SHARD)
    device = job.gpt.device
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    with ThreadPoolExecutor(1, thread_name_prefix="vfmtok-decode") as thread:
        decoding: list[Future] = []
        for first in range(0, len(numbers), together):
            some = numbers[first : first + together]
            ids = torch.cat([job.rows(number) for number in some])
            batches = job.gpt.stream(
                job.class_ids[ids], batch_size=batch_size, image_ids=ids, kv_dtype=job.kv_dtype,
                progress=progress, **job.sampling,
            )  # fmt: skip
            codes = torch.cat([part for _, part in batches])
            shards = list(zip(some, codes.split(SHARD), strict=True))
            if stream is None:
                for number, part in shards:
                    _decode_shard(job, number, part, advance)
                continue
            stream.wait_stream(torch.cuda.current_stream(stream.device))
            codes.record_stream(stream)
            # At most one batch waits to be decoded; an error in it ends the run here.
            _results(decoding)
            decoding = [
                thread.submit(_decode_beside, stream, job, number, part, advance)
                for number, part in shards
            ]
        _results(decoding)


def _results(futures: list[Future]) -> None:
    """Wait for all; if one fails, those that have not started are cancelled."""
    try:
        for future in futures:
            future.result()
    finally:
        for future in futures:
            future.cancel()


def _decode_beside(stream: torch.cuda.Stream, *args) -> None:
    # Entering the stream also sets its device, which a new thread does not inherit.
    with torch.cuda.stream(stream):
        _decode_shard(*args)


def _decode_shard(
    job: Job, number: int, codes: torch.Tensor, advance: Callable[[int], None]
) -> None:
    """Decode one shard's codes and commit it."""
    pictures = []
    for group in codes.split(GROUP):
        pictures.append(job.tokenizer.decode_to_uint8(group, job.size).cpu().numpy())
        advance(len(group))
    _check_count(job)  # Of the last shard, an extended folder needs more images.
    with atomic.atomic_file(job.path(number)) as file:
        np.save(file, np.concatenate(pictures))


def finish(job: Job) -> bool:
    """Write samples.npz if every shard is there, and return whether it is there now.

    Only one shard at a time is in memory. The bytes do not depend on which process writes them or
    when.

    Raises:
        ValueError: as `pending`.
    """
    if pending(job):
        return False
    count = len(job.class_ids)
    if _result_count(job.out / RESULT) == count:
        return True
    with (
        atomic.atomic_file(job.out / RESULT) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
    ):
        with _array(archive, "arr_0", (count, job.size, job.size, 3), np.uint8) as member:
            for pictures in shards_of(job):
                member.write(pictures.data)
        with _array(archive, "arr_1", (count,), np.int64) as member:
            member.write(job.class_ids.numpy().data)
        _check_count(job)
    return True


def _check_count(job: Job) -> None:
    there = _settings(job.out / SETTINGS).get("num")
    if there != len(job.class_ids):
        raise ValueError(
            f"{job.out}: another process has extended it from {len(job.class_ids)} to {there} "
            "images and makes the rest"
        )


def _result_count(path: Path) -> int | None:
    """Number of images in a samples.npz; None if it is missing or cut off."""
    try:
        with np.load(path) as result:  # A zip's list of members is at its end.
            return len(result["arr_1"])
    except (FileNotFoundError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def shards_of(job: Job) -> Iterator[np.ndarray]:
    """Yield the finished images, shard by shard, uint8 [n, size, size, 3]."""
    for number in range(job.shards):
        pictures = np.load(job.path(number))
        _check_shard(job, number, pictures)
        yield pictures


def _array(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: type) -> BinaryIO:
    """Open an .npz member for its values; our own ZipInfo does not contain today's date."""
    member = archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)
    header = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
        "fortran_order": False,
        "shape": shape,
    }
    np.lib.format.write_array_header_1_0(member, header)
    return member
