"""Comparing two folders of results: what is slower, what is noise, what cannot be compared."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def main():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield runpy.run_path(str(ROOT / "benchmarks" / "compare.py"))["main"]
        sys.modules.pop("bounds", None)


def write(folder: Path, *times: tuple, device: str = "cpu-2-cores", torch: str = "2.14") -> Path:
    """Records of one op: (shape, median, best, worst)."""
    records = [
        {"op": "linear", "shape": shape, "provider": "fast", "median_us": median,
         "min_us": low, "max_us": high}
        for shape, median, low, high in times
    ]  # fmt: skip
    (folder / device).mkdir(parents=True, exist_ok=True)
    content = {"environment": {"versions": {"torch": torch}}, "records": records}
    (folder / device / "linear.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("old", "new", "code", "said"),
    [
        ((100, 98, 104), (150, 148, 155), 1, "| 100.0 us | 150.0 us | 1.50 x | slower |"),
        ((150, 148, 155), (100, 98, 104), 0, "0.67 x | faster |"),
        ((100, 98, 104), (104, 103, 106), 0, "0 slower, 0 faster, 1 same"),  # below 5 %
        ((100, 60, 140), (130, 128, 135), 0, "0 slower, 0 faster, 1 same"),  # noise of the old
        ((100, 98, 104), (130, 90, 170), 0, "0 slower, 0 faster, 1 same"),  # of the new
        ((100, None, None), (110, None, None), 1, "1.10 x | slower |"),  # no rounds were kept
        ((100, None, None), (104, None, None), 0, "1 same"),
    ],
)
def test_verdicts(old, new, code, said, main, tmp_path, capsys):
    folders = write(tmp_path / "a", ("s", *old)), write(tmp_path / "b", ("s", *new))
    assert main([str(folder) for folder in folders]) == code
    assert said in capsys.readouterr().out


def test_what_is_in_one_folder_only_and_other_versions_are_told(main, tmp_path, capsys):
    a = write(tmp_path / "a", ("s", 100, 99, 101), ("gone", 5, 5, 5))
    b = write(tmp_path / "b", ("s", 100, 99, 101), ("came", 5, 5, 5), ("too", 5, 5, 5), torch="3")
    assert main([str(a), str(b)]) == 0
    out = capsys.readouterr().out
    assert "1 records are in the old folder only" in out
    assert "2 records are in the new folder only" in out and "versions of torch" in out


def test_the_committed_results_are_as_fast_as_themselves(main, capsys):
    results = str(ROOT / "benchmarks" / "results")
    assert main([results, results]) == 0
    assert "0 slower, 0 faster" in capsys.readouterr().out


def test_what_cannot_be_compared(main, tmp_path, capsys):
    a = write(tmp_path / "a", ("s", 100, 99, 101))
    other = write(tmp_path / "b", ("s", 100, 99, 101), device="nvidia-h200")
    (tmp_path / "empty").mkdir()
    broken = write(tmp_path / "c", ("s", 1, 1, 1))
    (broken / "cpu-2-cores" / "linear.json").write_text("{")
    lacking = write(tmp_path / "d", ("s", 1, 1, 1))
    (lacking / "cpu-2-cores" / "linear.json").write_text('{"records": [{"op": "linear"}]}')
    for new, said in (
        (other, "devices there cpu-2-cores, here nvidia-h200"),
        (tmp_path / "nothing", "no such folder of results"),
        (tmp_path / "empty", "holds no records"),
        (broken, "is not JSON"),
        (lacking, "a record lacks median_us, provider, shape"),
    ):
        assert main([str(a), str(new)]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
