"""Check a cache: every byte of it against itself, and a sample of it against the images."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from ...errors import one_line
from ...images import quiet_pillow
from ..format import index, shards
from ..format.differences import differences
from ..format.fingerprint import Tokenizer, describe
from ..format.index import INDEX
from ..format.manifest import FingerprintMismatch, Manifest, read_manifest
from ..make.encode import encode_rows, evaluating
from ..sources import Source, open_again
from ..store import Place, place
from .sheet import contact_sheet

MEND = "run vfmtok-fast repair"


@dataclass
class Report:
    """What `verify` found.

    Args:
        problems: one line each; empty for a sound and complete cache.
        images: images in the index.
        bad: quarantined images.
        shards: shards in all.
        sampled: images that were encoded again.
        agreement: share of their tokens that came out the same, 0 to 1; None if none was sampled.
    """

    problems: list[str] = field(default_factory=list)
    images: int = 0
    bad: int = 0
    shards: int = 0
    sampled: int = 0
    agreement: float | None = None

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.problems


def verify(
    out: str | os.PathLike, tokenizer: Tokenizer | None = None,
    images: str | os.PathLike | None = None, *, input_kind: str | None = None, sample: int = 64,
    min_agreement: float = 0.999, workers: int = 1, sheet: str | os.PathLike | None = None,
) -> Report:  # fmt: skip
    """Check a cache's files, and encode a sample of its images again.

    Args:
        out: the cache's folder.
        tokenizer: the one that made the cache; needed to encode images again. Without `images`,
            only its fingerprint is compared.
        images: the images' folder or archive; needed to encode them again.
        input_kind: what `images` is; None: what the cache was made from.
        sample: images to encode again, spread evenly, rounded up to whole batches.
        min_agreement: a smaller share of equal tokens is a problem. On the device that made the
            cache all are equal; another kind of device rounds differently and flips codes that are
            nearly tied.
        workers: threads that read and decode.
        sheet: a PNG to write: some images, each next to what its cached tokens decode to.

    Returns:
        All problems at once, and the agreement.

    Raises:
        FileNotFoundError: there is no cache in `out`, or no input `images`.
        ValueError: the manifest is damaged, or `images` is given without `tokenizer`.
        FingerprintMismatch: `tokenizer` is not the one that made the cache.
    """
    out = place(out)
    found = read_manifest(out)
    if images is not None and tokenizer is None:
        raise ValueError("verify: encoding pictures again needs the tokenizer that made the cache")
    if sheet is not None and (images is None or not hasattr(tokenizer, "decode")):
        raise ValueError("verify: a contact sheet needs the pictures and a tokenizer that decodes")
    source = None if images is None else open_again(images, out / INDEX, input_kind)
    if sample < 1:
        raise ValueError(f"verify: sample must be at least 1, got {sample}")
    if tokenizer is not None:
        covers = describe(tokenizer, found.views, found.batch_size, found.seed, found.heif)
        if differing := differences(found.covers, covers):
            raise FingerprintMismatch(
                f"{out}: was not made by this tokenizer and program: {differing}; use the model "
                "and precision that made it, with the fast ops on or off as they were then"
            )
    report = Report(images=found.images, shards=found.shards)
    sound = _check_files(out, found, report)
    if source is not None and sound:
        with quiet_pillow(), evaluating(tokenizer), index.opened(out / INDEX) as listed:
            _check_sample(out, found, listed, report, sound, tokenizer, source, sample, workers)
            if sheet is not None:
                drawn = contact_sheet(out, found, listed, sound, tokenizer, source)
                _write_sheet(place(sheet), drawn)
        if report.agreement is not None and report.agreement < min_agreement:
            report.problems.append(
                f"{report.sampled} pictures encoded again: only {report.agreement:.4%} of the "
                f"tokens agree (at least {min_agreement:.4%} expected)"
            )
    return report


def _check_files(out: Place, found: Manifest, report: Report) -> list[int]:
    """Fill in `report.problems` and `report.bad`; return the numbers of the sound shards."""
    try:
        if index.index_checksum(out / INDEX) != (found.images, found.index_sha256):
            report.problems.append(f"{out / INDEX}: does not match its checksum in the manifest")
            return []
    except ValueError as error:
        report.problems.append(str(error))
        return []
    sound, missing = [], []
    with index.opened(out / INDEX) as listed:
        for number in range(found.shards):
            path = shards.shard_path(out, number)
            if not path.exists():
                missing.append(number)
                continue
            wrong, bad = shard_problems(out, found, listed, number)
            report.problems += [f"{path}: {problem}; {MEND}" for problem in wrong]
            report.bad += bad
            if not wrong:
                sound.append(number)
    if missing:
        report.problems.append(
            f"{out}: {len(missing)} of {found.shards} shards are missing (first: {missing[0]}); "
            "run cache again"
        )
    elif len(sound) == found.shards:
        _check_completion(out, found, report)
    for stray in shards.strays(out, found):
        report.problems.append(f"{stray}: does not belong to this cache")
    return sound


def shard_problems(
    out: Place, found: Manifest, listed: index.OpenIndex, number: int
) -> tuple[list[str], int]:
    """Check one shard to the last byte, against itself, the index and its quarantine list.

    Returns:
        What is wrong, one line each (nothing for a sound shard), and the number of bad images.
    """
    path = shards.shard_path(out, number)
    try:
        header, shard = shards.read_shard(path)
        if wrong := shards.problems(header, shard, number, found):
            return wrong, 0
        entries, checksum = shards.read_quarantine(out, number)
    except (FileNotFoundError, ValueError) as error:
        return [str(error).removeprefix(f"{path}: ")], 0
    rows = listed.rows(number)
    wrong = []
    if rows.labels != shard.label.tolist():
        wrong.append("labels do not agree with the index")
    bad = np.flatnonzero(shard.status != shards.OK)
    expected = [(rows.first + int(i), rows.entries[i].path, int(shard.status[i])) for i in bad]
    listed = [(entry.get("index"), entry.get("path"), entry.get("status")) for entry in entries]
    if listed != expected or checksum != header.checksums.get("quarantine"):
        wrong.append(f"does not agree with {shards.quarantine_path(out, number)}")
    return wrong, len(bad)


def _check_completion(out: Place, found: Manifest, report: Report) -> None:
    path = out / shards.COMPLETE
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        report.problems.append(f"{path}: missing although all shards are there; run cache again")
        return
    except ValueError:
        content = None
    if content != shards.completion(out, found):
        report.problems.append(
            f"{path}: does not agree with the shards; remove it and run cache again"
        )


def _check_sample(
    out: Place, found: Manifest, listed: index.OpenIndex, report: Report, sound: list[int],
    tokenizer: Tokenizer, source: Source, sample: int, workers: int,
) -> None:  # fmt: skip
    # Pieces start and end where batches do, so that the same batches are formed again.
    views = len(found.views)
    piece = found.batch_size // math.gcd(found.batch_size, views)
    pieces = [
        (number, start) for number in sound for start in range(0, len(found.rows_of(number)), piece)
    ]
    wanted = min(-(-sample // piece), len(pieces))
    chosen = [pieces[k * len(pieces) // wanted] for k in range(wanted)]
    equal = total = 0
    for number, start in chosen:
        _, shard = shards.read_shard(shards.shard_path(out, number))
        rows = listed.rows(number)[start : start + piece]
        try:
            again = encode_rows(source, rows, found, tokenizer, workers)
        except OSError as error:  # no image can be read, for example because a folder is gone
            report.problems.append(one_line(error))
            break
        part = slice(start, start + len(rows))
        for position in np.flatnonzero(again.status != shard.status[part]):
            now = again.reasons.get(int(position), "can be read now")
            then = shards.STATUS_NAMES[int(shard.status[part][position])]
            report.problems.append(
                f"{source.root}: {rows.entries[position].path!r} is cached as {then}, but: {now}"
            )
        both = (again.status == shards.OK) & (shard.status[part] == shards.OK)
        equal += int((again.tokens[both] == shard.tokens[part][both]).sum())
        total += again.tokens[both].size
        report.sampled += len(rows)
    report.agreement = equal / total if total else None


def _write_sheet(path: Place, sheet: np.ndarray | None) -> None:
    if sheet is not None:
        path.parent.make_folder()
        with path.writing() as file:
            Image.fromarray(sheet).save(file, format="PNG")
