"""`vfmtok-fast doctor`."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform

from .output import say

SUMMARY = "show what is installed, what will run fast here, and why the rest will not"

# Optional packages: the extra that installs each, and what it is for.
OPTIONAL = {
    "ray": ("ray", "`cache --engine ray`"),
    "lmdb": ("lmdb", "pictures in the authors' LMDB"),
    "lpips": ("train", "the linear layers of LPIPS, while training the tokenizer"),
    "tensorboard": ("train", "`train-tokenizer --tensorboard`"),
    "torch-fidelity": ("eval", "`evaluate`: the network of FID"),
    "matplotlib": ("eval", "`evaluate sweep`: the plot"),
    "pillow-heif": ("heif", "pictures named .heic or .heif"),
    "s3fs": ("cloud", "caches at s3://"),
    "gcsfs": ("cloud", "caches at gs://"),
    "flash-attn": ("flash-attn", "decode_attention where Triton cannot take it"),
    "xformers": ("xformers", "decode_attention where Triton cannot take it"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This command has no arguments."""


def run(options: argparse.Namespace) -> int:
    import torch

    from .. import switch

    say(f"python {platform.python_version()} on {platform.platform()}")
    for name in ("torch", "triton", "torchvision", "timm", "pillow", "safetensors", "pyarrow"):
        try:
            say(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            say(f"{name} is not installed")
    for name, (extra, use) in OPTIONAL.items():
        try:
            say(f"{name} {importlib.metadata.version(name)}: {use}")
        except importlib.metadata.PackageNotFoundError:
            say(f"{name} is not installed: {use}; pip install 'vfmtok-fast[{extra}]'")
    say(f"CPU: {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    if not torch.cuda.is_available():
        say("GPU: none that torch can use, so no Triton kernel will run")
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        say(
            f"GPU {i}: {found.name}, {found.total_memory / 2**30:.0f} GiB, "
            f"compute capability {found.major}.{found.minor}"
        )
    say("")
    say("With vfmtok_fast.enable(), and in every command without --no-fast:")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in switch.status().ops:
        say(f"  {name}: {switch.forecast(name, device)}")
    for line in switch.tables():
        say(f"  {line}")
    return 0
