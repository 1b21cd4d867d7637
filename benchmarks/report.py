"""REPORT.md, its plots and README.md's table from the result files alone: `make report`."""

from __future__ import annotations

import json
import math
from pathlib import Path

from plots import by_shape, plot

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
REPORT = HERE / "REPORT.md"
README = HERE.parent / "README.md"
# What README.md shows of each device, between its two marks: op, shape, baseline and ours.
MARKS = "<!-- measured: by `make report` -->", "<!-- end -->"
SHOWN = (
    ("nearest_code", "N=8192 K=16384 d=12", "reference", "fast"),
    ("nearest_code", "N=65536 K=16384 d=12", "reference", "fast"),
    ("deformable_sample", "region encoder B=2, forward", "reference", "fast"),
    ("deformable_sample", "region encoder B=64, forward", "reference", "fast"),
    ("deformable_sample", "region encoder B=64, forward and backward", "reference", "fast"),
    ("generate", "GPT-B B=2 guided, 256 codes", "release style", "fast"),
    ("generate", "GPT-L B=1 guided, 256 codes", "release style compiled", "fast"),
    ("generate", "GPT-L B=64 guided, 256 codes", "release style compiled", "fast"),
)


def table(head: list[str], rows: list[list[object]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]


def duration(microseconds: float) -> str:
    if microseconds >= 1e4:
        return f"{microseconds / 1e3:.1f} ms"
    return f"{microseconds:.1f} us"


def measured(path: Path) -> list[str]:
    """One op on one device."""
    content = json.loads(path.read_text())
    environment, ceilings = content["environment"], content["ceilings"]
    versions = ", ".join(f"{name} {value}" for name, value in environment["versions"].items())
    commit = (environment["commit"] or "no commit") + (" + changes" * environment["changed"])
    lines = [
        f"### {path.stem}",
        "",
        f"{environment['device']}, {environment['threads']} threads; {versions}; {commit}; "
        f"{environment['date']}. Ceilings measured in the same run: copy "
        f"{ceilings['copy_gb_s']} GB/s, {ceilings['matmul_dtype']} product "
        f"{ceilings['matmul_tflop_s']} TFLOP/s.",
        "",
    ]
    if failed := content.get("failed"):
        lines += [f"Failed, so not shown: {', '.join(failed)}.", ""]
    rows = []
    for shape, records in by_shape(content["records"]).items():
        base = next((r["median_us"] for r in records if r["provider"] == "reference"), None)
        for r in records:
            rows.append(
                [
                    shape,
                    r["provider"],
                    duration(r["median_us"]),
                    f"{duration(r['min_us'])} to {duration(r['max_us'])}",
                    f"{base / r['median_us']:.2f}" if base else "",
                    r["gb_s"],
                    r["tflop_s"],
                    f"{r['percent_of_matmul']} %",
                    "" if r["peak_mib"] is None else r["peak_mib"],
                    r.get("wrong_rows", ""),
                    r["timer"],
                ]
            )
    head = ["shape", "provider", "median", "range", "x reference", "GB/s", "TFLOP/s"]
    head += ["of the product ceiling", "peak MiB", "wrong rows", "timer"]
    lines += table(head, rows)
    if plot(path, content):
        image = path.with_suffix(".png").relative_to(HERE).as_posix()
        lines += ["", f"![{path.stem} on {environment['device']}]({image})"]
    if path.stem == "cache":
        lines += ["", *cost_sheet(content)]
    return [*lines, ""]


# Views per second of one GPU to reckon with; assumed, not measured.
GPU_RATES = (400, 1000, 2000)
GPUS = 8
# Bytes of a view's tokens, and of a picture's index, label and status.
VIEW_BYTES, PICTURE_BYTES = 512, 13
DATA_SETS = {"ImageNet-1k": 1_281_167, "100 M images": 10**8, "1 B images": 10**9}
VIEW_SETS = {"center": 1, "ten-crop": 10}


def cost_sheet(content: dict) -> list[str]:
    """Time, disk and machines for whole data sets, from the rates of a cache.json."""
    found: dict[str, tuple[int, float]] = {}
    for record in content["records"]:
        if record["provider"] == "pipeline":
            name, workers = record["shape"].split(" workers=")
            # With all cores at work, which is how a cache is made.
            found[name] = max(found.get(name, (0, 0.0)), (int(workers), record["images_s"]))
    rates = {name: rate / workers for name, (workers, rate) in found.items()}
    rows, machines, cores = [], [], []
    for name, pictures in DATA_SETS.items():
        for declared, views in VIEW_SETS.items():
            disk = pictures * (VIEW_BYTES * views + PICTURE_BYTES) / 1e9
            core_hours = pictures / rates[declared] / 3600
            hours = [pictures * views / rate / 3600 for rate in GPU_RATES]
            cells = [f"{disk:,.1f} GB", f"{core_hours:,.1f}", *(f"{hour:,.1f}" for hour in hours)]
            rows.append([name, views, *cells])
            needed = [[math.ceil(h / GPUS / 24 / days) for days in (1, 7)] for h in hours]
            machines.append([name, views, *(f"{day:,} / {week:,}" for day, week in needed)])
    for declared, views in VIEW_SETS.items():
        cores.append([declared, *(math.ceil(r / (rates[declared] * views)) for r in GPU_RATES)])
    at = [f"{rate} views/s" for rate in GPU_RATES]
    head = ["data set", "views", "tokens on disk", "core hours", *(f"GPU hours, {a}" for a in at)]
    return [
        "#### What whole data sets cost",
        "",
        "Computed, not measured: the pictures per second and core above, with all cores at work, "
        "times cores; the views per second of a GPU are assumed.",
        "",
        *table(head, rows),
        "",
        f"Machines of {GPUS} such GPUs that are done in a day / in a week:",
        "",
        *table(["data set", "views", *at], machines),
        "",
        "Cores that keep one GPU busy:",
        "",
        *table(["views", *at], cores),
    ]


def predicted(path: Path) -> list[str]:
    """What the machine code of one chip says."""
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
    """Times of whole calls that run this kernel on this problem and chip, where there are any."""
    op, name = kernel.split()[0].split(".")
    found = []
    for path in sorted(RESULTS.glob(f"*{chip.lower()}*/{op}*.json")):
        for record in json.loads(path.read_text())["records"]:
            # Tuning runs name one kernel as their provider.
            takes_it = record["provider"] in ("fast", name.removeprefix("_"))
            takes_it &= ("backward" in record["shape"]) == ("grad" in name)
            if takes_it and record.get("problem", record["shape"]) == problem:
                direction = record["shape"].partition(", ")[2]
                time = duration(record["median_us"])
                found.append(f"{time} ({direction})" if direction else time)
    return ", ".join(found)


def readme_rows(device: Path) -> list[list[object]]:
    """The lines of README.md's table that this device has results for."""
    rows = []
    for op, shape, baseline, ours in SHOWN:
        path = device / f"{op}.json"
        if not path.exists():
            continue
        records = by_shape(json.loads(path.read_text())["records"]).get(shape, [])
        # The best round of each: what else the machine does only ever adds to it.
        times = {record["provider"]: record["min_us"] for record in records}
        if baseline in times and ours in times:
            before, after = times[baseline], times[ours]
            row = [f"`{op}`", shape, f"{duration(before)} ({baseline})", duration(after)]
            rows.append([device.name, *row, f"{before / after:.1f} x"])
    return rows


def write_readme(devices: list[Path]) -> None:
    """Put the table between README.md's marks."""
    rows = [row for device in devices for row in readme_rows(device)]
    head = ["device", "what", "shape", "baseline, best round", "enabled, best round", "faster"]
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    if not (rest and after):
        raise SystemExit(f"{README}: the marks {MARKS} are missing")
    lines = "\n".join([MARKS[0], "", *table(head, rows), "", MARKS[1]])
    README.write_text(before + lines + after, encoding="utf-8")


def main() -> None:
    lines = ["# Benchmarks", "", "Made by `make report` from `results/`; do not edit.", ""]
    devices = [path for path in sorted(RESULTS.iterdir()) if path.is_dir() and path.name != "aot"]
    for device in devices:
        lines += [f"## Measured: {device.name}", ""]
        for path in sorted(device.glob("*.json")):
            lines += measured(path)
    if not any("cpu" not in device.name for device in devices):
        lines += ["No GPU has been measured yet: `make gpu-report` on a machine that has one.", ""]
    if files := sorted((RESULTS / "aot").glob("*.json")):
        lines += [
            "## Predicted from the machine code",
            "",
            "Not measured. Main loops only: overlapped is the busier of the ALU and the matrix "
            "unit, in turns is their sum.",
            "",
        ]
        for path in files:
            lines += predicted(path)
    REPORT.write_text("\n".join(lines).rstrip() + "\n")
    write_readme(devices)
    print(f"wrote {REPORT} and the table in {README}")


if __name__ == "__main__":
    main()
