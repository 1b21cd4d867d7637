"""REPORT.md and its plots from the result files, and from nothing else: `make report`."""

from __future__ import annotations

import json
import math
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
REPORT = HERE / "REPORT.md"


def table(head: list[str], rows: list[list[object]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]


def duration(microseconds: float) -> str:
    if microseconds >= 1e4:
        return f"{microseconds / 1e3:.1f} ms"
    return f"{microseconds:.1f} us"


def by_shape(records: list[dict]) -> dict[str, list[dict]]:
    shapes: dict[str, list[dict]] = {}
    for record in records:
        shapes.setdefault(record["shape"], []).append(record)
    return shapes


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


def plot(path: Path, content: dict) -> bool:
    """Median times as grouped bars beside the JSON file; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = by_shape(content["records"])
    providers = list(dict.fromkeys(record["provider"] for record in content["records"]))
    figure, axes = pyplot.subplots(figsize=(max(6, 1.4 * len(shapes)), 4), layout="constrained")
    width = 0.8 / len(providers)
    for i, provider in enumerate(providers):
        places, times = [], []
        for j, records in enumerate(shapes.values()):
            found = [r["median_us"] for r in records if r["provider"] == provider]
            places += [j + (i - (len(providers) - 1) / 2) * width] * len(found)
            times += [time / 1e3 for time in found]
        axes.bar(places, times, width, label=provider)
    axes.set_yscale("log")
    axes.set_ylabel("median time, ms")
    axes.set_xticks(range(len(shapes)), [shape.replace(" ", "\n") for shape in shapes])
    axes.set_title(f"{path.stem}, {content['environment']['device']}")
    axes.legend()
    figure.savefig(path.with_suffix(".png"), dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return True


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
    print(f"wrote {REPORT}")


if __name__ == "__main__":
    main()
