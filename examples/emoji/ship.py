"""Store a trained tokenizer and generator in half precision, as the package ships them.

    python examples/emoji/ship.py OUT vfmtok_fast/pretrained/emoji

OUT is the folder that `run.sh` wrote. Loading converts the weights back to float32.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder of run.sh")
    parser.add_argument("package", type=Path, help="gets tokenizer/ and generator/")
    options = parser.parse_args()
    for name in ("tokenizer", "generator"):
        source, target = options.out / name / "model", options.package / name
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / CONFIG, target / CONFIG)
        tensors = load_file(source / WEIGHTS)
        save_file({key: value.half() for key, value in tensors.items()}, target / WEIGHTS)
        (target / WEIGHTS).chmod(0o644)
        print(f"{target / WEIGHTS}: {(target / WEIGHTS).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
