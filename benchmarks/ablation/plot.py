"""Table and plot of `run.py`'s results: steps until a share of the images is recognised.

python benchmarks/ablation/plot.py OUT [--accuracy 0.5]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLUMNS = ("accuracy", "accuracy_guided")


def reached(curve: list[dict], column: str, accuracy: float) -> int | None:
    """Return the first step at which the share of recognised images reached ``accuracy``."""
    return next((point["step"] for point in curve if point[column] >= accuracy), None)


def table(records: list[dict], accuracy: float) -> str:
    """One row per variant with one number per seed; "never" for a run that never got there."""
    lines = [
        "| tokenizer | seeds | PSNR, held out | their group recognised | generated | guided | "
        f"guided steps to {accuracy:.0%} |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant in dict.fromkeys(record["variant"] for record in records):
        runs = [record for record in records if record["variant"] == variant]
        made, last = ([run["reconstructed"] for run in runs], [run["curve"][-1] for run in runs])
        steps = [reached(run["curve"], "accuracy_guided", accuracy) for run in runs]
        cells = [
            [f"{run['seed']}" for run in runs],
            [f"{one['psnr']:.1f} dB" for one in made],
            [f"{one['accuracy']:.0%}" for one in made],
            *([f"{point[column]:.0%}" for point in last] for column in COLUMNS),
            ["never" if step is None else f"{step:,}" for step in steps],
        ]
        lines.append(f"| {' | '.join([variant, *map(', '.join, cells)])} |")
    return "\n".join(lines) + "\n"


def draw(records: list[dict], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    variants = dict.fromkeys(record["variant"] for record in records)
    colours = {variant: f"C{number}" for number, variant in enumerate(variants)}
    for axis, column in zip(axes, COLUMNS, strict=True):
        named = set()
        for record in records:
            steps = [point["step"] for point in record["curve"]]
            values = [point[column] for point in record["curve"]]
            label = None if record["variant"] in named else record["variant"]
            axis.plot(steps, values, color=colours[record["variant"]], alpha=0.8, label=label)
            named.add(record["variant"])
        axis.axhline(1 / 9, color="grey", linestyle=":", linewidth=1)
        axis.set_title("without guidance" if column == "accuracy" else "with guidance")
        axis.set_xlabel("steps of the generator")
    axes[0].set_ylabel("generated pictures whose group is recognised")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--accuracy", type=float, default=0.5, help="(%(default)s)")
    options = parser.parse_args()
    files = sorted(options.out.glob("*-*.json"))
    if not files:
        parser.error(f"{options.out}: run.py has finished no run there")
    records = sorted(
        (json.loads(file.read_text()) for file in files), key=lambda r: (r["seed"], r["variant"])
    )
    text = table(records, options.accuracy)
    (options.out / "table.md").write_text(text)
    draw(records, options.out / "curves.png")
    print(text, end="")


if __name__ == "__main__":
    main()
