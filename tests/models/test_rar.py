"""RAR: generation against full passes, orders, loading, and what it refuses."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from generators import make, make_rar
from torch import Tensor, nn

import vfmtok_fast
from vfmtok_fast import GPT, RAR, RARConfig, training
from vfmtok_fast.generator import Sampling, load_generator
from vfmtok_fast.generator import decoder as decoding_loop
from vfmtok_fast.generator.memory import LOGIT_COPIES, bytes_per_image, fastest_batch
from vfmtok_fast.tuner.run import _models

CLASSES = torch.tensor([4, 0, 2, 2, 1, 3, 0])
SETTINGS = (
    {"seed": 1},
    {"greedy": True},
    {"seed": 2, "cfg_scale": 3.0},
    {"seed": 3, "cfg_scale": 4.0, "cfg_power": 2.75},
    {"seed": 4, "cfg_scale": 2.5, "cfg_power": 0.5, "cfg_interval": 6, "top_k": 9},
    {"seed": 5, "cfg_scale": 0.0, "cfg_power": 1.0, "top_p": 0.9, "temperature": 1.02},
)


@pytest.fixture(scope="module")
def model() -> RAR:
    return make_rar()


@torch.no_grad()
def uncached(model: RAR, classes: Tensor, **settings) -> Tensor:
    """Generation that runs all places anew for every code; an oracle for the loop and the cache."""
    sampling, n = Sampling(**settings), model.config.block_size
    codes = torch.zeros(len(classes), n, dtype=torch.int64)
    ids, scales = torch.arange(len(classes)), sampling.scales(n, model.device)
    none = torch.full_like(classes, model.config.num_classes)
    for step in range(n):
        logits = model(codes, classes)[:, step]
        if sampling.guided(step):
            logits = torch.cat([logits, model(codes, none)[:, step]])
        codes[:, step] = sampling.draw(logits, ids, step, scales)
    return codes


@pytest.mark.parametrize("policy", [(), decoding_loop.STEP_OPS], ids=["reference", "enabled"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_cached_equals_uncached(model, settings, policy):
    model = model.double()
    try:
        want = uncached(model, CLASSES, **settings)
        with vfmtok_fast.enable(policy):
            assert torch.equal(model.generate(CLASSES, **settings), want)
    finally:
        model.float()
    assert len(want.unique()) > 10


@pytest.mark.parametrize(("heads", "dim"), [(1, 6), (2, 44), (3, 30)])
def test_any_size(heads, dim):
    model = make_rar(num_heads=heads, dim=dim, mlp_dim=dim - 1, block_size=7).double()
    settings = {"seed": 3, "cfg_scale": 4.0, "cfg_power": 2.0}
    assert torch.equal(model.generate(CLASSES, **settings), uncached(model, CLASSES, **settings))


def test_a_growing_scale_begins_with_none_and_nearly_reaches_it():
    scales = Sampling(cfg_scale=5.0, cfg_power=2.0).scales(256, torch.device("cpu"))
    assert scales.dtype == torch.float32 and float(scales[0]) == 1.0
    assert torch.all(scales.diff() >= 0) and 4.99 < float(scales[-1]) < 5.0
    middle = 1 + 4 * (1 - torch.cos(torch.tensor(torch.pi / 4, dtype=torch.float64))) / 2
    assert abs(float(scales[128]) - float(middle)) < 1e-6
    assert Sampling(cfg_scale=5.0).scales(3, torch.device("cpu")) is None


def test_a_gpt_takes_a_growing_scale_too(uncached):
    gpt = make()
    settings = {"seed": 3, "cfg_scale": 3.0, "cfg_power": 1.5}
    classes = CLASSES[:3]
    codes = gpt.generate(classes, **settings)
    assert torch.equal(codes, uncached(gpt, classes, **settings))
    assert not torch.equal(codes, gpt.generate(classes, seed=3, cfg_scale=3.0))


@pytest.mark.parametrize(
    ("power", "error"), [(0, ValueError), (-1.0, ValueError), (float("nan"), ValueError),
                         (float("inf"), ValueError), (10**400, ValueError), ("1", TypeError),
                         (True, TypeError)],
)  # fmt: skip
def test_refuses_a_wrong_power(model, power, error):
    with pytest.raises(error, match="^generate: cfg_power must be"):
        model.generate(CLASSES, cfg_scale=2.0, cfg_power=power)


@pytest.mark.parametrize("places", [1, 3, 16])
def test_conditions_computed_a_few_places_at_a_time(model, places, monkeypatch):
    settings = {"seed": 3, "cfg_scale": 4.0, "cfg_power": 2.0, "cfg_interval": 9}
    want = model.generate(CLASSES, **settings)
    each = 2 * len(CLASSES) * model.condition_size * model.config.dim * 4
    monkeypatch.setattr(decoding_loop, "CONDITION_BYTES", places * each)
    decoder = model.decoder(len(CLASSES), guided=True)
    assert len(decoder.conditions) == places
    # 17 places, and 7 that keep the heads aligned.
    keys = 2 * 2 * 2 * len(CLASSES) * 24 * model.config.dim * 4
    assert decoder.nbytes == keys + (places + 1) * each
    assert torch.equal(decoder.generate(CLASSES, **settings), want)
    # Other classes replace the conditions of these.
    other = (CLASSES + 1) % 5
    assert torch.equal(decoder.generate(other, **settings), model.generate(other, **settings))


def test_conditions_are_computed_while_the_tf32_switches_are_settled(monkeypatch):
    """A tokenizer that decodes in another thread with TF32 must not change the codes."""
    model, held, seen = make_rar(), [], []

    @contextlib.contextmanager
    def settled() -> Iterator[None]:
        held.append(True)
        yield
        held.pop()

    fill = model.fill_condition
    monkeypatch.setattr(decoding_loop.tf32, "settled", settled)
    model.fill_condition = lambda *arguments: (seen.append(bool(held)), fill(*arguments))
    model.generate(CLASSES)
    assert seen == [True] and not held


def test_an_image_does_not_depend_on_its_batch(model):
    settings = {"seed": 5, "cfg_scale": 3.0, "cfg_power": 1.0}
    model = model.double()
    try:
        together = model.generate(CLASSES, **settings)
        for row in range(len(CLASSES)):
            one = slice(row, row + 1)
            ids = torch.tensor([row])
            alone = model.generate(CLASSES[one], image_ids=ids, **settings)
            assert torch.equal(alone[0], together[row])
        batches = model.stream(CLASSES, batch_size=3, **settings)
        assert torch.equal(torch.cat([codes for _, codes in batches]), together)
    finally:
        model.float()


def test_weights_changed_in_place_take_effect():
    model = make_rar()
    settings = {"seed": 1, "cfg_scale": 2.0}
    before = model.generate(CLASSES, **settings)
    for name in ("condition", "qkv", "query_norm", "ffn_norm"):
        with torch.no_grad():
            getattr(model.blocks[1], name).weight.mul_(-1)
        after = model.generate(CLASSES, **settings)
        assert torch.equal(after, uncached(model, CLASSES, **settings)), name
        assert not torch.equal(after, before), name
        before = after


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
def test_half_precision_and_8_bits(model, dtype, kv_dtype):
    half = make_rar().to(dtype)
    codes = half.generate(CLASSES, greedy=True, cfg_scale=2.0, kv_dtype=kv_dtype)
    exact = model.generate(CLASSES, greedy=True, cfg_scale=2.0)
    assert codes.dtype == torch.int64 and int(codes.max()) < 37
    # The first code is drawn before an error can change what follows.
    assert (codes[:, 0] == exact[:, 0]).sum() >= 6


def test_a_code_sees_its_class_and_the_codes_before_it_in_its_order(model):
    draw = torch.Generator().manual_seed(1)
    orders = torch.stack([torch.randperm(16, generator=draw) for _ in CLASSES])
    codes = torch.randint(37, (7, 16), generator=draw)
    before = model(codes, CLASSES, orders)
    for at in (0, 5, 15):
        changed = codes.clone()
        rows = torch.arange(7)
        changed[rows, orders[:, at]] = (changed[rows, orders[:, at]] + 1) % 37
        moved = (model(changed, CLASSES, orders) != before).any(-1)
        assert not moved[:, : at + 1].any() and moved[:, at + 1 :].all()
    assert (model(codes, (CLASSES + 1) % 5, orders) != before).any(-1).all()
    raster = torch.arange(16).expand(7, -1)
    assert torch.equal(model(codes, CLASSES, raster), model(codes, CLASSES))
    assert not torch.equal(before, model(codes, CLASSES))


def test_checkpointing_changes_no_gradient():
    model = make_rar().train()
    codes = torch.arange(7 * 16).view(7, 16) % 37
    grads = []
    for recompute in (False, True):
        model.grad_checkpointing = recompute
        model.zero_grad()
        model(codes, CLASSES).square().mean().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
def test_the_estimate_of_memory_holds_what_a_decoder_owns(model, guided, kv_dtype):
    each = bytes_per_image(model, guided, kv_dtype)
    logits = (2 if guided else 1) * 4 * LOGIT_COPIES * model.config.vocab_size
    ahead = (2 if guided else 1) * model.places * model.condition_size * model.config.dim * 4
    for batch in (1, 5):
        owned = model.decoder(batch, guided=guided, kv_dtype=kv_dtype).nbytes
        assert batch * (each - logits) <= owned + ahead * batch / model.places
        assert owned <= batch * (each - logits + ahead)
        # What this many bytes hold is generated at a time, and no image more.
        needed = batch * (each + ahead)
        assert fastest_batch(model, 9, guided, None, needed, kv_dtype) in (batch, -(-9 // 2))
        with pytest.raises(MemoryError, match=f"at most {batch} fit"):
            fastest_batch(model, 9, guided, batch + 1, needed, kv_dtype)


def test_a_decoder_keeps_no_weight_alive():
    model = make_rar()
    decoder = model.decoder(2)
    decoder.generate([1, 2])
    assert not decoder._computed
    embedding = weakref.ref(model.embedding.weight)
    del model
    gc.collect()
    assert embedding() is None


def test_where_only_a_gpt_works(model):
    with pytest.raises(TypeError, match="^GPTTrainer: model must be a GPT, got RAR"):
        training.GPTTrainer(model)
    with pytest.raises(ValueError, match="^tune: unknown model RAR; give"):
        _models(model)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"codes": None}, TypeError, "^RAR: codes must be a torch.Tensor"),
        ({"codes": torch.zeros(2, 15, dtype=torch.int64)}, ValueError, "codes must have shape"),
        ({"codes": torch.full((2, 16), 37)}, ValueError, r"codes must be in \[0, 37\)"),
        ({"class_ids": torch.tensor([6, 0])}, ValueError, r"class_ids must be in \[0, 6\)"),
        ({"class_ids": torch.tensor([1])}, ValueError, "one batch size, got 2 and 1"),
        ({"orders": torch.zeros(2, 16)}, TypeError, "orders must hold integers"),
        ({"orders": torch.zeros(2, 15, dtype=torch.int64)}, ValueError, "orders must have shape"),
        ({"orders": torch.zeros(2, 16, dtype=torch.int64)}, ValueError, "must be a permutation"),
        ({"orders": torch.arange(1, 17).expand(2, -1)}, ValueError, "must be a permutation"),
    ],
)
def test_forward_refuses_in_one_line(model, changes, error, message):
    given = {"codes": torch.zeros(2, 16, dtype=torch.int64), "class_ids": torch.tensor([1, 5])}
    assert model(**given).shape == (2, 16, 37)
    with pytest.raises(error, match=message) as caught:
        model(**given | changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 3}, r"dim / num_heads must be an even number, got 1024 / 3"),
        ({"dim": 48}, "got 48 / 16"),
        ({"mlp_dim": 0}, "mlp_dim must be an integer of at least 1, got 0"),
        ({"norm_eps": -1}, "norm_eps must be a number in"),
        ({"rope_base": 1}, "unknown field rope_base"),
    ],
)
def test_a_config_is_checked(fields, message):
    with pytest.raises(ValueError, match=f"^RARConfig: .*{message}"):
        RAR(fields)


def test_a_config_has_no_other_type():
    with pytest.raises(TypeError, match="^RAR: config must be a RARConfig or its fields, got str"):
        RAR("RAR-L")


class Adapted(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 2


@pytest.mark.parametrize(
    "part",
    ["head", "head_condition", "embedding", "blocks.0.condition", "blocks.1.qkv", "blocks.0.down",
     "blocks.1.query_norm", "blocks.0.attention_norm"],
)  # fmt: skip
@pytest.mark.parametrize("way", ["adapter", "hook"])
def test_layers_that_steps_do_not_call_must_be_plain(part, way):
    model = make_rar()
    if way == "hook":
        model.get_submodule(part).register_forward_hook(lambda *args: None)
    else:
        parent, _, name = part.rpartition(".")
        setattr(model.get_submodule(parent), name, Adapted(model.get_submodule(part)))
    with pytest.raises(TypeError, match="generate: needs plain layers"):
        model.generate(CLASSES)


def test_a_subclass_with_another_forward_is_refused():
    class Other(RAR):
        def forward(self, codes, class_ids, orders=None):
            return super().forward(codes, class_ids, orders) * 2

    with pytest.raises(TypeError, match="Other overrides forward"):
        Other(make_rar().config).generate(CLASSES)


def test_another_eps_is_refused():
    model = make_rar()
    model.blocks[1].key_norm.eps = 1e-3
    with pytest.raises(ValueError, match="every norm must have the config's norm_eps 1e-06"):
        model.generate(CLASSES)


def test_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path / "rar")
    want = model.generate(CLASSES, seed=1)
    for load in (RAR.from_pretrained, load_generator):
        again = load(tmp_path / "rar", map_location="cpu")
        assert type(again) is RAR and again.config == model.config
        assert torch.equal(again.generate(CLASSES, seed=1), want)
    with pytest.raises(ValueError, match="^GPTConfig: unknown field mlp_dim"):
        GPT.from_pretrained(tmp_path / "rar")
    make().save_pretrained(tmp_path / "gpt")
    assert type(load_generator(tmp_path / "gpt")) is type(load_generator("emoji")) is GPT
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load_generator(str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match="cannot be downloaded"):
        load_generator("nobody/nothing", map_location="cpu", local_files_only=True)


def test_the_authors_file(official_weights, tmp_path):
    weights = official_weights("rar_small")
    from safetensors.torch import save_file

    save_file(weights, tmp_path / "rar.safetensors")
    torch.save({"model": weights}, tmp_path / "rar.pt")
    models = [RAR.from_official(file) for file in (weights, *sorted(tmp_path.iterdir()))]
    codes = [model.generate([1, 7], seed=1) for model in models]
    assert all(torch.equal(one, codes[0]) for one in codes)
    assert models[0].config == RARConfig(
        num_layers=3, num_heads=4, dim=128, mlp_dim=512, vocab_size=512, block_size=64,
        num_classes=10,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.proj\.bias"):
        RAR.from_official({k: v for k, v in weights.items() if k != "blocks.1.attn.proj.bias"})
    with pytest.raises(ValueError, match="surplus"):
        RAR.from_official(weights | {"surplus": torch.ones(1)})
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.fc1\.weight"):
        RAR.from_official(weights, {"mlp_dim": 256})
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.fc1\.weight"):
        RAR.from_official(weights, RARConfig())
    other = RAR.from_official(weights, {"norm_eps": 1e-3})
    assert other.config == dataclasses.replace(models[0].config, norm_eps=1e-3)
    assert other.blocks[0].key_norm.eps == 1e-3
    with pytest.raises(ValueError, match="RAR checkpoint"):
        RAR.from_official(official_weights("gpt_small"))
    with pytest.raises(FileNotFoundError, match="nothing.safetensors does not exist"):
        RAR.from_official(tmp_path / "nothing.safetensors")
