"""Load a generator of either kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .model import Generator
from .rar import RAR
from .transformer import GPT


def load_generator(source: str | Path, **options: Any) -> Generator:
    """Load the `GPT` or `RAR` that a folder or hub repo holds; its config.json tells which.

    Args:
        source, options: as for `HubModel.from_pretrained`, which raises the same errors.
    """
    kind = RAR if "mlp_dim" in GPT.read_config(source, **options) else GPT
    return kind.from_pretrained(source, **options)
