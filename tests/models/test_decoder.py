"""The decoder gives the same codes, with one set of buffers and no weights of its own."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from generators import CLASSES, CONFIG, SETTINGS, make
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import vfmtok_fast
from vfmtok_fast import GPT
from vfmtok_fast.generator import Decoder, Sampling
from vfmtok_fast.generator.decoder import STEP_OPS, Kept


@pytest.fixture(scope="module")
def model() -> GPT:
    return make()


def fast(model: GPT, classes: torch.Tensor, **settings) -> torch.Tensor:
    with vfmtok_fast.enable(STEP_OPS, strict=True):
        return model.generate(classes, **settings)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_codes_are_those_of_all_positions_every_time(model, settings, uncached):
    for B in (1, 2, 3, 7):
        want = uncached(model, CLASSES[:B], **settings)
        assert torch.equal(model.generate(CLASSES[:B], **settings), want), B
        assert torch.equal(fast(model, CLASSES[:B], **settings), want), B
        assert torch.equal(fast(model, CLASSES[:B], **settings), want), "the same seed repeats"


def test_each_op_of_a_step_is_a_choice_of_its_own(model):
    want = model.generate(CLASSES[:2], seed=1)
    for op in STEP_OPS:
        vfmtok_fast.switch.record.clear()
        with vfmtok_fast.enable(op, strict=True):
            assert torch.equal(model.generate(CLASSES[:2], seed=1), want)
        took = {name: set(vfmtok_fast.status().ops[name].calls) for name in STEP_OPS}
        assert took == {name: {"cpu" if name == op else "reference"} for name in STEP_OPS}


def test_a_decoder_of_ones_own(model):
    decoder = model.decoder(3, guided=True)
    for settings in SETTINGS:
        for B in (3, 1, 0):
            want = model.generate(CLASSES[:B], **settings)
            assert torch.equal(decoder.generate(CLASSES[:B], **settings), want)
        ids = torch.tensor([5, 2**40])
        want = model.generate(CLASSES[:2], image_ids=ids, **settings)
        assert torch.equal(decoder.generate(CLASSES[:2], image_ids=ids, **settings), want)
    told = []
    decoder.generate(CLASSES[:2], progress=lambda *done: told.append(done))
    assert told == [(2 * i, 32) for i in range(1, 17)]
    assert decoder.nbytes == 6 * 2 * CONFIG.num_layers * CONFIG.dim * CONFIG.block_size * 4
    small = model.decoder(3, guided=True, kv_dtype=torch.int8)
    scales = 6 * 2 * CONFIG.num_layers * CONFIG.num_heads * CONFIG.block_size * 4
    assert small.nbytes == decoder.nbytes // 4 + scales


def test_what_a_decoder_refuses(model):
    decoder = model.decoder(2)
    for settings, error, message in (
        ({"class_ids": CLASSES[:3]}, ValueError, "decoder: at most 2 images at a time, got 3"),
        ({"cfg_scale": 2.0}, ValueError, "decoder: guidance needs a decoder made with guided=True"),
        ({"top_p": 2.0}, ValueError, r"generate: top_p must be in \(0, 1\], got 2.0"),
        ({"class_ids": CLASSES[:2] + 50}, ValueError, r"generate: class_ids must be in \[0, 10\)"),
    ):
        with pytest.raises(error, match=f"^{message}"):
            decoder.generate(**({"class_ids": CLASSES[:2]} | settings))
    for batch, error in ((0, ValueError), (-1, ValueError), (True, TypeError), (2.0, TypeError)):
        with pytest.raises(error, match="^decoder: batch must be "):
            model.decoder(batch)
    with pytest.raises(ValueError, match="^decoder: kv_dtype must be None, torch.float32 or torch"):
        model.decoder(1, kv_dtype=torch.float16)
    assert decoder.generate(CLASSES[:2]).shape == (2, 16)


def test_a_decoder_takes_one_call_at_a_time(model):
    decoder = model.decoder(2)

    def again(done: int, total: int) -> None:
        decoder.generate(CLASSES[:2])

    with pytest.raises(RuntimeError, match="^decoder: another call is still running"):
        decoder.generate(CLASSES[:2], progress=again)
    assert torch.equal(decoder.generate(CLASSES[:2], seed=1), model.generate(CLASSES[:2], seed=1))


def test_a_decoder_takes_one_thread_at_a_time_and_recovers(model):
    decoder, inside, told = model.decoder(2), threading.Event(), threading.Event()
    want, codes = model.generate(CLASSES[:2], seed=1), []

    def wait(done: int, total: int) -> None:
        inside.set()
        assert told.wait(60)

    def run() -> None:
        codes.append(decoder.generate(CLASSES[:2], seed=1, progress=wait))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert inside.wait(60)
        with pytest.raises(RuntimeError, match="^decoder: another call is still running"):
            decoder.generate(CLASSES[:2], seed=2)
    finally:
        told.set()
        thread.join()
    assert torch.equal(codes[0], want)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decoder.generate(CLASSES[:2], seed=2, progress=stop)
    assert torch.equal(decoder.generate(CLASSES[:2], seed=1), want)


def test_threads_share_a_model(model):
    """Each thread has its own decoder while it runs; one is kept."""
    want = [model.generate(CLASSES[:2], seed=seed) for seed in range(4)]
    kept, codes = model.kept.nbytes, {}
    together = threading.Barrier(4)

    def run(seed: int) -> None:
        def meet(done: int, total: int) -> None:
            if done == 2:
                together.wait(60)

        codes[seed] = model.generate(CLASSES[:2], seed=seed, progress=meet)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(codes[seed], want[seed]) for seed in range(4))
    assert model.kept.nbytes == kept


@pytest.fixture
def made(monkeypatch) -> list[tuple]:
    """Record what decoders are created for while the test runs."""
    made: list[tuple] = []
    init = Decoder.__init__

    def noted(self, model, batch, **options) -> None:
        made.append((batch, options["guided"], options["kv_dtype"]))
        init(self, model, batch, **options)

    monkeypatch.setattr(Decoder, "__init__", noted)
    return made


def test_one_decoder_is_kept_for_calls_that_it_fits(made):
    model = make()
    last = []
    for batch, settings, new in (
        (3, {}, True),
        (3, {"seed": 5, "top_k": 7}, False),
        (3, {"cfg_scale": 2.0}, True),
        (3, {"cfg_scale": 3.0, "cfg_interval": 2}, False),
        (2, {"cfg_scale": 2.0}, True),
        (2, {"cfg_scale": 2.0, "kv_dtype": torch.int8}, True),
        (2, {"cfg_scale": 2.0, "kv_dtype": torch.int8, "greedy": True}, False),
        (2, {}, True),
    ):
        before = len(made)
        model.generate(CLASSES[:batch], **settings)
        assert len(made) - before == new, (batch, settings)
        (held,) = model.kept._held
        assert (held in last) is not new
        last = [held]
        assert model.kept.nbytes == held.nbytes
    # A smaller last batch fills only part of the buffers.
    made.clear()
    assert len(list(model.stream(CLASSES[:7], batch_size=3))) == 3
    assert made == [(3, False, None)]
    # The decoder of a stopped call is kept too, and a nested call leaves only one.
    with pytest.raises(KeyError):
        model.generate(CLASSES[:3], progress=lambda done, total: {}[done])
    model.generate(CLASSES[:3], progress=lambda done, total: model.generate(CLASSES[:3]))
    assert len(model.kept._held) == 1
    model.double()
    made.clear()
    model.generate(CLASSES[:3])
    assert made == [(3, False, None)]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_an_int8_cache_makes_the_same_codes_enabled_or_not(model, settings):
    for B in (1, 3, 64):
        want = model.generate(CLASSES[:B], **settings, kv_dtype=torch.int8)
        assert torch.equal(fast(model, CLASSES[:B], **settings, kv_dtype=torch.int8), want), B


def test_a_decoder_follows_its_model():
    model = make()
    decoder = model.decoder(2)
    model.head.weight = nn.Parameter(model.head.weight.detach().flip(0).clone())
    assert torch.equal(decoder.generate(CLASSES[:2], seed=1), model.generate(CLASSES[:2], seed=1))
    model.double()
    with pytest.raises(ValueError, match="^decoder: the model or the current stream has changed"):
        decoder.generate(CLASSES[:2])
    model.float()
    assert torch.equal(decoder.generate(CLASSES[:2], seed=1), model.generate(CLASSES[:2], seed=1))
    del model
    gc.collect()
    with pytest.raises(RuntimeError, match="^decoder: its model was freed"):
        decoder.generate(CLASSES[:2])


def test_a_shallow_copy_makes_its_own_codes():
    """It shares the kept decoders with its original and may outlive it."""
    first = make()
    first.generate(CLASSES[:2], greedy=True)
    copied = copy.copy(first)
    copied._modules = first._modules | {"head": nn.Linear(64, 512, bias=False)}
    fresh = GPT(first.config)
    fresh.load_state_dict(copied.state_dict())
    want = fresh.generate(CLASSES[:2], greedy=True)
    assert torch.equal(copied.generate(CLASSES[:2], greedy=True), want)
    first.generate(CLASSES[:2], greedy=True)
    del first
    gc.collect()
    assert torch.equal(copied.generate(CLASSES[:2], greedy=True), want)


def test_a_fake_call_is_not_kept():
    model = make()
    want = make().generate(CLASSES[:2])
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.generate(CLASSES[:2])
    got = model.generate(CLASSES[:2])
    assert type(got) is torch.Tensor and torch.equal(got, want)


def test_a_copy_of_a_model_has_no_decoder_yet():
    model = make()
    want = fast(model, CLASSES[:2], seed=1)
    assert model.kept.nbytes > 0
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other.kept) is Kept and other.kept.nbytes == 0
        assert torch.equal(fast(other, CLASSES[:2], seed=1), want)


@pytest.mark.parametrize("first", [False, True], ids=["plain first", "inference mode first"])
@pytest.mark.parametrize("policy", [(), STEP_OPS], ids=["", "enabled"])
def test_calls_in_and_outside_inference_mode(policy, first):
    """Inference tensors cannot be written outside inference mode, but buffers outlive a call."""
    # No other test uses this size: what a thread caches from other tests would hide the error.
    model = make(vocab_size=501 + first)
    with vfmtok_fast.enable(policy, strict=True):
        with torch.inference_mode(first):
            held = model.decoder(2, guided=True)
        for mode in (first, not first, first):
            with torch.inference_mode(mode):
                codes = model.generate(CLASSES[:2], seed=1, cfg_scale=2.0)
                assert torch.equal(held.generate(CLASSES[:2], seed=1, cfg_scale=2.0), codes)
    assert torch.equal(make(vocab_size=501 + first).generate(CLASSES[:2], 2.0, seed=1), codes)


@pytest.mark.parametrize("settings", SETTINGS[:4], ids=str)
def test_an_image_is_the_same_in_batches_of_1_3_and_64(model, settings):
    """Products round differently with the number of rows; a tie that depends on it would show."""
    together = fast(model, CLASSES, **settings)
    for rows in (slice(0, 1), slice(5, 6), slice(20, 23)):
        ids = torch.arange(64)[rows]
        assert torch.equal(fast(model, CLASSES[rows], image_ids=ids, **settings), together[rows])
    other = fast(model, CLASSES, **{**settings, "seed": 99})
    assert (other != together).any(dim=1).all()


def test_weights_that_change_count_at_once():
    model = make()
    base = fast(model, CLASSES[:2], seed=1)
    with torch.no_grad():
        model.blocks[0].ffn.gate_up.weight.mul_(-1)  # in place
    changed = fast(model, CLASSES[:2], seed=1)
    assert not torch.equal(changed, base)
    assert torch.equal(changed, model.generate(CLASSES[:2], seed=1))
    model.head.weight = nn.Parameter(model.head.weight.detach().flip(0).clone())  # replaced
    replaced = fast(model, CLASSES[:2], seed=1)
    assert not torch.equal(replaced, changed)
    assert torch.equal(replaced, model.generate(CLASSES[:2], seed=1))
    model.double()  # moved
    assert torch.equal(fast(model, CLASSES[:2], seed=1), model.generate(CLASSES[:2], seed=1))


def live_bytes() -> int:
    gc.collect()
    storages = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for x in gc.get_objects()
        # Excludes what torch.compile left in this process, which has no memory.
        if type(x) in (torch.Tensor, nn.Parameter)
        and not torch._is_functional_tensor(x)
        and x.device.type == "cpu"
    }
    return sum(storages.values())


def test_buffers_are_kept_once_hold_no_weights_and_go_with_the_model():
    model = make()
    before = live_bytes()
    fast(model, CLASSES[:3], cfg_scale=2.0)
    kept = live_bytes() - before
    cache = 6 * 2 * CONFIG.num_layers * CONFIG.dim * CONFIG.block_size * 4
    # Besides keys and values only the codes, and the thread's workspace for noise.
    assert cache <= kept <= cache + 8 * 3 * 20 + 6 * 8 * 3 * CONFIG.vocab_size
    for _ in range(20):
        fast(model, CLASSES[:3], cfg_scale=2.0)
        fast(model, CLASSES[:3], cfg_scale=2.0, cfg_interval=2, seed=3)
    assert live_bytes() - before == kept
    fast(model, CLASSES[:1], cfg_scale=2.0)  # Other buffers replace the first.
    assert live_bytes() - before < kept
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_results_are_not_overwritten_by_the_next_call(model):
    first = fast(model, CLASSES[:2], seed=1)
    copy = first.clone()
    fast(model, CLASSES[:2], seed=2)
    assert torch.equal(first, copy)


def test_a_call_within_a_call_and_after_one_that_was_stopped(model):
    want = model.generate(CLASSES[:2], seed=1)
    inner = []

    def nest(done: int, total: int) -> None:
        if done == 6:
            inner.append(fast(model, CLASSES[:2], seed=1))

    assert torch.equal(fast(model, CLASSES[:2], seed=1, progress=nest), want)
    assert torch.equal(inner[0], want)

    def stop(done: int, total: int) -> None:
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fast(model, CLASSES[:2], seed=5, progress=stop)
    assert torch.equal(fast(model, CLASSES[:2], seed=1), want)


@pytest.mark.parametrize("kv_dtype", [None, torch.int8], ids=str)
@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[2]], ids=str)
def test_steps_with_positions_on_the_device_make_the_same_codes(model, settings, kv_dtype):
    """A graph replays the decoder's step with a tensor as position; here it runs eagerly."""
    want = model.generate(CLASSES[:2], **settings, kv_dtype=kv_dtype)
    sampling = Sampling(**settings)
    made = model.decoder(2, guided=sampling.guided(0), kv_dtype=kv_dtype)
    weights, advance = model.step_weights(), made._advance

    def on_device(*step) -> None:
        *same, at = step
        assert made.at.tolist() == [at, at + 1, at]
        advance(*same, made.at)

    made._advance = on_device
    assert torch.equal(made.generate(CLASSES[:2], **settings), want)
    assert made.at.tolist() == [CONFIG.block_size, CONFIG.block_size + 1, CONFIG.block_size]
    assert len(weights.blocks) == CONFIG.num_layers


@pytest.mark.parametrize("policy", [(), STEP_OPS], ids=["reference", "enabled"])
def test_defaults_of_torch_change_nothing(model, policy):
    with vfmtok_fast.enable(policy):
        want = model.generate([0, 2], cfg_scale=2.0, seed=3)
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.float64)
        try:
            assert torch.equal(model.generate([0, 2], cfg_scale=2.0, seed=3), want)
        finally:
            torch.set_default_device(None)
            torch.set_default_dtype(torch.float32)
