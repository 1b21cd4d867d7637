"""Plots of the result files, for `report.py`."""

from __future__ import annotations

from pathlib import Path


def by_shape(records: list[dict]) -> dict[str, list[dict]]:
    shapes: dict[str, list[dict]] = {}
    for record in records:
        shapes.setdefault(record["shape"], []).append(record)
    return shapes


# With more bars per shape, the bars cannot be told apart.
MOST_PROVIDERS = 9


def plot(path: Path, content: dict) -> bool:
    """Plot median times as grouped bars, next to the JSON file.

    Returns False without matplotlib, or where such a plot would be unreadable.
    """
    providers = list(dict.fromkeys(record["provider"] for record in content["records"]))
    if len(providers) > MOST_PROVIDERS and path.stem != "generate":
        return False
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    if path.stem == "generate":
        _generation(pyplot, path, content)
        return True
    shapes = by_shape(content["records"])
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
    # Beside the bars, so that the legend hides none.
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path.with_suffix(".png"), dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return True


def _generation(pyplot, path: Path, content: dict) -> None:
    """Plot milliseconds per step with the time to read its bytes, and images/s by batch size."""
    records, copy = content["records"], content["ceilings"]["copy_gb_s"]
    # With a single batch size, the second panel would show nothing.
    sizes = {record["images"] for record in records if record["codes"] == 256}
    panels = 1 + (len(sizes) > 1)
    figure, axes = pyplot.subplots(
        panels, figsize=(11, 4.5 * panels), layout="constrained", squeeze=False
    )
    steps, batches = axes[0, 0], axes[-1, 0]
    shapes = by_shape(records)
    providers = list(dict.fromkeys(record["provider"] for record in records))
    for provider in providers:
        found = [(j, r) for j, rs in enumerate(shapes.values()) for r in rs
                 if r["provider"] == provider]  # fmt: skip
        times = [r["median_us"] / 1e3 / r["codes"] for _, r in found]
        steps.plot([j for j, _ in found], times, "o", label=provider)
        whole = [r for _, r in found if r["codes"] == 256 and batches is not steps]
        for preset in sorted({r["shape"].split()[0] for r in whole}):
            ours = [r for r in whole if r["shape"].split()[0] == preset]
            points = sorted((r["images"], 1e6 * r["images"] / r["median_us"]) for r in ours)
            batches.plot(*zip(*points, strict=True), "o-", label=f"{preset}, {provider}")
    # The bytes of a record are its rate times its time.
    first = [rs[0] for rs in shapes.values()]
    floors = [r["gb_s"] / copy * r["median_us"] / 1e3 / r["codes"] for r in first]
    steps.plot(range(len(shapes)), floors, "k_", markersize=20, label="bytes at the copy rate")
    steps.set_xticks(range(len(shapes)), [shape.replace(" ", "\n") for shape in shapes])
    steps.set(yscale="log", ylabel="ms per step")
    if batches is not steps:
        batches.set(xscale="log", yscale="log")
        batches.set(xlabel="images at a time", ylabel="images per second")
    for panel in {steps, batches}:
        panel.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.suptitle(f"generate, {content['environment']['device']}")
    figure.savefig(path.with_suffix(".png"), dpi=110, metadata={"Software": None})
    pyplot.close(figure)
