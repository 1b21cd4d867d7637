"""The command line from a user's view: what it writes and prints, and its exit codes."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vfmtok_fast as vf
from vfmtok_fast import cli
from vfmtok_fast.checkpoint import OFFICIAL_FILES, OFFICIAL_REPO, official_gpt
from vfmtok_fast.cli.doctor import OPTIONAL
from vfmtok_fast.temporary import temporary_name
from vfmtok_fast.untrained import untrained_gpt, untrained_tokenizer

SMALL = ["--untrained", "small", "--device", "cpu"]
EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "images"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes, three images."""
    root = tmp_path / "photos"
    for name in ("animals/chelsea.png", "vehicles/rocket.jpg"):
        (root / name).parent.mkdir(parents=True)
        shutil.copy(EXAMPLES / name, root / name)
    shutil.copy(EXAMPLES / "food/coffee.png", root / "animals/coffee.png")
    return root


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Run a command; return exit code, stdout, and stderr lines except the untrained note."""

    def call(*arguments: object) -> tuple[int, str, list[str]]:
        code = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if not line.startswith("note:")]
        return code, captured.out, lines

    return call


def refusal(result: tuple[int, str, list[str]]) -> str:
    """Return the only line of a command that failed with exit code 2."""
    code, _, lines = result
    assert code == 2
    assert len(lines) == 1, lines
    return lines[0]


def test_cache_verify_and_status(run, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    assert (
        run("cache", photos, out, "--batch-size", 2, "--views", "center", "center-flip", *SMALL)[0]
        == 0
    )
    code, text, _ = run("status", out)
    assert code == 0
    assert "complete" in text and "3 of 3" in text and "center-flip" in text
    for line in (("verify", out, "--images", photos), ("repair", photos, out)):
        assert "name the one that made them with --model" in refusal(run(*line))
    code, text, problems = run("verify", out, "--images", photos, *SMALL)
    assert (code, problems) == (0, [])
    assert "100.0000% of tokens agree" in text

    # The cache holds what the Python API gives.
    tokens, _ = vf.cache.read_tokens(out)
    images = vf.images.load_images([photos / "animals/chelsea.png"])
    codes = untrained_tokenizer("small").encode(images)
    assert tokens[0].tolist() == codes[0].tolist()

    shard = out / "shards" / "tokens-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    code, _, problems = run("verify", out)
    assert code == 1 and "tokens-00000" in problems[0]


@pytest.mark.parametrize("fast", [(), ("--no-fast",)])
def test_verify_and_repair_compute_as_the_cache_was_made(fast, run, photos, tmp_path) -> None:
    out = tmp_path / "tokens"
    assert run("cache", photos, out, *SMALL, "--precision", "float16", *fast)[0] == 0
    code, text, _ = run("verify", out, "--images", photos, *SMALL)
    assert code == 0 and "100.0000% of tokens agree" in text
    (out / "shards/tokens-00000.safetensors").write_bytes(b"")
    code, text, _ = run("repair", photos, out, *SMALL)
    assert code == 0 and "complete; 1 of 1 shards made again" in text
    # An explicit precision overrides that of the cache.
    line = refusal(run("repair", photos, out, *SMALL, "--precision", "float32"))
    assert "dtype (there float16, here float32)" in line


def test_verify_draws_a_contact_sheet(run, photos: Path, tmp_path: Path) -> None:
    assert run("cache", photos, tmp_path / "out", *SMALL)[0] == 0
    again = ["--images", photos, *SMALL, "--sheet"]
    assert run("verify", tmp_path / "out", *again, tmp_path / "sheet.png")[0] == 0
    assert Image.open(tmp_path / "sheet.png").size == (8 * 336, 336)
    assert "must end in .png" in refusal(run("verify", tmp_path / "out", *again, "sheet.jpg"))
    drawn = (tmp_path / "sheet.png").read_bytes()
    assert "already exists" in refusal(
        run("verify", tmp_path / "out", *again, tmp_path / "sheet.png")
    )
    assert (tmp_path / "sheet.png").read_bytes() == drawn
    for option in (["--sheet", tmp_path / "new.png"], ["--sample", "3"]):
        assert f"{option[0]} needs --images" in refusal(
            run("verify", tmp_path / "out", *SMALL, *option)
        )


def test_reconstruct_writes_over_no_picture(run, photos: Path) -> None:
    """`reconstruct *.png` would overwrite one of two photos."""
    (photos / "a.png").write_bytes(b"a photo")
    code, _, (line,) = run("reconstruct", photos, photos / "a.png", *SMALL)
    assert code == 2 and "a.png already exists; choose another name" in line
    assert (photos / "a.png").read_bytes() == b"a photo"


def test_what_was_not_fast_is_told_once(photos: Path, tmp_path: Path, capsys) -> None:
    def told(precision: str) -> str:
        line = ["cache", str(photos), str(tmp_path / precision), *SMALL, "--precision", precision]
        assert cli.main(line) == 0
        return capsys.readouterr().err

    said = "note: linear was not fast: cpu: it takes float32 and bfloat16, not torch.float16"
    assert told("float16").count(said) == 1
    exact = told("tf32")
    assert "not fast" not in exact and exact.count("a CPU has no TF32") == 1


def test_an_empty_path_is_not_the_current_folder(run, photos: Path, tmp_path: Path) -> None:
    assert "an empty path" in refusal(run("cache", "", tmp_path / "out", *SMALL))
    assert "an empty path" in refusal(run("cache", photos, "", *SMALL))


def test_cache_quarantines_and_goes_on(run, photos: Path, tmp_path: Path) -> None:
    whole = (EXAMPLES / "vehicles/rocket.jpg").read_bytes()
    (photos / "vehicles/half.jpg").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (900, 2)).save(photos / "vehicles/strip.png")
    out = tmp_path / "tokens"
    code, text, lines = run("cache", photos, out, "--batch-size", 2, *SMALL)
    assert code == 3
    assert "2 could not be read" in lines[-1]
    reasons = [
        json.loads(line)["reason"]
        for line in (out / "quarantine/00000.jsonl").read_text().splitlines()
    ]
    assert len(reasons) == 2 and all(reasons)
    code, text, _ = run("status", out)
    assert code == 3 and "vehicles/half.jpg: " in text and "vehicles/strip.png: " in text
    assert "half.jpg" not in run("status", out, "--failures", 0)[1]
    assert "--failures" in refusal(run("status", out, "--failures", -1))
    assert run("verify", out)[0] == 3
    code, _, lines = run("cache", photos, tmp_path / "strict", "--max-bad", 1, *SMALL)
    assert code == 4 and len(lines) == 1


def test_cache_refuses_what_it_must(run, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    assert "no such" in refusal(run("cache", tmp_path / "nowhere", out, *SMALL))
    (tmp_path / "empty").mkdir()
    refusal(run("cache", tmp_path / "empty", out, *SMALL))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.png").write_bytes(b"<html>")
    refusal(run("cache", tmp_path / "bad", out, *SMALL))
    assert "diagonal" in refusal(run("cache", photos, out, "--views", "diagonal", *SMALL))
    assert not out.exists()

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    refusal(run("cache", photos, mine, *SMALL))
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]

    assert run("cache", photos, out, "--batch-size", 2, *SMALL)[0] == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    line = refusal(run("cache", photos, out, "--batch-size", 2, "--precision", "mixed", *SMALL))
    assert "dtype (there float32, here mixed)" in line
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_cache_in_parts_from_a_tar_then_export_and_repair(run, photos, tmp_path) -> None:
    archive, out = tmp_path / "photos.tar", tmp_path / "tokens"
    with tarfile.open(archive, "w") as file:
        file.add(photos, ".")
    views = ["--views", "ten-crop-8", "random-0..1", "--seed", 5]
    common = ["cache", archive, out, "--batch-size", 2, "--shard-size", 1, *views, *SMALL]
    code, text, _ = run(*common, "--shard-range", "1:2")
    assert code == 0 and "2 shards are still missing" in text and run("status", out)[0] == 1
    code, text, _ = run(*common, "--json")
    assert code == 0
    lines = [json.loads(line) for line in text.splitlines()]
    assert lines[0]["state"] == "encoding" and lines[0]["total"] == 3 and "eta" in lines[0]
    assert (lines[-1]["state"], lines[-1]["encoded"]) == ("complete", 2)

    rar = tmp_path / "t.jsonl"
    assert run("export", out, rar, "--format", "rar", "--views", "random-0..1")[0] == 0
    labels = [json.loads(line)["class_id"] for line in rar.read_text().splitlines()]
    assert labels == [0, 0, 0, 0, 1, 1]
    assert "already" in refusal(run("export", out, rar, "--format", "rar"))
    for name, views, told in (
        ("a", "random-0..1", 2),
        ("flip", "random-0..1", 1),
        ("b", "random-0", 1),
    ):
        line = ("export", out, tmp_path / name, "--format", "llamagen", "--views", views)
        notes = run(*line)[2]
        assert len(notes) == told and "change that number to 3 there" in notes[-1]
        assert ("draws one of the 2 views only if 'flip'" in notes[0]) == (told == 2)

    shard = out / "shards" / "tokens-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "repair" in run("verify", out)[2][0]
    code, text, lines = run("repair", archive, out, *SMALL)
    assert code == 0 and "1 of 3 shards made again" in text and "tokens-00002" in lines[0]
    assert shard.read_bytes() == whole
    assert run("verify", out, "--images", archive, *SMALL)[0] == 0


def test_processes_of_torchrun_share_a_cache(run, photos, tmp_path, monkeypatch) -> None:
    common = ["cache", photos, tmp_path / "tokens", "--batch-size", 1, "--shard-size", 1, *SMALL]
    assert run(*common, "--shard-range", "0:1")[0] == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    code, text, _ = run(*common)
    assert (code, text) == (0, "")  # only the first process prints
    monkeypatch.setenv("RANK", "0")
    code, text, _ = run(*common)
    assert code == 0 and "0 encoded now" in text
    monkeypatch.setenv("RANK", "2")
    assert "rank must be below" in refusal(run(*common))
    monkeypatch.setenv("RANK", "first")
    assert "RANK must be a number" in refusal(run(*common))


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_ray_is_started_once(variable, run, photos, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(variable, "2")
    monkeypatch.delenv("RANK", raising=False)
    out = tmp_path / "tokens"
    refused = refusal(run("cache", photos, out, "--engine", "ray", *SMALL))
    assert "started once, not by torchrun or srun" in refused and not out.exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--shard-range", "3"], "--shard-range must be A:B"),
        (["--shard-range", "-1:2"], "--shard-range must be A:B"),
        (["--input", "webdataset"], "no *.tar files"),
        (["--input", "lmdb"], "LMDB"),
        (["--seed", -1], "seed must be at least 0"),
        (["--views", "ten-crop", "ten-crop-3"], "ten-crop-3 twice"),
        (["--actors", 2], "--actors needs --engine ray"),
        (["--engine", "ray", "--shard-range", "0:2"], "Ray hands out the shards by itself"),
        (["--engine", "ray", "--actors", 0], "actors must be at least 1"),
    ],
)
def test_cache_refuses_bad_settings(run, photos, tmp_path, options, expected: str) -> None:
    if "-1:2" in options:
        options = ["--shard-range=-1:2"]
    assert expected in refusal(run("cache", photos, tmp_path / "out", *SMALL, *options))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_interrupted_cache_goes_on(photos: Path, tmp_path: Path) -> None:
    for i in range(40):
        shutil.copy(photos / "vehicles/rocket.jpg", photos / f"vehicles/{i}.jpg")
    out = tmp_path / "tokens"
    command = [sys.executable, "-m", "vfmtok_fast", "cache", str(photos), str(out), *SMALL]
    command += ["--batch-size", "1", "--shard-size", "4"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(out.glob("shards/*.safetensors")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130, error
    assert "Traceback" not in error and "interrupted" in error
    assert not list(out.rglob("*.tmp-*"))
    resumed = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert resumed.returncode == 0, resumed.stderr
    assert int(re.search(r"(\d+) encoded now", resumed.stdout)[1]) < 43


def test_what_is_wrong_with_the_input_is_said_before_a_model_is_looked_for(
    run, photos, tmp_path, monkeypatch
) -> None:
    def never(*arguments):
        raise AssertionError("looked for a model")

    for name in ("cache", "repair", "verify"):
        monkeypatch.setattr(f"vfmtok_fast.cli.{name}.load_tokenizer", never)
    out, none = tmp_path / "tokens", tmp_path / "none"
    for arguments, expected in (
        (("cache", none, out), f"{none}: no such folder of pictures"),
        (("repair", photos, out), f"{out}: no token cache here"),
        (("verify", out, "--images", photos), f"{out}: no token cache here"),
        (("cache", photos, out, "--views", "foo"), "'foo'"),
    ):
        assert expected in refusal(run(*arguments))
    assert not out.exists()


def test_pictures_without_a_class_are_told_of(run, photos, tmp_path, capsys) -> None:
    shutil.copy(photos / "animals/coffee.png", photos / "stray.png")
    for arguments in (
        ("cache", photos, tmp_path / "tokens", *SMALL),
        ("export", tmp_path / "tokens", tmp_path / "rar.jsonl", "--format", "rar"),
    ):
        assert cli.main([str(argument) for argument in arguments]) == 0
        assert (
            "note: 1 pictures lie in no class folder: their label is -1" in capsys.readouterr().err
        )


def test_output_that_nobody_reads_is_no_error(photos, tmp_path) -> None:
    out = tmp_path / "tokens"
    assert cli.main(["cache", str(photos), str(out), *SMALL]) == 0
    command = f"{sys.executable} -m vfmtok_fast status {out} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.strip() in ("0", "141")


def test_reconstruct_leaves_out_what_cannot_be_opened(run, photos, tmp_path) -> None:
    (photos / "animals/away.png").symlink_to(tmp_path / "nowhere.png")
    code, _, lines = run("reconstruct", photos, tmp_path / "grid.png", *SMALL)
    assert code == 3 and (tmp_path / "grid.png").exists()
    assert lines == [f"left out: {photos / 'animals/away.png'}: No such file or directory"]


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems refuse such names")
def test_reconstruct_says_what_is_wrong_with_a_name(run, photos, tmp_path) -> None:
    shutil.copy(photos / "animals" / "coffee.png", photos / os.fsdecode(b"\xff.png"))
    code, _, (line,) = run("reconstruct", photos, tmp_path / "x.png", *SMALL)
    assert code == 3 and line.endswith(r"\xff.png: its name is not UTF-8; rename it")


def test_reconstruct(run, photos: Path, tmp_path: Path) -> None:
    (photos / "animals/broken.png").write_bytes(b"\x89PNG")
    out = tmp_path / "new" / "grid.png"
    code, _, lines = run("reconstruct", photos, out, *SMALL)
    assert code == 3 and len(lines) == 1 and "broken.png" in lines[0]
    with Image.open(out) as grid:
        assert grid.size == (3 * 336, 3 * 336)
        picture = np.asarray(grid)
    crop = vf.images.center_crop(vf.images.decode_image(photos / "animals/chelsea.png"))
    assert np.array_equal(picture[:336, :336], crop)
    # The third column is the photo, darkened, with coloured points: more colour than the photo.
    shown = picture[:336, 672:].astype(int)
    assert (shown.max(-1) - shown.min(-1)).max() > 180
    single = tmp_path / "one.png"
    assert run("reconstruct", photos / "animals/chelsea.png", single, *SMALL)[0] == 0

    assert ".png" in refusal(run("reconstruct", photos, tmp_path / "grid.gif", *SMALL))
    refusal(run("reconstruct", tmp_path / "nowhere", out, *SMALL))


def test_sample_writes_a_grid_and_adms_npz(run, tmp_path: Path) -> None:
    common = ["--num", 3, "--classes", 4, 1, "--size", 64, "--top-k", 50, *SMALL]
    assert run("sample", tmp_path / "a", "--batch-size", 2, *common)[0] == 0
    with np.load(tmp_path / "a/samples.npz") as file:
        assert file.files == ["arr_0", "arr_1"]
        pictures = file["arr_0"]
        assert file["arr_1"].tolist() == [4, 1, 4]
    assert pictures.dtype == np.uint8 and pictures.shape == (3, 64, 64, 3)
    with Image.open(tmp_path / "a/samples.png") as grid:
        assert np.array_equal(np.asarray(grid)[:64, :64], pictures[0])

    assert run("sample", tmp_path / "b", "--kv-int8", *common)[0] == 0
    with np.load(tmp_path / "b/samples.npz") as file:
        assert (file["arr_0"] != pictures).any()

    codes = untrained_gpt("small").generate(torch.tensor([4, 1, 4]), top_k=50)
    expected = untrained_tokenizer("small").decode_to_uint8(codes, 64).numpy()
    assert np.abs(expected.astype(int) - pictures.astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--classes", 10], "[0, 10)"),
        (["--classes", -1], "[0, 10)"),
        (["--top-p", 0], "top_p"),
        (["--temperature", -1], "temperature"),
        (["--num", 0], "--num"),
        (["--seed", -1], "seed"),
        (["--gpt", "folder"], "--gpt"),
    ],
)
def test_sample_refuses_bad_settings(run, tmp_path: Path, options, expected: str) -> None:
    assert expected in refusal(run("sample", tmp_path / "out", *SMALL, *options))
    assert not (tmp_path / "out").exists()


def test_processes_that_come_one_after_the_other_make_all_samples(run, tmp_path, monkeypatch):
    monkeypatch.setattr("vfmtok_fast.sample_folder.SHARD", 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert run("sample", tmp_path / "out", "--num", 3, "--size", 8, *SMALL)[0] == 0
    assert (tmp_path / "out" / "samples.npz").exists()


def test_convert_then_sample(run, tmp_path: Path) -> None:
    gpt = untrained_gpt("small")
    torch.save({"model": official_gpt(gpt), "steps": 7}, tmp_path / "gpt.pt")
    (tmp_path / "gpt.json").write_text(
        json.dumps(
            {"num_layers": 3, "num_heads": 4, "dim": 128, "vocab_size": 1024, "num_classes": 10}
        )
    )
    out = tmp_path / "gpt"
    arguments = ["--file", tmp_path / "gpt.pt", "--config", tmp_path / "gpt.json"]
    assert run("convert", "GPT-B", out, *arguments)[0] == 0
    again = vf.GPT.from_pretrained(out)
    assert again.config == gpt.config
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in gpt.state_dict().items())
    # A folder in which a convert was killed.
    (tmp_path / "killed").mkdir()
    temporary_name(tmp_path / "killed" / "model").mkdir()
    assert run("convert", "GPT-B", tmp_path / "killed", *arguments)[0] == 0
    # The folder is not overwritten, and the preset does not have the file's shape.
    refusal(run("convert", "GPT-B", out, *arguments))
    line = refusal(run("convert", "GPT-B", tmp_path / "b", "--file", tmp_path / "gpt.pt"))
    assert "missing" in line and "layers.11.ffn_norm.weight" in line
    assert not (tmp_path / "b").exists()


def test_paths_from_home_and_a_config_of_windows(run, photos, tmp_path, monkeypatch) -> None:
    """Shells leave the ~ of --option=~/x unexpanded, and some editors start a file with a BOM."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    gpt = untrained_gpt("small")
    torch.save(official_gpt(gpt), tmp_path / "gpt.pt")
    fields = json.dumps(dataclasses.asdict(gpt.config))
    (tmp_path / "gpt.json").write_text("\ufeff" + fields, "utf-8")
    arguments = ["--file=~/gpt.pt", "--config=~/gpt.json"]
    assert run("convert", "GPT-B", "~/gpt", *arguments)[0] == 0
    assert run("sample", "~/samples", "--num", 1, "--size", 8, *SMALL)[0] == 0
    assert run("reconstruct", "~/photos/animals/chelsea.png", "~/grid.png", *SMALL)[0] == 0
    assert vf.images.decode_image("~/photos/animals/chelsea.png").mode == "RGB"
    written = {"gpt/config.json", "samples/samples.npz", "grid.png"}
    assert all((tmp_path / name).is_file() for name in written) and not (tmp_path / "~").exists()


def test_a_user_that_nobody_knows_is_a_name_like_any_other(run, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("cache", photos, "~nobody-here/t", *SMALL)[0] == 0
    assert (tmp_path / "~nobody-here" / "t" / "manifest.json").is_file()
    for command in (["cache", "~no-one", "t"], ["reconstruct", "~no-one", "t.png"]):
        assert "~no-one: no such" in refusal(run(*command, *SMALL))
    assert "~no-one" in refusal(run("sample", "s", "--model", "~no-one", "--gpt", "emoji"))


@pytest.mark.parametrize(
    "command",
    [
        ["sample", "s3://b/x"],
        ["reconstruct", "photos", "s3://b/x.png"],
        ["reconstruct", "s3://b/x.png", "x.png"],
        ["convert", "GPT-B", "s3://b/x"],
        ["evaluate", "probe", "photos", "--out", "s3://b/x"],
        ["train-tokenizer", "photos", "s3://b/x"],
        ["train-gpt", "tokens", "s3://b/x", "--preset", "GPT-B"],
    ],
)
def test_what_is_written_to_a_disk_takes_no_url(run, photos, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    options = SMALL if command[0] in ("sample", "reconstruct", "evaluate") else []
    assert "give a local path; only a cache may lie at a URL" in refusal(run(*command, *options))
    assert not (tmp_path / "s3:").exists()


def test_offline_the_error_names_file_source_and_flag(run, tmp_path, photos, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    line = refusal(run("cache", photos, tmp_path / "tokens"))
    for part in (OFFICIAL_FILES["tokenizer"], OFFICIAL_REPO, "--tokenizer"):
        assert part in line
    line = refusal(run("convert", "GPT-3B", tmp_path / "gpt"))
    assert OFFICIAL_FILES["GPT-3B"] in line and "--file" in line
    assert not (tmp_path / "tokens").exists() and not (tmp_path / "gpt").exists()


def test_model_options(run, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    refusal(run("cache", photos, out, "--model", tmp_path / "nowhere"))
    refusal(run("cache", photos, out, "--tokenizer", tmp_path / "nowhere.pt"))
    assert "--backbone" in refusal(run("cache", photos, out, "--backbone", "x.pth", *SMALL))
    assert "cuda:99" in refusal(
        run("cache", photos, out, "--untrained", "small", "--device", "cuda:99")
    )
    assert "--device" in refusal(
        run("cache", photos, out, "--untrained", "small", "--device", "toaster")
    )


def test_doctor_names_every_op(run) -> None:
    code, text, _ = run("doctor")
    assert code == 0
    for op in vf.status().ops:
        assert op in text
    assert torch.__version__.split("+")[0] in text


def test_doctor_names_what_is_missing_and_how_to_get_it(run, monkeypatch) -> None:
    """These are all extras for users, and no others."""
    pyproject = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    extras = pyproject["project"]["optional-dependencies"]
    assert {extra for extra, _ in OPTIONAL.values()} == {*extras} - {"test", "bench", "dev"}
    for name, (extra, _) in OPTIONAL.items():
        assert any(wanted.startswith(f"{name}>=") for wanted in extras[extra]), name
    version = importlib.metadata.version

    def missing(name: str) -> str:
        if name in OPTIONAL:
            raise importlib.metadata.PackageNotFoundError
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    _, text, _ = run("doctor")
    for name, (extra, use) in OPTIONAL.items():
        assert f"{name} is not installed: {use}; pip install 'vfmtok-fast[{extra}]'" in text


def test_help_tells_the_exit_codes(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["cache", "--help"])
    assert stop.value.code == 0
    assert "--max-bad" in capsys.readouterr().out
