"""The report shows what the result files hold, and what they were measured with."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
README = "# Title\n<!-- measured: by `make report` -->\nold\n<!-- end -->\nrest\n"


def record(provider: str, shape: str, time: float, **facts: object) -> dict[str, object]:
    blank = dict.fromkeys(("gb_s", "tflop_s", "percent_of_copy", "percent_of_matmul", "peak_mib"))
    times = {"median_us": time, "min_us": time, "max_us": time}
    return {"provider": provider, "shape": shape, "timer": "wall", **times, **blank, **facts}


def write(folder: Path, op: str, records: list[dict], commit: str = "abc1234", **more: object):
    environment = {
        "device": folder.name, "threads": 2, "versions": {"torch": "2.14.1"}, "commit": commit,
        "changed": False, "date": "2026-11-26",
    }  # fmt: skip
    ceilings = {"copy_gb_s": 4300.0, "matmul_tflop_s": 800, "matmul_dtype": "bfloat16"}
    content = {"environment": environment, "ceilings": ceilings, "records": records, **more}
    folder.mkdir(exist_ok=True)
    (folder / f"{op}.json").write_text(json.dumps(content))


@pytest.fixture
def report(tmp_path: Path, monkeypatch):
    """Load the report's module, with its own results folder."""
    monkeypatch.delenv("RESULTS", raising=False)
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location("report_under_test", BENCHMARKS / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(module, "plot", lambda path, content: False)
    (tmp_path / "results" / "nvidia-h200").mkdir(parents=True)
    return module


@pytest.mark.parametrize(
    ("kernel", "problem", "shown"),
    [
        ("nearest_code._screen d=12", "N=65536 K=16384 d=12", "151.0 us"),
        ("nearest_code._screen d=8", "N=65536 K=16384 d=8", ""),
        ("deformable_sample._gather bf16", "B=64", "99.0 us (forward)"),
        ("deformable_sample._grad_value bf16", "B=64", "400.0 us (forward and backward)"),
        ("decode_attention._decode", "GPT-L", ""),
    ],
)
def test_measured_times_stand_beside_the_predicted_of_the_same_kernels(
    report, kernel, problem, shown
):
    device = report.RESULTS / "nvidia-h200"
    nearest = [record("fast", "N=65536 K=16384 d=12", 151), record("reference", problem, 9000)]
    regions = [
        record("fast", "regions, forward", 99, problem="B=64"),
        record("fast", "regions, forward and backward", 400, problem="B=64"),
    ]
    write(device, "nearest_code", nearest)
    write(device, "deformable_sample", regions)
    write(device, "decode_attention", [record("fast", "GPT-L", 4)], outdated=True)
    assert report.measured_beside("H200", kernel, problem) == shown
    assert report.measured_beside("B200", kernel, problem) == ""


def test_readme_has_gpus_first_and_says_what_is_old(report):
    shape = "N=16384 K=16384 d=12"
    both = [record("reference", shape, 3600.0), record("fast", shape, 400.0)]
    note = "The kernels have been rewritten since."
    write(report.RESULTS / "nvidia-h200", "nearest_code", both, outdated=True, notes=[note])
    # Half of a comparison is no comparison, whatever another device has.
    write(report.RESULTS / "cpu-2-cores", "nearest_code", both[:1])
    images = "GPT-L B=1 guided, 256 codes"
    whole = [record("release style", images, 4e6), record("fast", images, 2e5, min_us=None)]
    many = images.replace("B=1", "B=64")
    clocks = [record("release style", many, 4e6), record("fast", many, 2e5, timer="another")]
    write(report.RESULTS / "cpu-2-cores", "generate", [*whole, *clocks], commit="def5678")
    lines = report.with_table(README, report.devices_of(report.RESULTS)).splitlines()
    assert lines[0] == "# Title" and lines[-1] == "rest"
    rows = [line for line in lines if line.startswith(("| nvidia", "| cpu"))]
    assert rows == [
        f"| nvidia-h200 | abc1234 | `nearest_code` (old kernels) | {shape} | 3.60 ms (reference) "
        "| 400.0 us | 9.0 x |",
        f"| cpu-2-cores | def5678 | `generate` | {images} | 4.00 s (release style) "
        "| 200.0 ms (median) | 20.0 x |",
    ]
    assert f"- nvidia-h200, `nearest_code`: {note}" in lines


def test_one_op_says_its_bound_what_is_missing_and_leaves_out_empty_columns(report):
    device = report.RESULTS / "nvidia-h200"
    records = [record("fast", "s", 5000.0, bound="bytes", gb_s=2150.0, percent_of_copy=50.0)]
    missing = {"bench_x[peer]": "peer is not installed"}
    write(device, "x", records, not_measured=missing, complete=False, failed=["bench_x[a]"])
    text = "\n".join(report.measured(device / "x.json"))
    assert "| shape | provider | median | range | bound by | GB/s | of the copy ceiling |" in text
    assert "| s | fast | 5.00 ms | 5.00 ms to 5.00 ms | bytes | 2150.0 | 50.0 % | wall |" in text
    assert "peak MiB" not in text and "- peer is not installed: `bench_x[peer]`" in text
    assert "commit abc1234" in text and "cut off" in text and "bench_x[a]" in text


def test_images_a_second_and_a_ceiling_of_the_dtype_have_their_columns(report):
    device = report.RESULTS / "nvidia-h200"
    facts = {"images_s": 1005.4, "codes_as_float32": 0.9473, "matmul_tflop_s": 790.1}
    write(device, "tokenizer", [record("fast", "encode B=64 bf16", 63660.0, **facts)])
    text = "\n".join(report.measured(device / "tokenizer.json"))
    head = "| images/s | product ceiling of the dtype | codes as the reference | timer |"
    assert head in text and "| 1005.4 | 790.1 | 0.9473 | wall |" in text


@pytest.mark.parametrize(("batches", "panels"), [((1,), 1), ((1, 64), 2)])
def test_the_plot_of_generation_has_no_panel_with_a_single_batch(
    tmp_path, monkeypatch, batches, panels
):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.syspath_prepend(BENCHMARKS)
    import plots

    made = []
    monkeypatch.setattr(pyplot, "close", made.append)
    facts = {"codes": 256, "gb_s": 100.0}
    records = [
        record("fast", f"GPT-L B={B} guided", 1e5, **{**facts, "images": B}) for B in batches
    ]
    write(tmp_path / "nvidia-x", "generate", records)
    path = tmp_path / "nvidia-x" / "generate.json"
    assert plots.plot(path, json.loads(path.read_text()))
    (figure,) = made
    assert len(figure.axes) == panels
    for axes in figure.axes:  # Beside the points, not on them.
        legend = axes.get_legend().get_window_extent()
        assert legend.x0 >= axes.get_window_extent().x1
    monkeypatch.undo()
    pyplot.close(figure)


def test_of_other_results_the_report_lies_among_them_and_the_repository_stays(tmp_path):
    pytest.importorskip("matplotlib")
    write(tmp_path / "nvidia-x", "x", [record("fast", "s", 5.0, gb_s=1.0)])
    files = [BENCHMARKS / "REPORT.md", BENCHMARKS.parent / "README.md"]
    before = [path.read_bytes() for path in files]
    environment = {**os.environ, "RESULTS": str(tmp_path)}
    command = [sys.executable, str(BENCHMARKS / "report.py")]
    said = subprocess.run(command, env=environment, check=True, cwd=tmp_path, capture_output=True)
    assert str(tmp_path / "REPORT.md") in said.stdout.decode()
    assert "README" not in said.stdout.decode()
    text = (tmp_path / "REPORT.md").read_text()
    assert "## Measured: nvidia-x" in text and "![x on nvidia-x](nvidia-x/x.png)" in text
    assert [path.read_bytes() for path in files] == before


def test_what_is_committed_is_what_make_report_makes(report, monkeypatch):
    """No number was typed by hand, and none remains of deleted records."""
    monkeypatch.setattr(report, "RESULTS", report.COMMITTED)
    monkeypatch.setattr(report, "plot", lambda path, content: path.with_suffix(".png").exists())
    devices = report.devices_of(report.COMMITTED)
    text = (BENCHMARKS / "REPORT.md").read_text(encoding="utf-8")
    assert report.whole_report(devices) == text, "run `make report`"
    text = report.README.read_text(encoding="utf-8")
    assert report.with_table(text, devices) == text, "run `make report`"


def test_the_committed_records_are_of_one_device_and_commit_a_file():
    files = sorted((BENCHMARKS / "results").glob("nvidia-*/*.json"))
    assert files
    for path in files:
        content = json.loads(path.read_text())
        assert content["environment"]["device"] == path.parent.name
        assert content["environment"]["commit"] and content["environment"]["date"]
        copy = content["ceilings"]["copy_gb_s"]
        for r in content["records"]:
            assert r["op"] == path.stem
            if r["gb_s"] is not None:
                assert abs(r["percent_of_copy"] - 100 * r["gb_s"] / copy) < 0.11


def test_the_ablations_page_has_the_table_of_its_records():
    pytest.importorskip("matplotlib")
    folder = BENCHMARKS / "ablation"
    plot = runpy.run_path(str(folder / "plot.py"))
    files = sorted((BENCHMARKS / "results" / "ablation").glob("*-*.json"))
    records = [json.loads(file.read_text()) for file in files]
    records.sort(key=lambda record: (record["seed"], record["variant"]))
    assert len(records) >= 6 and plot["table"](records, 0.25) in (folder / "README.md").read_text()
