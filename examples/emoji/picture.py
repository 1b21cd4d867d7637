"""Put the demo's images side by side, for the README.

examples/demo.sh demo_out && python examples/emoji/picture.py demo_out docs/emoji.jpg
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

GAP = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, help="what demo.sh wrote")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    names = ("reconstruction.png", "guided/samples.png")
    parts = [Image.open(options.demo / name).convert("RGB") for name in names]
    width = sum(part.width for part in parts) + GAP * (len(parts) - 1)
    canvas = Image.new("RGB", (width, max(part.height for part in parts)), "white")
    left = 0
    for part in parts:
        canvas.paste(part, (left, 0))
        left += part.width + GAP
    canvas.save(options.out, quality=92)


if __name__ == "__main__":
    main()
