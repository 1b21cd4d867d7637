"""Code shown in README and docs runs, the recipes are right, and the links work."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vfmtok_fast
from vfmtok_fast import cli
from vfmtok_fast.reference.deformable_sample import deformable_sample as reference

ROOT = Path(__file__).resolve().parents[1]
SHOWN = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PHOTOS = ROOT / "examples" / "images"


def snippets(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def example() -> dict:
    """Return the names that the page's code block defines."""
    (code,) = snippets(ROOT / "docs" / "deformable-attention.md", "python")
    names: dict = {}
    torch.manual_seed(0)
    exec(code, names)
    return names


@pytest.mark.slow
@pytest.mark.parametrize("page", SHOWN, ids=lambda page: page.name)
def test_every_python_snippet_runs(page, tmp_path, monkeypatch, clean_switch):
    """Snippets run in a folder with a photo and a folder of photos, as a reader would have."""
    shutil.copy(PHOTOS / "vehicles" / "rocket.jpg", tmp_path / "photo.jpg")
    shutil.copytree(PHOTOS, tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    for code in snippets(page, "python"):
        exec(compile(code, str(page), "exec"), {})


def test_every_command_parses():
    lines = [line for page in SHOWN for code in snippets(page, "sh") for line in code.splitlines()]
    assert len(lines) >= 16 and all(line.startswith("vfmtok-fast ") for line in lines)
    for line in lines:
        cli.build_parser().parse_args(line.split()[1:])


def check(got: Tensor, truth: Tensor, ruler: Tensor) -> None:
    """The tolerance rule of all ops: twice the error of the reference, plus one rounding."""
    error, allowed = (float((x - truth).abs().max()) for x in (got, ruler))
    assert error <= 2 * allowed + torch.finfo(got.dtype).eps * float(truth.abs().max())


def test_the_code_block():
    got = example()
    assert got["out"].shape == (got["B"], got["Q"], got["H"] * got["D"])
    value, levels, *rest = (got[n] for n in ("value", "levels", "points", "offsets", "logits"))
    truth = reference(value.double(), levels, *(tensor.double() for tensor in rest))
    check(got["out"], truth, reference(value, levels, *rest))
    (call,) = vfmtok_fast.status().ops["deformable_sample"].calls
    assert call != "reference"


def finished(value: Tensor, levels, locations: Tensor, weights: Tensor) -> Tensor:
    """Compute other models' op: `grid_sample` at final locations, with final weights."""
    B, Q, H, L, P, _ = locations.shape
    total = value.new_zeros(B, Q, H, value.shape[-1])
    for level, image in enumerate(value.split([h * w for h, w in levels], dim=1)):
        for head in range(H):
            # [B, D, height, width], [B, Q, P, 2] to [B, D, Q, P]
            pixels = image[:, :, head].transpose(1, 2).unflatten(2, levels[level])
            grid = 2 * locations[:, :, head, level] - 1
            sampled = F.grid_sample(pixels, grid, align_corners=False)
            share = weights[:, :, head, level, None].transpose(1, 2)
            total[:, :, head] += (sampled * share).sum(-1).transpose(1, 2)
    return total.flatten(2)


def test_a_layer_with_finished_locations_and_weights():
    got = example()
    levels, offsets = got["levels"], got["offsets"]
    wh = torch.tensor([(width, height) for height, width in levels])[:, None]
    locations = torch.rand(offsets.shape) * 1.2 - 0.1
    weights = torch.rand(offsets.shape[:-1])
    weights = weights / weights.sum(dim=(-1, -2), keepdim=True)
    arguments = torch.zeros(1, got["Q"], got["L"], 2), locations * wh, weights.log().flatten(-2)
    with vfmtok_fast.enable("deformable_sample", strict=True):
        out = vfmtok_fast.ops.deformable_sample(got["value"], levels, *arguments)
    value = got["value"]
    truth = finished(value.double(), levels, locations.double(), weights.double())
    check(out, truth, finished(value, levels, locations, weights))


PAGES = ["CONTRIBUTING.md", "benchmarks/REPORT.md", "examples/emoji/README.md"]
PAGES += [page.relative_to(ROOT).as_posix() for page in SHOWN]
PAGES += [page.relative_to(ROOT).as_posix() for page in sorted((ROOT / "kernels").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str):
    """A link leads to a file, and to a section if it names one."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, section = target.partition("#")
        path = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        assert path.exists(), f"{page} links to {target}"
        if section:
            heads = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
            found = {re.sub(r"[^a-z0-9 _-]", "", h.lower()).replace(" ", "-") for h in heads}
            assert section in found, f"{page} links to {target}"
