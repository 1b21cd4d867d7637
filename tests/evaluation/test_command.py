"""`vfmtok-fast evaluate`."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from vfmtok_fast import GPT, GPTConfig, cli, evaluation
from vfmtok_fast.cli import choices
from vfmtok_fast.evaluation import Generation, Reconstruction
from vfmtok_fast.evaluation.protocols import LABELS
from vfmtok_fast.tokenizer.model import PROBED
from vfmtok_fast.training import LPIPS

pytestmark = pytest.mark.usefixtures("small_inception")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """``run("generation", ...)``: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = cli.main(["evaluate", *map(str, arguments), "--device", "cpu"])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_choices_are_those_of_the_package():
    for kind, names in ((Reconstruction, choices.RECONSTRUCTION), (Generation, choices.GENERATION)):
        known = evaluation.PROTOCOLS.items()
        assert names == tuple(name for name, value in known if isinstance(value, kind))
    assert choices.PROBES == tuple(evaluation.PROBES)
    assert choices.PROBED == PROBED and choices.LABELS == LABELS


def test_reconstruction(run, photos: Path, model: Path, tmp_path: Path):
    lpips = LPIPS()
    features = {f"features.{k}": v for k, v in lpips.features.state_dict().items()}
    torch.save(features, tmp_path / "vgg16.pth")
    linear = {f"lin{i}.model.1.weight": w.view(1, -1, 1, 1) for i, w in enumerate(lpips.weights)}
    torch.save(linear, tmp_path / "vgg.pth")
    out = tmp_path / "result.json"
    line = ("reconstruction", photos, "--model", model, "--size", 16, "--out", out)
    files = ("--vgg16", tmp_path / "vgg16.pth", "--lpips-linear", tmp_path / "vgg.pth")
    code, text, errors = run(*line, "--num", 4, *files)
    assert code == 0 and "an Inception with random weights" in errors
    result = json.loads(out.read_text())
    assert result["metrics"]["LPIPS"] > 0 and result["metrics"]["rFID"] > 0
    assert [row.split("  ")[0] for row in text.splitlines()[:-1]] == [*result["metrics"]]
    assert text.endswith("reconstruction-vfmtok, num=4, size=16; Inception: random weights\n")

    code, _, errors = run(*line, "--num", 4)
    assert code == 2 and "already exists; choose another name" in errors
    code, _, errors = run(*line[:-1], tmp_path / "b.json", "--no-inception")
    assert code == 2 and errors.count("\n") == 1
    assert "50000 pictures were asked for, it holds 10; --num 10" in errors
    code, _, errors = run(*line[:-1], tmp_path / "b.json", "--num", 0)
    assert code == 2 and "--num must be at least 1" in errors


def test_a_sweep_and_one_of_its_folders_again(
    run, model: Path, pictures: np.ndarray, tmp_path: Path
):
    config = GPTConfig(
        num_layers=1, num_heads=2, dim=16, vocab_size=256, block_size=16, num_classes=3
    )
    torch.manual_seed(0)
    gpt = GPT(config)
    # Zeros, as at the start of training, would make all codes equally likely under any guidance.
    torch.nn.init.normal_(gpt.head.weight)
    gpt.save_pretrained(tmp_path / "gpt")
    np.savez(tmp_path / "reference.npz", arr_0=pictures)
    out, reference = tmp_path / "sweep", ("--reference", tmp_path / "reference.npz")
    models = ("--model", model, "--gpt", tmp_path / "gpt", "--cfg-interval", 3)
    line = ("sweep", out, *models, *reference, "--num", 8, "--size", 32, "--cfg-scale", 1, 3)
    code, text, _ = run(*line)
    assert code == 0
    results = json.loads((out / "sweep.json").read_text())["results"]
    assert [result["cfg_scale"] for result in results] == [1.0, 3.0]
    settings = results[1]["sampling"]
    assert (settings["cfg_scale"], settings["cfg_interval"], settings["seed"]) == (3.0, 3, 0)
    assert results[0]["compared"]["sha256"] != results[1]["compared"]["sha256"]
    assert results[0]["compared"]["labels"] == "balanced"
    if importlib.util.find_spec("matplotlib") is not None:
        with Image.open(out / "sweep.png") as plot:
            assert plot.width > 300
    assert text.splitlines()[0].split() == ["scale", "FID", "sFID", "IS", "precision", "recall"]

    alone = tmp_path / "alone.json"
    line = ("generation", out / "cfg-3", *reference, "--num", 8, "--size", 32, "--out", alone)
    assert run(*line)[0] == 0
    again = json.loads(alone.read_text())
    assert again["metrics"] == pytest.approx(results[1]["metrics"])
    assert again["compared"] == results[1]["compared"]

    line = ("sweep", out, *models, *reference, "--num", 8, "--size", 32, "--cfg-scale", 2, 3)
    code, _, errors = run(*line)
    assert code == 2 and "sweep.json also has scale 1; name it as well" in errors
    # Nor are figures of something else written over, even where the samples have gone.
    line = (*line[:-2], 1, 3)
    before = (out / "sweep.json").read_bytes()
    assert run(*line)[0] == 0 and (out / "sweep.json").read_bytes() == before
    np.savez(tmp_path / "other.npz", arr_0=pictures[1:])
    shutil.rmtree(out / "cfg-1")
    for change, message in (
        (("--reference", tmp_path / "other.npz"), "reference (there "),
        (("--protocol", "generation-float64"), "protocol.distances (there float16, here float64)"),
        (("--num", 7), "protocol.num (there 8, here 7)"),
        (("--seed", 1), "sampling.seed (there 0, here 1)"),
    ):
        code, _, errors = run(*line, *change)
        assert code == 2 and "sweep.json holds other figures (" in errors and message in errors
        assert (out / "sweep.json").read_bytes() == before and not (out / "cfg-1").exists()
    line = (*line[:-2], 2, 3)
    # A folder of other samples is found before any image of an earlier scale is made.
    (out / "sweep.json").unlink()
    code, _, errors = run(*line, "--seed", 1)
    assert code == 2 and "cfg-3 holds other samples" in errors
    assert not list((out / "cfg-2").rglob("*.npy"))


def test_probe(run, photos: Path, model: Path, tmp_path: Path):
    out = tmp_path / "probe.json"
    line = ("probe", photos, "--model", model, "--features", "codes", "--epochs", 12, "--out", out)
    code, _, errors = run(*line, "--test", photos)
    assert code == 2 and "these are the training pictures; name others" in errors
    (tmp_path / "link").symlink_to(photos)
    assert "the training pictures" in run(*line, "--test", tmp_path / "link")[2]
    # With so few epochs, the learning rate would never finish its warm-up.
    code, _, errors = run(*line, "--epochs", 3)
    assert code == 2 and "3 epochs end within the protocol's 10 of warm-up" in errors
    others = tmp_path / "others"
    shutil.copytree(photos, others)
    # What is excluded from the training images is not excluded from the test images.
    one = sorted(photos.rglob("*.png"))[0].name
    code, text, _ = run(*line, "--exclude", f"**/{one}", "--test", others)
    assert code == 0 and "probe-sgd" in text
    result = json.loads(out.read_text())
    assert result["compared"]["test_pictures"] == 10 and result["protocol"]["epochs"] == 12
    assert result["protocol"]["name"] == "probe-sgd, epochs=12"
    assert run(*line[:-1], tmp_path / "some.json", "--num", 9)[0] == 0
    some = json.loads((tmp_path / "some.json").read_text())
    assert some["protocol"]["name"] == "probe-sgd, epochs=12, num=9"
    for name, value in result["metrics"].items():
        assert f"{value:.4f}" in next(row for row in text.splitlines() if row.startswith(name))


def test_two_files_of_one_folder(run, photos: Path, model: Path, tmp_path: Path):
    """Each file is its own input, named in results; an unreadable image gives exit code 3."""
    paths = sorted(photos.rglob("*.png"))
    for name, some in (("train", paths[::2]), ("test", [*paths[1::2], photos / "none.png"])):
        images = [{"bytes": one.read_bytes() if one.exists() else b"no picture"} for one in some]
        labels = [int(path.parent.name == "class1") for path in some]
        table = pa.table({"image": images, "label": labels})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    line = ("--model", model, "--epochs", 12, "--out", tmp_path / "probe.json")
    train, test = tmp_path / "train.parquet", tmp_path / "test.parquet"
    code, _, errors = run("probe", train, "--test", test, *line)
    assert code == 3 and "1 pictures could not be read and were left out" in errors
    compared = json.loads((tmp_path / "probe.json").read_text())["compared"]
    assert (compared["train"], compared["test"]) == (str(train), str(test))
    code, _, errors = run("probe", train, "--test", tmp_path / "." / "train.parquet", *line[:4])
    assert code == 2 and "these are the training pictures" in errors
    line = ("--model", model, "--num", 4, "--size", 16, "--no-inception")
    code, _, errors = run("reconstruction", train, *line, "--out", tmp_path / "one.json")
    assert code == 0 and "train.parquet is named as a training set" in errors
    assert json.loads((tmp_path / "one.json").read_text())["compared"]["source"] == str(train)


def test_what_cannot_end_well_does_not_begin(
    run, model: Path, pictures: np.ndarray, tmp_path: Path
):
    good = {"mu": np.zeros(12), "sigma": np.eye(12)}
    broken = {
        "hold NaN": {"mu": good["mu"] * np.nan},
        "must be real numbers": {"mu": good["mu"].astype("U1")},
        "is not symmetric": {"sigma": np.triu(np.ones((12, 12)))},
        "mu: Object arrays": {"mu": good["mu"].astype(object)},
    }
    samples = tmp_path / "a.npz"
    np.savez(samples, arr_0=pictures, arr_1=np.arange(24))
    line = ("generation", samples, "--size", 32, "--out", tmp_path / "x.json")
    for number, (message, change) in enumerate(broken.items()):
        reference = tmp_path / f"{number}.npz"
        np.savez(reference, **good | change)
        code, _, errors = run(*line, "--num", 5, "--reference", reference)
        assert code == 2 and f"{reference}: " in errors and message in errors, errors
    gpt = GPT(
        GPTConfig(num_layers=1, num_heads=2, dim=16, vocab_size=256, block_size=16, num_classes=3)
    )
    gpt.save_pretrained(tmp_path / "gpt")
    models = ("--model", model, "--gpt", tmp_path / "gpt", "--reference", samples)
    code, _, errors = run("sweep", tmp_path / "sweep", *models, "--num", 3, "--size", 32)
    assert code == 2 and "--num: 3 pictures are too few, the metrics need 4" in errors
    assert not (tmp_path / "sweep").exists()
    nowhere = ("--out", tmp_path / "a.npz" / "x.json")
    code, _, errors = run(*line[:-2], *nowhere, "--num", 5, "--reference", samples)
    assert code == 2 and "cannot write" in errors and "random weights" not in errors
    np.savez(tmp_path / "negative.npz", arr_0=pictures, arr_1=np.arange(24) - 1)
    code, _, errors = run(
        "generation", tmp_path / "negative.npz", *line[2:], "--num", 5, "--reference", samples
    )
    assert code == 2 and "must be integers of at least 0" in errors


def test_mistakes_are_one_line(run, photos: Path, pictures: np.ndarray, tmp_path: Path):
    np.savez(tmp_path / "a.npz", arr_0=pictures)
    (tmp_path / "b.npz").write_text("text")
    a, b, out = tmp_path / "a.npz", tmp_path / "b.npz", ("--out", tmp_path / "x.json")
    for line, message in (
        ((a, "--reference", a), "256x256 pixels, got 32x32; --size evaluates other sizes"),
        ((a, "--reference", a, "--size", 32), "50000 pictures were asked for, it holds 24"),
        ((a, "--reference", a, "--size", 32, "--num", 9), "holds no labels (arr_1)"),
        ((b, "--reference", a), "is not an .npz, or is damaged"),
        ((photos, "--reference", a), "samples.npz: no such file"),
        ((a, "--reference", photos), "no such file; pictures are evaluated as ADM's .npz"),
    ):
        code, _, errors = run("generation", *line, *out)
        lines = [text for text in errors.splitlines() if not text.startswith("note:")]
        assert code == 2 and len(lines) == 1 and message in lines[0], errors
        assert lines[0].startswith("vfmtok-fast evaluate: ")
    assert not (tmp_path / "x.json").exists()
