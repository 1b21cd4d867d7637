"""Cost of tokenising whole data sets, from the rates that `bench_cache` measured."""

from __future__ import annotations

import math

from bounds import table

# Assumed rates of one GPU in views per second; not measured.
GPU_RATES = (400, 1000, 2000)
GPUS = 8
# Bytes of the tokens of a view, and of the index, label and status of an image.
VIEW_BYTES, PICTURE_BYTES = 512, 13
DATA_SETS = {"ImageNet-1k": 1_281_167, "100 M images": 10**8, "1 B images": 10**9}
VIEW_SETS = {"center": 1, "ten-crop": 10}


def cost_sheet(content: dict) -> list[str]:
    """Tabulate time, disk space and machines for whole data sets, by the rates in a cache.json."""
    found: dict[str, tuple[int, float]] = {}
    for record in content["records"]:
        if record["provider"] == "pipeline":
            name, workers = record["shape"].split(" workers=")
            # The rate with all cores at work, as when a cache is made.
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
        "#### Cost of whole data sets",
        "",
        "Computed, not measured: the images per second and core above, with all cores at work, "
        "times the number of cores; the views per second of a GPU are assumed.",
        "",
        *table(head, rows),
        "",
        f"Machines with {GPUS} such GPUs needed to finish in a day / in a week:",
        "",
        *table(["data set", "views", *at], machines),
        "",
        "Cores needed to keep one GPU busy:",
        "",
        *table(["views", *at], cores),
    ]
