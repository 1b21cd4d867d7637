"""Load a generator of either kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .model import Generator
from .rar import RAR
from .transformer import GPT

# Options of `from_pretrained` that do not say where the files are.
OTHERS = ("config", "map_location")


def load_generator(source: str | Path, **options: Any) -> Generator:
    """Load the `GPT` or `RAR` that a folder or hub repo holds; its config.json tells which.

    Args:
        source, options: as for `HubModel.from_pretrained`, which raises the same errors.
    """
    download = {name: value for name, value in options.items() if name not in OTHERS}
    kind = RAR if "mlp_dim" in GPT.read_config(source, **download) else GPT
    return kind.from_pretrained(source, **options)
