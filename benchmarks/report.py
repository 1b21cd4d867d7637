"""Build REPORT.md, its plots and the table in README.md from the result files: `make report`.

If the environment variable RESULTS names a folder other than the committed one, the report is
written there and README.md is left unchanged.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from bounds import bound, duration, table
from costs import cost_sheet
from plots import by_shape, plot

HERE = Path(__file__).resolve().parent
COMMITTED = HERE / "results"
RESULTS = Path(os.environ.get("RESULTS") or COMMITTED).resolve()
AOT = COMMITTED / "aot"
README = HERE.parent / "README.md"
# The rows that README.md shows for each device, between its two marks: op, shape, and baselines, of
# which the first that was measured is used.
MARKS = "<!-- measured: by `make report` -->", "<!-- end -->"
RELEASE = ("release style compiled", "release style")
SHOWN = (
    ("nearest_code", "N=8192 K=16384 d=12", ("reference",)),
    ("nearest_code", "N=16384 K=16384 d=12", ("reference",)),
    ("nearest_code", "N=65536 K=16384 d=12", ("flash-kmeans",)),
    ("deformable_sample", "region encoder B=2, forward", ("reference",)),
    ("deformable_sample", "region encoder B=64, forward", ("reference",)),
    ("deformable_sample", "region encoder B=64, forward and backward", ("deformops",)),
    ("tokenizer", "encode B=64 bf16", ("reference",)),
    ("tokenizer", "decode B=64 bf16", ("reference",)),
    ("tokenizer", "encode B=64 tf32", ("release style", "reference")),
    ("tokenizer", "decode B=64 tf32", ("release style", "reference")),
    ("tokenizer", "encode B=4 fp32", ("release style",)),
    ("tokenizer", "decode B=4 fp32", ("release style",)),
    ("tokenizer", "encode B=4 bf16", ("reference",)),
    ("tokenizer", "decode B=4 bf16", ("reference",)),
    ("generate", "GPT-B B=2 guided, 256 codes", ("release style",)),
    ("generate", "GPT-L B=1 guided, 256 codes", RELEASE),
    ("generate", "GPT-L B=64 guided, 256 codes", RELEASE),
    ("end_to_end", "photos to cache, 512 photos bfloat16", ("reference",)),
    ("end_to_end", "photos to cache, 2 photos float32", ("reference",)),
    ("end_to_end", "classes to pictures, GPT-L B=64 guided bfloat16", ("reference",)),
    ("end_to_end", "classes to pictures, GPT-B B=1 guided float32", ("reference",)),
)


def commit_of(environment: dict) -> str:
    return (environment["commit"] or "no commit") + (" + changes" * environment["changed"])


def measured(path: Path) -> list[str]:
    """The section of the report for one op on one device."""
    content = json.loads(path.read_text())
    environment, ceilings = content["environment"], content["ceilings"]
    versions = ", ".join(f"{name} {value}" for name, value in environment["versions"].items())
    processor = environment.get("processor")
    # Older records have "x86_64" here, which says nothing.
    known = f" ({processor})" if processor and " " in processor else ""
    threads = f", {environment['threads']} threads" if environment["threads"] else ""
    lines = [
        f"### {path.stem}",
        "",
        f"{environment['device']}{known}{threads}; {versions}; commit {commit_of(environment)}; "
        f"{environment['date']}. Ceilings: copy {ceilings['copy_gb_s']} GB/s, "
        f"{ceilings['matmul_dtype']} product {ceilings['matmul_tflop_s']} TFLOP/s.",
        "",
    ]
    for note in content.get("notes", []):
        lines += [f"**{note}**" if content.get("outdated") and "rewritten" in note else note, ""]
    if not content.get("complete", True):
        lines += ["The run was cut off: not everything was measured.", ""]
    if failed := content.get("failed"):
        lines += [f"Failed, so not shown: {', '.join(failed)}.", ""]
    reasons: dict[str, list[str]] = {}
    for name, why in content.get("not_measured", {}).items():
        reasons.setdefault(why, []).append(name)
    if reasons:
        lines += ["Not measured:", ""]
        lines += [f"- {why}: {', '.join(f'`{n}`' for n in ns)}" for why, ns in reasons.items()]
        lines.append("")
    rows = [row for _, rs in by_shape(content["records"]).items() for row in record_rows(rs)]
    shown = [i for i in range(len(COLUMNS)) if any(row[i] not in ("", None) for row in rows)]
    head = [COLUMNS[i] for i in shown]
    lines += table(head, [[row[i] for i in shown] for row in rows])
    if plot(path, content):
        image = path.with_suffix(".png").relative_to(report_path().parent).as_posix()
        lines += ["", f"![{path.stem} on {environment['device']}]({image})"]
    if path.stem == "cache":
        lines += ["", *cost_sheet(content)]
    return [*lines, ""]


COLUMNS = [
    "shape", "provider", "median", "range", "x reference", "images/s", "bound by", "GB/s",
    "of the copy ceiling", "TFLOP/s", "of the product ceiling", "product ceiling of the dtype",
    "peak MiB", "wrong rows", "codes as the reference", "error", "error of the gradients", "timer",
    "commit, if another",
]  # fmt: skip


def spread(record: dict) -> str:
    """The range of the rounds; some records do not have the slowest round."""
    if record["min_us"] is None:
        return ""
    if record["max_us"] is None:
        return f"from {duration(record['min_us'])}"
    return f"{duration(record['min_us'])} to {duration(record['max_us'])}"


def record_rows(records: list[dict]) -> list[list[object]]:
    """The table rows of one shape; a cell is empty where the record has no value.

    A row is compared with the reference only if both were measured at one commit, by one clock.
    """
    references = [r for r in records if r["provider"] == "reference"]

    def ratio(record: dict) -> str:
        for base in references:
            if all(base.get(key) == record.get(key) for key in ("commit", "timer")):
                return f"{base['median_us'] / record['median_us']:.2f}"
        return ""

    def cell(record: dict, name: str, unit: str = "") -> str:
        value = record.get(name)
        return "" if value is None else f"{value}{unit}"

    def error(record: dict) -> str:
        value = record.get("max_error", record.get("error"))
        return "" if value is None else f"{value:.1e}"

    def gradients(record: dict) -> str:
        errors = record.get("gradient_errors", {})
        return ", ".join(f"{name} {value:.1e}" for name, value in errors.items())

    return [
        [
            r["shape"],
            r["provider"],
            duration(r["median_us"]),
            spread(r),
            ratio(r),
            cell(r, "images_s"),
            bound(r.get("percent_of_copy"), r.get("percent_of_matmul")),
            cell(r, "gb_s"),
            cell(r, "percent_of_copy", " %"),
            cell(r, "tflop_s"),
            cell(r, "percent_of_matmul", " %"),
            cell(r, "matmul_tflop_s"),
            cell(r, "peak_mib"),
            cell(r, "wrong_rows"),
            cell(r, "codes_as_reference") or cell(r, "codes_as_float32"),
            error(r),
            gradients(r),
            r["timer"],
            cell(r, "commit"),
        ]
        for r in records
    ]


def predicted(path: Path) -> list[str]:
    """The section of the report with the predictions for one chip."""
    content = json.loads(path.read_text())
    chip, versions = content["chip"], content["versions"]
    lines = [
        f"### {chip['name']} (sm_{chip['capability']})",
        "",
        f"Compiled with torch {versions['torch']}, triton {versions['triton']}; "
        f"{chip['multiprocessors']} multiprocessors at {chip['ghz']} GHz, "
        f"{chip['matrix_tflops']} TFLOP/s.",
        "",
    ]
    rows = []
    for name, kernel in content["kernels"].items():
        loop = kernel.get("main_loop")
        per = next((v for k, v in (loop or {}).items() if k.startswith("alu_per")), "")
        times = ("predicted_us_overlapped", "predicted_us_in_turns")
        rows.append(
            [
                name,
                kernel["registers"],
                kernel["spill_bytes"],
                kernel["shared_bytes"],
                kernel["occupancy"]["warps"],
                per,
                loop["problem"] if loop else "",
                *(f"{loop[key]} us" if loop else "" for key in times),
                measured_beside(chip["name"], name, loop["problem"]) if loop else "",
            ]
        )
    head = ["kernel", "registers", "spilled", "shared", "warps", "ALU per unit", "problem"]
    head += ["predicted, overlapped", "predicted, in turns", "measured, whole op"]
    return [*lines, *table(head, rows), ""]


def measured_beside(chip: str, kernel: str, problem: str) -> str:
    """Measured times of whole calls that run this kernel on this problem and chip, if any."""
    op, name = kernel.split()[0].split(".")
    found = []
    for path in sorted(RESULTS.glob(f"*{chip.lower()}*/{op}*.json")):
        content = json.loads(path.read_text())
        if content.get("outdated"):
            continue  # These times are of older kernels than the machine code.
        for record in content["records"]:
            # Records of tuning runs have the name of one kernel as their provider.
            takes_it = record["provider"] in ("fast", name.removeprefix("_"))
            takes_it &= ("backward" in record["shape"]) == ("grad" in name)
            if takes_it and record.get("problem", record["shape"]) == problem:
                direction = record["shape"].partition(", ")[2]
                time = duration(record["median_us"])
                found.append(f"{time} ({direction})" if direction else time)
    return ", ".join(found)


def best(record: dict) -> tuple[float, str]:
    """Microseconds of the best round: other load on the machine can only add to it."""
    if record["min_us"] is None:  # Only the median was kept.
        return record["median_us"], f"{duration(record['median_us'])} (median)"
    return record["min_us"], duration(record["min_us"])


def readme_rows(device: Path) -> tuple[list[list[object]], list[str]]:
    """The rows of README.md's table that this device has results for, and notes about them."""
    rows, notes = [], []
    for op, shape, baselines in SHOWN:
        path = device / f"{op}.json"
        if not path.exists():
            continue
        content = json.loads(path.read_text())
        records = {r["provider"]: r for r in by_shape(content["records"]).get(shape, [])}
        baseline = next((name for name in baselines if name in records), None)
        if baseline is None or "fast" not in records:
            continue
        if records[baseline]["timer"] != records["fast"]["timer"]:
            continue  # Times from two clocks cannot be divided.
        if baseline == "reference" and records[baseline].get("commit") != records["fast"].get(
            "commit"
        ):
            continue  # Unlike other people's code, ours changes.
        (before, said), (after, ours) = best(records[baseline]), best(records["fast"])
        # enable() runs other kernels today, so the row says so.
        old = " (old kernels)" * bool(content.get("outdated"))
        row = [f"`{op}`{old}", shape, f"{said} ({baseline})", ours, f"{before / after:.1f} x"]
        rows.append([device.name, commit_of(content["environment"]), *row])
        if content.get("notes"):
            notes.append(f"- {device.name}, `{op}`: {content['notes'][0]}")
    return rows, list(dict.fromkeys(notes))


def with_table(text: str, devices: list[Path]) -> str:
    """README.md's text, with the table inserted between its marks."""
    rows, notes = [], []
    for device in devices:
        found, said = readme_rows(device)
        rows += found
        notes += said
    head = ["device", "commit", "what", "shape", "baseline", "enabled"]
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    if not (rest and after):
        raise SystemExit(f"{README}: the marks {MARKS} are missing")
    lines = [MARKS[0], "", *table([*head, "faster"], rows), "", *notes, *([""] * bool(notes))]
    return before + "\n".join([*lines, MARKS[1]]) + after


def report_path() -> Path:
    """REPORT.md: next to the committed results, or inside any other results folder."""
    return HERE / "REPORT.md" if RESULTS == COMMITTED else RESULTS / "REPORT.md"


# Folders of results that do not belong to a device.
KINDS = ("ablation", "aot", "precision")


def devices_of(results: Path) -> list[Path]:
    """The devices' folders of results, GPUs first."""
    found = [path for path in results.iterdir() if path.is_dir() and path.name not in KINDS]
    return sorted(found, key=lambda path: (path.name.startswith("cpu"), path.name))


def whole_report(devices: list[Path]) -> str:
    """Return the text of the report, and draw the plot of each op along the way."""
    lines = ["# Benchmarks", "", f"Made by `make report` from `{RESULTS.name}/`; do not edit.", ""]
    lines += [
        "`bound by` names what keeps the device busy for at least a quarter of the time: bytes at "
        "the rate of a copy, or operations at the rate of a matrix product. `latency` means that "
        "neither does: the call waits for launches or for dependent loads, or issues instructions "
        "that are not floating-point operations.",
        "",
    ]
    for device in devices:
        lines += [f"## Measured: {device.name}", ""]
        for path in sorted(device.glob("*.json")):
            lines += measured(path)
    if not any(not device.name.startswith("cpu") for device in devices):
        lines += ["No GPU was measured here: run `make gpu-report` on a machine with one.", ""]
    if files := sorted(AOT.glob("*.json")):
        lines += [
            "## Predicted from the machine code",
            "",
            "Not measured, and for innermost loops only. *overlapped* is the time of the busier of "
            "the ALU and the matrix unit; *in turns* is the sum of both times. Both are lower "
            "bounds: they include no time spent waiting for memory. At commit 29c1965, whole calls "
            "on an H200 took two to four times as long as predicted.",
            "",
        ]
        for path in files:
            lines += predicted(path)
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    if not RESULTS.is_dir():
        raise SystemExit(f"{RESULTS}: not there; `make bench` measures, and writes it")
    report, devices = report_path(), devices_of(RESULTS)
    files = [report, f"the plots in {RESULTS}"]
    if RESULTS == COMMITTED:
        files.append(f"the table in {README}")
    # Announced first: these may be tracked files of the clone.
    print("writes", *files, sep="\n  ")
    report.write_text(whole_report(devices), encoding="utf-8")
    if RESULTS == COMMITTED:
        README.write_text(with_table(README.read_text(encoding="utf-8"), devices), encoding="utf-8")


if __name__ == "__main__":
    main()
