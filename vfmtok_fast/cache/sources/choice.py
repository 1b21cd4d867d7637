"""Which files of an input are taken: what the user includes and excludes, and splits in a folder.

A pattern without a slash matches a path if it matches the name of the file or of any folder above
it. A pattern with slashes matches if it matches the path or that of a folder above it. Matching
is case-sensitive.
"""

from __future__ import annotations

import fnmatch
import glob
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

# Words that name the splits of a data set, as in Hugging Face's `datasets`.
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_WORDS = {word: split for split, words in _SPLITS.items() for word in words}
# Such a word, set off in a name: train-00000-of-00002.parquet, imagenet_val.tar.
_SPLIT = re.compile(rf"(?:^|[-._ ])({'|'.join(_WORDS)})(?=[-._ 0-9]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Choice:
    """The patterns of what is taken (none: everything), and of what is left out of that.

    Patterns refer to paths in the input. The paths passed to the methods start after `prefix`.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    prefix: str = ""

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise TypeError(f"input: {name} must be a list of patterns, got {value!r}")
            object.__setattr__(self, name, tuple(value))

    @cached_property
    def split(self) -> str | None:
        """train, validation or test, if `include` is what `split_patterns` makes of a word."""
        said = {one.lower() for one in self.include}
        words = (word for word in _WORDS if said == set(split_patterns(word)))
        return _WORDS.get(next(words, ""))

    def split_among(self, folders: Iterable[str]) -> str | None:
        """For a choice by --split, return the folder that is the split.

        Whatever has such a name inside the other folders is a class or a file of another split.
        """
        found = [name for name in folders if is_split(name) and self.takes(name)]
        return found[0] if self.split and len(found) == 1 else None

    def takes(self, *paths: str) -> bool:
        """Return whether a file is taken; several paths are names of the same file."""
        return not self.leaves_out(*paths) and (not self.include or self._fits(paths, self.include))

    def leaves_out(self, *paths: str) -> bool:
        """Return whether `exclude` leaves out a file or a whole folder."""
        return self._fits(paths, self.exclude)

    def below(self, folder: str) -> Choice:
        """Return the same choice for paths that start inside a folder."""
        return replace(self, prefix=f"{self.prefix}{folder}/")

    def _fits(self, paths: Iterable[str], patterns: Iterable[str]) -> bool:
        return any(_fits(self.prefix + path, one) for path in paths for one in patterns)

    def record(self) -> dict[str, list[str]]:
        """Return what an index must say about the choice; empty if everything is taken."""
        record = {}
        if set(self.include) - {"*"}:
            record["include"] = sorted(self.include)
        if self.exclude:
            record["exclude"] = sorted(self.exclude)
        return record


EVERYTHING = Choice()


def _fits(path: str, pattern: str) -> bool:
    pattern, parts = pattern.strip("/"), path.split("/")
    if "/" not in pattern:
        return any(fnmatch.fnmatchcase(part, pattern) for part in parts)
    paths = ("/".join(parts[:count]) for count in range(1, len(parts) + 1))
    return any(fnmatch.fnmatchcase(one, pattern) for one in paths)


def split_patterns(name: str) -> tuple[str, ...]:
    """Return patterns of the files of one split: NAME itself, or set off in a longer name.

    Raises:
        ValueError: not a name.
    """
    if not name or "/" in name:
        raise ValueError(f"--split must be a name such as train or validation, got {name!r}")
    name = glob.escape(name)
    return tuple(f"{start}{name}{end}" for start in ("", "*[-._ ]") for end in ("", "[-._ 0-9]*"))


def check_splits(where: object, paths: Iterable[str], choice: Choice, whole: bool = False) -> None:
    """Refuse to mix the splits of a data set, unless the user has named each of them.

    Args:
        where: the input, for the message.
        paths: relative paths of its files or folders.
        choice: what the user has chosen.
        whole: only names that consist of such a word count.

    Raises:
        ValueError: there is more than one split among them.
    """
    found: dict[str, tuple[str, str]] = {}
    for path in paths:
        if word := _split_of(path, whole):
            found.setdefault(_WORDS[word.lower()], (word, path))
    named = choice.include and all(choice.takes(path) for _, path in found.values())
    if len(found) > 1 and not named:
        words, examples = zip(*found.values(), strict=True)
        raise ValueError(
            f"{where}: holds several splits of a data set ({', '.join(examples)}); choose one, for "
            f"example with --split {words[0]}, or take all with --include '*'"
        )


def is_split(name: str) -> bool:
    """Return whether a folder's name is just a word for a split."""
    return name.lower() in _WORDS


def named_split(path: str) -> str | None:
    """Return the split that a path is named after; the name nearest to the file counts."""
    word = _split_of(path, whole=False)
    return None if word is None else _WORDS[word.lower()]


def _split_of(path: str, whole: bool) -> str | None:
    """Return the word for a split in a path: the last one in the name nearest to the file."""
    for part in reversed(path.split("/")):
        if whole and not is_split(part):
            continue
        if words := _SPLIT.findall(part):
            return words[-1]
    return None
