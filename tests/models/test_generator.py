"""The generator: its cache, noise, training mode and conversions between dtypes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vfmtok_fast import GPT, GPTConfig, VFMTok, ops
from vfmtok_fast.generator import PRESETS
from vfmtok_fast.generator.transformer import rotary_table

SMALL = GPTConfig(
    num_layers=2, num_heads=2, dim=16, vocab_size=37, block_size=16, num_classes=5,
    ffn_multiple_of=8,
)  # fmt: skip


def make(config: GPTConfig = SMALL, dtype: torch.dtype = torch.float64, **changes) -> GPT:
    """Return an eval-mode model with all parameters random: a new model's head is zero."""
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(config, **changes))
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.4)
    return model.to(dtype).eval()


@pytest.fixture(scope="module")
def model() -> GPT:
    return make()


CLASSES = torch.tensor([4, 0, 2, 2, 1, 3, 0])


@pytest.mark.parametrize("head_dim", [4, 24, 60, 100])
def test_cached_equals_uncached(head_dim, uncached):
    model = make(num_heads=2, dim=2 * head_dim, block_size=9)
    classes = CLASSES[:3]
    for settings in (
        {"greedy": True},
        {"seed": 3},
        {"seed": 3, "cfg_scale": 2.0},
        {"seed": 3, "cfg_scale": 1.5, "cfg_interval": 4, "top_k": 12},
        {"greedy": True, "cfg_scale": 3.0, "cfg_interval": 0},
        {"seed": 3, "cfg_scale": 0.0, "top_p": 0.9, "temperature": 0.8},
    ):
        cached = model.generate(classes, **settings)
        assert torch.equal(cached, uncached(model, classes, **settings)), settings
        assert len(cached.unique()) > 8


def test_generated_codes_are_the_arg_max_of_teacher_forcing(model, guided_logits):
    """An oracle for guidance and its interval that shares no code with `generate`."""
    for scale, interval in ((1.0, -1), (2.5, -1), (2.5, 0), (2.5, 3), (0.0, 7), (2.5, 99)):
        codes = model.generate(CLASSES, cfg_scale=scale, cfg_interval=interval, greedy=True)
        logits = guided_logits(model, codes, CLASSES, scale, interval)
        assert torch.equal(codes, logits.argmax(-1)), (scale, interval)


def test_guidance_and_its_interval_matter(model):
    def generate(**settings):
        return model.generate(CLASSES, seed=1, **settings)

    base = generate(cfg_scale=3.0)
    assert torch.equal(base, generate(cfg_scale=3.0, cfg_interval=model.config.block_size))
    assert not torch.equal(base, generate(cfg_scale=3.0, cfg_interval=2))
    assert not torch.equal(base, generate())
    # Codes 0..n+1 are guided, so the first n+2 agree.
    assert torch.equal(base[:, :4], generate(cfg_scale=3.0, cfg_interval=2)[:, :4])
    # Without a class, everything depends on the noise alone.
    none = model.generate(CLASSES, cfg_scale=0.0, image_ids=torch.zeros(7, dtype=torch.int64))
    assert torch.equal(none, none[:1].expand(7, -1))


@pytest.mark.parametrize("settings", [{}, {"cfg_scale": 2.0, "top_k": 9, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_image_does_not_depend_on_its_batch(dtype, settings):
    model = make(dtype=dtype)
    names = torch.tensor([9, 2**40, 0, 6, 1, 30, 2])
    together = model.generate(CLASSES, seed=5, image_ids=names, **settings)
    order = torch.tensor([3, 6, 0, 2, 5, 1, 4])
    other = model.generate(CLASSES[order], seed=5, image_ids=names[order], **settings)
    assert torch.equal(other, together[order])
    for row in range(7):
        one = slice(row, row + 1)
        alone = model.generate(CLASSES[one], seed=5, image_ids=names[one], **settings)
        assert torch.equal(alone[0], together[row])
    assert len({tuple(row) for row in together.tolist()}) == 7


def test_seed_and_image_id_change_the_image_and_default_to_the_row(model):
    same = torch.zeros(3, dtype=torch.int64)
    base = model.generate(same, seed=1)
    assert torch.equal(base, model.generate(same, seed=1, image_ids=torch.arange(3)))
    assert not torch.equal(base[0], base[1])
    assert not torch.equal(base, model.generate(same, seed=2))
    assert torch.equal(model.generate(same, seed=1, image_ids=same), base[:1].expand(3, -1))


def test_first_codes_follow_the_model(check_law):
    """With many images of one class, frequencies of the first code match its softmax."""
    n = 4000
    short = make(block_size=1, vocab_size=6)
    codes = short.generate(torch.full((n,), 2), seed=4)[:, 0]
    logits = short(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([2]))[0, 0].detach()
    law = logits.double().softmax(-1)
    assert law.min() * n > 5
    check_law(codes, law, p_value=1e-4)


def test_no_image_at_all(model):
    assert model.generate(torch.zeros(0, dtype=torch.int64)).shape == (0, 16)


def test_logits_see_the_class_and_earlier_codes_only(model):
    codes = torch.arange(7 * 16).reshape(7, 16) % 37
    before = model(codes, CLASSES)
    for position in (0, 7, 15):
        changed = codes.clone()
        changed[:, position] = (changed[:, position] + 1) % 37
        moved = (model(changed, CLASSES) != before).any(dim=-1)
        assert not moved[:, : position + 1].any()
        assert moved[:, position + 1 :].all()
    assert (model(codes, (CLASSES + 1) % 5) != before).any(dim=-1).all()


@pytest.mark.parametrize("name", ["token_dropout", "residual_dropout", "ffn_dropout"])
def test_each_dropout_acts_in_training_only(name):
    off = dict.fromkeys(("class_dropout", "token_dropout", "residual_dropout", "ffn_dropout"), 0.0)
    codes = torch.zeros(7, 16, dtype=torch.int64)
    model = make(**{**off, name: 0.5})
    want = model(codes, CLASSES)
    model.train()
    assert not torch.equal(model(codes, CLASSES), want)
    assert torch.equal(model.eval()(codes, CLASSES), want)
    none = make(**off).train()
    assert torch.equal(none(codes, CLASSES), want)


def test_class_dropout_puts_no_class_in_its_place():
    off = {"token_dropout": 0.0, "residual_dropout": 0.0, "ffn_dropout": 0.0}
    codes, classes = torch.zeros(2000, 16, dtype=torch.int64), torch.ones(2000, dtype=torch.int64)
    model = make(class_dropout=0.3, num_layers=1, **off)
    kept = model(codes[:1], classes[:1])
    none = model.predict(model.embed(torch.tensor([5]), codes[:1, :-1]))
    model.train()
    with torch.no_grad():
        rows = model(codes, classes)
    is_kept, is_none = ((rows - x).abs().amax((1, 2)) < 1e-9 for x in (kept, none))
    assert torch.all(is_kept ^ is_none)
    # Four standard deviations of a binomial around 0.3.
    assert abs(float(is_none.double().mean()) - 0.3) < 4 * (0.3 * 0.7 / 2000) ** 0.5


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.uint16, torch.uint32])
def test_class_ids_of_every_dtype_can_be_dropped(dtype):
    model = make(class_dropout=0.999, num_layers=1, num_classes=200).train()
    codes = torch.zeros(3, 16, dtype=torch.int64)
    losses = []
    for kind in (torch.int64, dtype):
        torch.manual_seed(0)
        losses.append(model.loss(codes, torch.tensor([1, 2, 3], dtype=kind)))
    assert torch.isfinite(losses[0]) and torch.equal(*losses)


def test_gradients_reach_every_parameter():
    model = make(class_dropout=0.5).train()
    classes = torch.arange(60) % 5
    codes = (torch.arange(60 * 16).reshape(60, 16) * 7) % 37
    F.cross_entropy(model(codes, classes).flatten(0, 1), codes.flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        # Row by row: every class (no class too) and every code took part.
        assert (
            (parameter.grad.flatten(1) if parameter.ndim > 1 else parameter.grad[:, None])
            .abs()
            .sum(1)
            .all()
        )


def test_a_new_model_finds_all_codes_equally_likely():
    logits = GPT(SMALL).eval()(torch.zeros(1, 16, dtype=torch.int64), torch.tensor([0]))
    assert logits.dtype == torch.float32 and not logits.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    model = make(dtype=torch.float32)
    codes = model.generate(CLASSES, seed=1)
    want = model(codes, CLASSES)
    model = model.to(dtype)
    assert model.head.weight.dtype == dtype
    got = model(codes, CLASSES)
    assert got.dtype == torch.float32
    # Rounding of weights and activations, relative to the logits' spread, through 2 layers of about
    # ten roundings each that add up at random.
    assert (got - want).norm() / want.norm() < 20 * torch.finfo(dtype).eps
    drawn = model.generate(CLASSES, cfg_scale=1.5, seed=1)
    assert drawn.shape == (7, 16) and 0 <= int(drawn.min()) and int(drawn.max()) < 37


def test_rotary_angles_stay_float32_through_every_move():
    table = rotary_table(SMALL)
    assert not table[0].any() and table.shape == (17, 4, 2)
    model = make(dtype=torch.float32)
    for move in (
        nn.Module.bfloat16, nn.Module.half, nn.Module.double, nn.Module.float,
        lambda m: m.to(torch.bfloat16), lambda m: m.to("cpu", torch.float64),
        lambda m: m.requires_grad_(False), lambda m: m.train(),
    ):  # fmt: skip
        model = move(model)
        assert model.rotary.dtype == torch.float32 and torch.equal(model.rotary, table)
    assert "rotary" not in model.state_dict()
    # A change that somebody made stays.
    changed = GPT(SMALL)
    changed.rotary.mul_(0.5)
    assert torch.equal(changed.bfloat16().rotary, 0.5 * table)
    with torch.device("meta"):
        empty = GPT(SMALL)
    assert empty.head.weight.is_meta and torch.equal(empty.rotary, table)
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(model.state_dict())
    codes = torch.zeros(7, 16, dtype=torch.int64)
    assert torch.equal(filled.eval()(codes, CLASSES), model.float().eval()(codes, CLASSES))


# Rounded as in the papers; of GPT-2B, which VFMTok added, only the name is known.
SIZES = {"B": "111M", "L": "343M", "XL": "775M", "XXL": "1.4B", "2B": "2B", "3B": "3.1B"}
SIZES |= {"1B": "1.2B", "XXXL": "3.9B", "7B": "6.6B"}


@pytest.mark.parametrize("name", SIZES)
def test_presets_have_the_published_size(name):
    with torch.device("meta"):
        model = GPT(f"GPT-{name}")
    count = sum(parameter.numel() for parameter in model.parameters())
    digits, unit = SIZES[name][:-1], {"M": 10**6, "B": 10**9}[SIZES[name][-1]]
    assert f"{count / unit:.{len(digits.partition('.')[2])}f}" == digits
    assert len(PRESETS) == len(SIZES)


def test_generate_leaves_modes_as_found(model, monkeypatch):
    own = make()
    own.train()
    own.blocks[1].eval()
    modes = [module.training for module in own.modules()]
    want = model.generate(CLASSES, seed=1)
    assert torch.equal(own.generate(CLASSES, seed=1), want)  # Dropout was off all the same.
    assert [module.training for module in own.modules()] == modes

    def fail(*args, **kwargs):
        raise KeyError("on the way")

    monkeypatch.setattr(ops, "sample_token", fail)
    with pytest.raises(KeyError):
        own.generate(CLASSES)
    assert [module.training for module in own.modules()] == modes
    with pytest.raises(ValueError):
        own.generate(CLASSES, top_p=0.0)
    assert [module.training for module in own.modules()] == modes


def test_generate_takes_any_integer_type(model):
    want = model.generate(CLASSES, seed=1)
    for dtype in (torch.int32, torch.uint8):
        got = model.generate(CLASSES.to(dtype), seed=1, image_ids=torch.arange(7).to(dtype))
        assert torch.equal(got, want)


def test_classes_may_be_a_list():
    model = GPT(SMALL).eval()
    want = model.generate(torch.tensor([1, 3]), seed=5)
    for classes in ([1, 3], (1, 3), range(1, 4, 2)):
        assert torch.equal(model.generate(classes, seed=5), want)
    assert model.generate([]).shape == (0, 16)


def test_a_presets_name_is_the_published_file(monkeypatch):
    """GPT.from_official("GPT-L") downloads; a file needs a named config."""
    asked = []

    def fetch(name, flag):
        asked.append((name, flag))
        raise FileNotFoundError("no network")

    monkeypatch.setattr("vfmtok_fast.generator.transformer.fetch_official", fetch)
    monkeypatch.setattr("vfmtok_fast.tokenizer.model.fetch_official", fetch)
    for load in (lambda: GPT.from_official("GPT-B"), VFMTok.from_official):
        with pytest.raises(FileNotFoundError, match="no network"):
            load()
    assert asked == [("GPT-B", "checkpoint="), ("tokenizer", "tokenizer=")]
    with pytest.raises(ValueError, match="config must be a preset's name.*'x.pt', 'GPT-L'"):
        GPT.from_official("x.pt")
