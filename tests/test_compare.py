"""`benchmarks/compare.py`: slower beyond noise fails, noise does not, bad input is reported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

COMPARE = Path(__file__).resolve().parents[1] / "benchmarks" / "compare.py"


def record(median: float = 100.0, provider: str = "fast", **facts: object) -> dict[str, object]:
    return {
        "op": "x", "shape": "s", "provider": provider, "median_us": median, "rounds": 7,
        "timer": "wall", "iqr_us": 1.0, "min_us": median - 1, "max_us": median + 1, **facts,
    }  # fmt: skip


def write(folder: Path, *records: dict, device: str = "cpu-2-cores", torch: str = "2.14") -> Path:
    environment = {"device": device, "versions": {"torch": torch}}
    (folder / device).mkdir(parents=True, exist_ok=True)
    content = {"environment": environment, "records": list(records)}
    (folder / device / "x.json").write_text(json.dumps(content))
    return folder


def run(*folders: Path) -> tuple[int, str, str]:
    command = [sys.executable, str(COMPARE), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("old", "new", "word", "code"),
    [
        (record(100), record(120), "slower", 1),
        (record(100), record(80), "faster", 0),
        # Far outside the spread of the rounds, but too small to matter.
        (record(100, iqr_us=0.1), record(104, iqr_us=0.1), "same", 0),
        # Large, but within the spread of the rounds of one run: 3 x hypot(5, 5) is 21.2.
        (record(100, iqr_us=5), record(120, iqr_us=5), "same", 0),
        (record(100, iqr_us=5), record(122, iqr_us=5), "slower", 1),
        # Records from before quartiles were kept: half of the range, 3 x hypot(5, 5) again.
        *(
            (record(100, iqr_us=None, min_us=95, max_us=105),
             record(new, iqr_us=None, min_us=new - 5, max_us=new + 5), word, code)
            for new, word, code in ((120, "same", 0), (122, "slower", 1))
        ),
        (record(100, rounds=1), record(300, rounds=1), "spread unknown", 0),
        (record(100, rounds=None, min_us=None, max_us=None), record(300), "spread unknown", 0),
        (record(100), record(300, timer="events"), "timed otherwise", 0),
    ],
)  # fmt: skip
def test_a_change_counts_beyond_the_noise(tmp_path, old, new, word, code):
    got, said, _ = run(write(tmp_path / "old", old), write(tmp_path / "new", new))
    assert got == code
    (line,) = [line for line in said.splitlines() if line.startswith("| cpu")]
    assert f"| {word}" in line and said.splitlines()[-1] == f"1 {word}"


def test_what_only_one_has_is_named_and_other_versions_are_said(tmp_path):
    old = write(tmp_path / "old", record(), record(provider="gone"))
    new = write(tmp_path / "new", record(), record(provider="fresh"), torch="2.15")
    code, said, _ = run(old, new)
    assert code == 0
    assert "only old: cpu-2-cores, x, s, gone" in said
    assert "only new: cpu-2-cores, x, s, fresh" in said
    assert "other versions on cpu-2-cores: torch 2.14, then torch 2.15" in said


def test_slower_ones_come_first(tmp_path):
    names = ("a", "b")
    old = write(tmp_path / "old", *(record(100, name) for name in names))
    new = write(tmp_path / "new", record(50, "a"), record(200, "b"))
    rows = [line for line in run(old, new)[1].splitlines() if line.startswith("| cpu")]
    assert "+100.0 %" in rows[0] and "-50.0 %" in rows[1]


def test_what_cannot_be_compared_is_one_line_and_two(tmp_path):
    old = write(tmp_path / "old", record())
    broken = write(tmp_path / "broken", record())
    (broken / "cpu-2-cores" / "x.json").write_text("{")
    odd = write(tmp_path / "odd", {"op": "x"})
    strange = write(tmp_path / "strange", record(shape="other"))
    (tmp_path / "none").mkdir()
    other = write(tmp_path / "other", record(), device="nvidia-h200")
    for folder, why in (
        (broken, "is no JSON"), (odd, "holds no records as"), (tmp_path / "none", "no records"),
        (tmp_path / "missing", "is no folder"), (other, "no device in common"),
        (strange, "no record of"),
    ):  # fmt: skip
        code, said, error = run(old, folder)
        assert (code, said) == (2, "") and why in error and error.count("\n") == 1


def test_a_folder_is_as_fast_as_itself():
    """All committed records can be read, including old ones without rounds."""
    code, said, error = run(COMPARE.parent / "results", COMPARE.parent / "results")
    assert code == 0 and not error and "slower" not in said
