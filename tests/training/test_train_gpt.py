"""`vfmtok-fast train-gpt`, its data and its trainer."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import math
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from vfmtok_fast import GPT, GPTConfig, VFMTok, VFMTokConfig, cli
from vfmtok_fast.cache import TokenCacheDataset, build, open_source
from vfmtok_fast.cli import training_reports
from vfmtok_fast.training import (
    Codes,
    GPTTrainer,
    GPTTraining,
    NotFinite,
    OnlineCodes,
    Pictures,
    generated,
)
from vfmtok_fast.training.estimate import estimate_gpt

CONFIG = {"num_layers": 2, "num_heads": 2, "dim": 32, "ffn_multiple_of": 32}


@pytest.fixture(scope="module")
def tokenizer(tiny: VFMTokConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tokenizer"
    torch.manual_seed(0)
    VFMTok(tiny).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cache(photos: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of ten images of two classes, in two views."""
    out = tmp_path_factory.mktemp("caches") / "cache"
    build(photos, out, VFMTok.from_pretrained(tokenizer), views=["center", "center-flip"])
    return out


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("configs") / "tiny.json"
    path.write_text(json.dumps(CONFIG))
    return path


def line(given: Path, out: Path, config: Path, *more: object) -> list[str]:
    return [
        "train-gpt", str(given), str(out), "--config", str(config), "--batch-size", "4",
        "--steps", "3", "--log-every", "1", "--device", "cpu", *map(str, more),
    ]  # fmt: skip


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_a_run_on_a_cache_and_going_on_with_it(cache, config, tokenizer, tmp_path, capsys):
    out = tmp_path / "run"
    more = ("--model", tokenizer, "--show-every", "3")
    assert cli.main(line(cache, out, config, *more)) == 0, capsys.readouterr().err
    assert "3 steps, 1.50 epochs" in capsys.readouterr().out
    lines = log(out)
    # All codes are equally likely at first, as in the authors' runs.
    assert lines[0]["loss"] == pytest.approx(torch.tensor(256.0).log().item(), rel=1e-5)
    assert lines[-1]["image_epochs"] == 1.2 and lines[-1]["sequence_epochs"] == 0.6
    assert lines[-1]["tokens_per_second"] == pytest.approx(16 * lines[-1]["images_per_second"])
    assert (out / "pictures" / "step-00000003.png").exists()
    model = GPT.from_pretrained(out / "model")
    has = model.config
    assert (has.num_classes, has.vocab_size, has.block_size) == (2, 256, 16)
    theirs = GPT.from_official(out / "gpt.pt", has)
    assert torch.equal(theirs.head.weight, model.head.weight)

    assert cli.main(line(cache, out, config, *more, "--weight-decay", "0.1")) == 2
    assert (
        "settings have changed: weight_decay (there 0.05, here 0.1); to resume"
        in capsys.readouterr().err
    )
    assert cli.main(line(cache, out, config, *more, "--steps", "5", "--accept-changes")) == 0
    assert [line["step"] for line in log(out)] == [1, 2, 3, 4, 5]
    on = tmp_path / "on"
    start = [*line(cache, on, config), "--start-from", str(out / "model")]
    del start[start.index("--config") : start.index("--config") + 2]
    assert cli.main(start) == 0
    assert log(on)[0]["loss"] < lines[0]["loss"]


def test_pictures_instead_of_a_cache(photos, config, tokenizer, tmp_path, capsys):
    assert cli.main(line(photos, tmp_path / "run", config, "--model", tokenizer)) == 0
    (last,) = log(tmp_path / "run")[-1:]
    assert last["bad_pictures"] == 0 and last["codes_share"] > 0
    assert cli.main(line(photos, tmp_path / "other", config)) == 2
    assert "not a token cache; make one" in capsys.readouterr().err


@pytest.mark.slow
def test_overfitting_gives_the_codes_back(cache, config, tmp_path, capsys):
    more = ("--overfit", "4", "--lr", "0.02", "--log-every", "50")
    assert cli.main(line(cache, tmp_path / "short", config, *more)) == 1
    assert cli.main(line(cache, tmp_path / "run", config, *more, "--steps", "90")) == 0
    assert "greedy generation reproduces 100.00% of the codes" in capsys.readouterr().out


def test_a_cache_in_half_precision_knows_its_tokenizer(
    photos, config, tokenizer, tiny, tmp_path, capsys
):
    half = VFMTok.from_pretrained(tokenizer).set_precision("bfloat16")
    build(photos, tmp_path / "cache", half)
    VFMTok(tiny).save_pretrained(tmp_path / "other")
    for folder, code in ((tokenizer, 0), (tmp_path / "other", 2)):
        more = ("--model", folder, "--steps", "1", "--show-every", "0")
        assert cli.main(line(tmp_path / "cache", tmp_path / f"run{code}", config, *more)) == code
    assert "its tokens are from a tokenizer other than" in capsys.readouterr().err


def test_dry_run(cache, config, tmp_path, capsys):
    assert cli.main(line(cache, tmp_path / "run", config, "--dry-run")) == 0
    text = capsys.readouterr().out
    assert "10 pictures, 2 steps an epoch, 3 steps in all" in text
    assert "step 2 of a small model" in text
    assert not (tmp_path / "run").exists()


def test_estimate_of_a_preset():
    """Per code, each weight but the embeddings takes 6 operations; attention comes on top."""
    found = estimate_gpt(GPTConfig.preset("GPT-B"), GPTTraining())
    embeddings = (16_384 + 1_001) * 768
    assert found.flops == pytest.approx(6 * (found.learned - embeddings) * 256, rel=0.05)


def test_refusals(cache, photos, config, tokenizer, tmp_path, tiny, capsys):
    other = VFMTok(tiny)
    other.save_pretrained(tmp_path / "other")
    narrow = tmp_path / "narrow.json"
    narrow.write_text(json.dumps({**CONFIG, "vocab_size": 128}))
    few = tmp_path / "few.json"
    few.write_text(json.dumps({**CONFIG, "num_classes": 1}))
    cases = [
        (("--epochs", "inf"), config, "--epochs must be a number above 0, got inf"),
        (("--epochs", "-1"), config, "--epochs must be a number above 0"),
        (("--warmup-epochs", "inf"), config, "--warmup-epochs must be a number of at least 0"),
        (("--seed", str(2**70)), config, "--seed must be in [-2^63, 2^64)"),
        (("--show-every", "-1"), config, "--show-every must be at least 0"),
        (("--model", tmp_path / "other"), config, "its tokens are from a tokenizer other than"),
        ((), narrow, "of vocab_size 128 cannot learn from tokens of another codebook"),
        ((), few, "has 2 classes, more than the generator's 1"),
        (("--overfit", "11"), config, "has 10 pictures, not 11"),
        (("--batch-size", "11"), config, "10 pictures are fewer than a batch of 11"),
        (("--sharded",), config, "--sharded needs several processes"),
        (("--views", "random-0"), config, "has the views center, center-flip, not 'random-0'"),
        (("--split", "train", "--input", "lmdb"), config, "--input, --split: only for pictures; "),
    ]
    for number, (more, file, message) in enumerate(cases):
        words = line(cache, tmp_path / f"run{number}", file, *more)
        if "--epochs" in more:
            del words[words.index("--steps") : words.index("--steps") + 2]
        assert cli.main(words) == 2, message
        assert message in capsys.readouterr().err
        assert not (tmp_path / f"run{number}").exists()


def test_other_pictures_or_views_are_another_run(
    cache, photos, config, tokenizer, tmp_path, capsys
):
    """As many images of other paths or classes, or other views of the same ones, are refused."""

    def refused(given: Path, out: str, *more: object) -> str:
        assert cli.main(line(given, tmp_path / out, config, "--steps", "1", *more)) == 2
        return capsys.readouterr().err

    assert cli.main(line(cache, tmp_path / "cached", config, "--views", "center")) == 0
    assert "views (there center, here center+center-flip)" in refused(cache, "cached")
    moved = tmp_path / "moved"
    shutil.copytree(photos, moved)
    first = min(path for path in moved.iterdir() if path.is_dir())
    online = ("--model", tokenizer)
    assert cli.main(line(moved, tmp_path / "online", config, *online)) == 0
    first.rename(moved / "zebra")
    assert "pictures_sha256 (there " in refused(moved, "online", *online)
    assert "--views needs a token cache" in refused(photos, "none", *online, "--views", "center")


def test_online_one_bad_label_is_a_bad_picture(tmp_path: Path, tokenizer: Path):
    """As in a cache, a damaged label makes a bad image; an image without a label is refused."""
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for number, label in enumerate(("0", "1", "cat", "1")):
            picture = io.BytesIO()
            Image.new("RGB", (80, 80), (60 * number, 9, 9)).save(picture, "PNG")
            for name, data in (("cls", label.encode()), ("png", picture.getvalue())):
                member = tarfile.TarInfo(f"{number:04d}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    tok = VFMTok.from_pretrained(tokenizer)
    pictures = Pictures(open_source(tmp_path), 2, size=tok.config.image_size)
    online = OnlineCodes(pictures, tok)
    with contextlib.closing(online.batches(0)) as batches:
        for batch in itertools.islice(batches, 4):
            codes, classes = online.arguments(batch, torch.device("cpu"))
            assert codes.shape == (2, tok.config.num_regions) and int(classes.min()) >= 0
    assert list(pictures.bad) == ["train-0.tar/0002.png"]
    pictures.entries[0] = pictures.entries[0]._replace(label=-1)
    with pytest.raises(ValueError, match="1 of 3 pictures have no class"):
        OnlineCodes(pictures, tok)


def test_an_epoch_has_every_picture_once_and_draws_its_view(cache: Path):
    data = TokenCacheDataset(cache, seed=3)
    codes = Codes(data, 5, seed=3)
    batches = list(itertools.islice(codes.batches(0), 4))
    names = [[*a.paths, *b.paths] for a, b in zip(batches[::2], batches[1::2], strict=True)]
    assert sorted(names[0]) == sorted(names[1]) and names[0] != names[1]
    assert len(set(names[0])) == 10
    both = TokenCacheDataset(cache, per_picture="all")
    views = [
        int((both[int(name.split()[1])][0] == some).all(-1).int().argmax())
        for batch in batches
        for name, some in zip(batch.paths, batch.items, strict=True)
    ]
    assert set(views) == {0, 1} and views[:10] != views[10:]
    # A resumed run gets the same batches, and so do two processes that share them.
    again = list(itertools.islice(codes.batches(2), 2))
    assert all(torch.equal(a.items, b.items) for a, b in zip(batches[2:], again, strict=True))
    whole = next(Codes(data, 4).batches(0))
    shares = [next(Codes(data, 4, rank=rank, world_size=2).batches(0)) for rank in (0, 1)]
    for rank, share in enumerate(shares):
        assert torch.equal(share.items, whole.items[rank::2])
        assert torch.equal(share.labels, whole.labels[rank::2])


Make = Callable[..., GPTTrainer]


@pytest.fixture
def make() -> Make:
    def make(drop_path: float = 0.0, device: str = "cpu", **settings) -> GPTTrainer:
        torch.manual_seed(0)
        config = GPTConfig(
            **CONFIG, block_size=16, vocab_size=64, num_classes=3, drop_path=drop_path,
            residual_dropout=0.0 if drop_path else 0.1, ffn_dropout=0.0 if drop_path else 0.1,
        )  # fmt: skip
        model = GPT(config)
        torch.nn.init.normal_(model.head.weight, std=0.02)
        return GPTTrainer(model.to(device), GPTTraining(lr=1e-2, **settings))

    return make


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(64, (6, 16), generator=generator), torch.arange(6) % 3


def losses(trainer: GPTTrainer, batch: tuple[Tensor, Tensor], steps: int = 4) -> list[float]:
    return [trainer.step(*batch)["loss"] for _ in range(steps)]


def test_a_step_is_the_same_bits_and_draws_from_its_seed(make: Make, batch):
    expected = losses(make(), batch)
    torch.rand(3)
    assert losses(make(), batch) == expected
    assert losses(make(seed=1), batch) != expected
    assert losses(make(grad_checkpointing=True), batch) == expected


def test_micro_batches_and_half_precision_are_near(make: Make, batch):
    for dropout in ("class_dropout", "token_dropout", "residual_dropout", "ffn_dropout"):
        assert getattr(make().model.config, dropout) == 0.1
    trainers = [make(), make(micro_batch=4), make(precision="bfloat16"), make(precision="float16")]
    for trainer in trainers:
        trainer.model.dropout.p = 0.0
        object.__setattr__(trainer.model.config, "class_dropout", 0.0)
        for block in trainer.model.blocks:
            block.attention.dropout.p = block.ffn.dropout.p = 0.0
    whole, parts, narrow, scaled = (losses(trainer, batch) for trainer in trainers)
    assert parts == pytest.approx(whole, rel=1e-5)
    assert narrow == pytest.approx(whole, rel=1e-2)
    assert scaled[0] == pytest.approx(whole[0], rel=1e-3)


def test_float16_leaves_out_a_step_whose_gradients_are_too_large(make: Make, batch):
    trainer = make(precision="float16")
    trainer.step(*batch)
    trainer.learner.scaler.update(2.0**40)
    before = trainer.model.head.weight.detach().clone()
    terms = trainer.step(*batch)
    assert not math.isfinite(terms["grad_norm"]) and torch.equal(trainer.model.head.weight, before)
    state = trainer.state_dict()
    assert state["optimizer"]["scaler"]["scale"] == 2.0**39
    other = make(precision="float16")
    other.load_state_dict(state)
    assert other.learner.scaler.get_scale() == 2.0**39
    for _ in range(30):
        terms = trainer.step(*batch)
    assert terms["grad_norm"] < 100 and not torch.equal(trainer.model.head.weight, before)


def test_float16_goes_on_after_a_nan_and_not_for_ever_with_one(make: Make, batch):
    trainer = make(precision="float16")
    loss = trainer.model.loss
    trainer.model.loss = lambda *given: loss(*given) * math.nan
    with pytest.raises(NotFinite, match=r"step 1: not finite: loss \(nan\)"):
        trainer.step(*batch)

    def without_gradient(*given: Tensor) -> Tensor:
        value = loss(*given)
        value.register_hook(lambda grad: grad * math.nan)
        return value

    trainer.model.loss = without_gradient
    assert math.isnan(trainer.step(*batch)["grad_norm"])
    with pytest.raises(NotFinite, match=r"not finite: grad_norm \(nan\)"):
        losses(trainer, batch, 40)
    trainer.model.loss = loss
    assert math.isfinite(trainer.step(*batch)["grad_norm"])
    assert trainer.left_out({"grad_norm": [1.0, math.inf, math.nan]}) == {"left_out": 2}


def test_a_log_is_json_where_float16_left_steps_out(cache, config, tmp_path):
    more = ("--precision", "float16", "--lr", "100", "--clip", "0", "--steps", "4")
    assert cli.main(line(cache, tmp_path / "run", config, *more)) == 0
    text = (tmp_path / "run" / "log.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert sum(line["left_out"] for line in log(tmp_path / "run")) > 0


def test_dropout_and_drop_path_together(cache, config, tmp_path):
    names = ("token_dropout", "residual_dropout", "ffn_dropout", "drop_path")
    for number, (more, expected) in enumerate(
        [
            (("--drop-path", "0"), [0.1, 0.1, 0.1, 0]),
            (("--dropout", "0.3", "--drop-path", "0.2"), [0.3, 0, 0, 0.2]),
            (("--dropout", "0.3"), [0.3, 0.3, 0.3, 0]),
        ]
    ):
        out = tmp_path / str(number)
        assert cli.main(line(cache, out, config, *more, "--steps", "1")) == 0
        has = json.loads((out / "model" / "config.json").read_text())
        assert [has[name] for name in names] == expected


def test_what_lies_in_the_folder(cache, photos, config, tokenizer, tiny, tmp_path, capsys):
    """Another tokenizer's codes and foreign files are refused.

    A run that was killed before its first checkpoint starts anew.
    """
    out = tmp_path / "run"
    assert cli.main(line(photos, out, config, "--model", tokenizer)) == 0
    VFMTok(tiny).save_pretrained(tmp_path / "other")
    assert cli.main(line(photos, out, config, "--model", tmp_path / "other")) == 2
    assert "step-00000003.pt: tokens (there " in capsys.readouterr().err
    for path in (out / "checkpoints").iterdir():
        path.unlink()
    assert cli.main(line(cache, out, config)) == 2, "a model without its checkpoints"
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / "log.jsonl").write_text('{"step": 1, "loss": 3}\n{"ste')
    assert cli.main(line(cache, killed, config)) == 0
    assert [line["step"] for line in log(killed)] == [1, 2, 3]
    (tmp_path / "file").write_text("")
    assert cli.main(line(cache, tmp_path / "file", config)) == 2
    assert "file is a file; choose a new folder" in capsys.readouterr().err


def test_a_closed_pipe_does_not_end_a_run(cache, config, tmp_path, monkeypatch, capsys):
    def closed(text: object, *, flush: bool = False) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(training_reports, "say", closed)
    monkeypatch.setattr(training_reports.os, "dup2", lambda *numbers: None)
    monkeypatch.setattr(training_reports.sys, "stdout", sys.__stdout__)
    assert cli.main(line(cache, tmp_path / "run", config, "--json", "--warmup-steps", "9")) == 0
    error = capsys.readouterr().err
    assert "3 steps, 1.50 epochs" in error and "the warm-up takes 9 steps" in error


def test_an_average_that_hardly_moves_is_named(cache, config, tmp_path, capsys):
    """The average is the result, and a short run would end with what it began with."""
    assert cli.main(line(cache, tmp_path / "slow", config)) == 0
    error = capsys.readouterr().err
    assert "after 3 steps still holds 100% of the initial ones; --ema 0 follows faster" in error
    assert cli.main(line(cache, tmp_path / "fast", config, "--ema", "0.4")) == 0
    assert "initial" not in capsys.readouterr().err


def test_a_sharded_model_as_a_whole(batch, tmp_path):
    """The whole model works on its own, as --overfit needs when the other processes have ended."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**CONFIG, block_size=16, vocab_size=64, num_classes=3))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        trainer = GPTTrainer(model, sharded=True)
        trainer.step(*batch)
        whole = trainer.whole(trainer.model)
    finally:
        dist.destroy_process_group()
    assert torch.equal(whole.head.weight, trainer.model.head.weight.to_local())
    assert whole.generate([0, 1], greedy=True).shape == (2, 16)
    assert not whole.training and whole.loss(*batch) > 0


def test_drop_path_skips_branches_of_some_samples_and_keeps_the_mean(make: Make):
    block = make(drop_path=0.5).model.blocks[-1].train()
    branch = torch.ones(4000, 1, 1)
    kept = block._kept(branch)
    assert set(kept.flatten().tolist()) == {0.0, 2.0}
    assert float(kept.mean()) == pytest.approx(1, abs=0.1)
    assert block.eval()._kept(branch) is branch
    assert make(drop_path=0.5).model.blocks[0].drop_path == 0


def test_pictures_of_the_way_leave_no_keys_and_values(cache, config, tokenizer, tmp_path):
    data = TokenCacheDataset(cache)
    fields = {**CONFIG, "vocab_size": data.cache.manifest.codebook_size, "num_classes": 2}
    model = GPT(GPTConfig(**fields, block_size=data.cache.manifest.num_tokens)).eval()
    assert generated(VFMTok.from_pretrained(tokenizer))(model).dtype == np.uint8
    assert model.kept.nbytes == 0


def test_only_matrices_decay(make: Make):
    groups = make().learner.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    assert all(w.ndim >= 2 for w in groups[0]["params"])
    assert all(w.ndim == 1 for w in groups[1]["params"])


def test_a_trainer_refuses_rounded_weights_and_no_codes(make: Make, batch):
    with pytest.raises(TypeError, match="weights must be float32 to learn, got torch.bfloat16"):
        GPTTrainer(make().model.bfloat16())
    with pytest.raises(ValueError, match="at least one image, got none"):
        make().step(batch[0][:0], batch[1][:0])


def test_compiled_layers_learn_the_same(make: Make, batch, monkeypatch):
    """Tested with Dynamo alone: a compiler takes minutes, and its code is torch's to get right."""
    compile = functools.partialmethod(torch.nn.Module.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    trainer = make(compile=True)
    assert losses(trainer, batch) == pytest.approx(losses(make(), batch), rel=1e-6)
    assert all(block._compiled_call_impl is not None for block in trainer.model.blocks)
    assert trainer.ema.blocks[0]._compiled_call_impl is None
