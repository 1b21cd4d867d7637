"""Triton's sample_token against its reference, on a GPU if there is one, else interpreted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from where_kernels_run import BACKEND, DEVICE, INTERPRETED, in_the_interpreter, runs

import vfmtok_fast
from vfmtok_fast import ops
from vfmtok_fast.functional import filter_logits
from vfmtok_fast.reference.philox import philox
from vfmtok_fast.reference.sample_token import sample_token as reference

pytest.importorskip("triton")
from vfmtok_fast.kernels import sample_token as kernel

pytestmark = pytest.mark.usefixtures("poison")
INF, NAN = float("inf"), float("nan")
SEEDS = (0, 1, 2**31, 2**32 + 5, 2**63 + 11, 2**64 - 1)
IDS = torch.tensor([0, 5, 2**32 - 1, 2**32, 2**40 + 7, -1])
SETTINGS = [
    {},
    {"temperature": 0.7},
    {"temperature": 0.0},
    {"greedy": True, "top_k": 3},
    {"top_k": 1},
    {"top_k": 30},
    {"top_k": 2**31 - 1},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"top_k": 50, "top_p": 0.8, "temperature": 1.3},
]
FILTERS = [{"top_k": 7}, {"top_p": 0.5}, {"top_k": 9, "top_p": 0.7}]
# Uncertainty of the mass before a code, relative to the total; kernels/sample_token.md, "Filters".
MASS = 9 * 2.0**-20


test_in_the_interpreter = in_the_interpreter(__file__)


@pytest.fixture
def launched(record):
    return record(kernel, "_sample_token")["_sample_token"].launches


def random(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw(logits: Tensor, image_ids: Tensor, step: int | Tensor = 3, **options) -> Tensor:
    moved = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in options.items()}
    step = step.to(DEVICE) if isinstance(step, Tensor) else step
    return kernel.sample_token(logits.to(DEVICE), image_ids.to(DEVICE), step, **moved).cpu()


def right_codes(
    exact_gumbel: Callable, logits: Tensor, image_ids: Tensor, step: int, *,
    uncond_logits: Tensor | None = None, cfg_scale: float = 1.0, temperature: float = 1.0,
    top_k: int = 0, top_p: float = 1.0, greedy: bool = False, seed: int = 0,
) -> Tensor:  # fmt: skip
    """Return right codes [B, V]; more than one only if the float64 truth ties within rounding."""
    x = logits.float()
    if uncond_logits is not None:
        x = uncond_logits.float() + cfg_scale * (x - uncond_logits.float())
    if greedy:
        return torch.nn.functional.one_hot(x.argmax(-1), x.shape[1]).bool()
    x = filter_logits(x / max(temperature, 1e-5), top_k, 1.0).double()
    surely = possibly = x > -INF
    if top_p < 1:
        ordered, order = x.sort(dim=-1, descending=True, stable=True)
        mass = ordered.softmax(-1)
        before = torch.zeros_like(mass).scatter(1, order, mass.cumsum(-1) - mass)
        surely, possibly = surely & (before <= top_p - MASS), possibly & (before <= top_p + MASS)
        surely = surely.scatter(1, order[:, :1], True)
    wide = image_ids[:, None]
    halves = torch.tensor(step), wide % 2**32, (wide >> 32) % 2**32
    noise = exact_gumbel(philox(seed, torch.arange(x.shape[1])[None], *halves))
    total = x + noise
    # The kernel's error over all u is 3.5 * 2^-24 of the noise, the reference's is less than 2.2.
    # The sum is rounded once.
    error = 2.0**-24 * (3.5 * noise.abs().clamp(min=1) + total.abs())
    error = error.where(possibly, 0)
    least = (total - error).masked_fill(~surely, -INF).amax(-1, keepdim=True)
    return possibly & (total + error >= least)


@pytest.fixture
def check(exact_gumbel) -> Callable[..., Tensor]:
    """Check that every code is right, and equal to the reference's if only one is right."""

    def check(logits: Tensor, image_ids: Tensor, step: int = 3, **options) -> Tensor:
        codes = draw(logits, image_ids, step, **options)
        assert codes.dtype == torch.int64 and codes.shape == image_ids.shape
        right = right_codes(exact_gumbel, logits, image_ids, step, **options)
        expected = reference(logits, image_ids, step, **options)
        tied = right.sum(1) > 1
        assert bool(right.gather(1, codes[:, None]).all())
        assert torch.equal(codes[~tied], expected[~tied])
        assert int(tied.sum()) <= len(tied) // 4, "the truth decides too little"
        return codes

    return check


@runs
@pytest.mark.parametrize("guided", [False, True], ids=["", "guided"])
@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_codes_are_the_reference_codes(options: dict, guided: bool, launched, check):
    V, B = 700, len(IDS)
    logits, count = random(2 * B, V), 0
    for scale in (0.0, 1.5, 7.5) if guided else (1.0,):
        extra = {"uncond_logits": logits[B:], "cfg_scale": scale} if guided else {}
        codes = check(logits[:B], IDS, seed=SEEDS[count], **options, **extra)
        count += 1
        assert len(launched) == count
    assert options.get("temperature", 1) == 0 or "top_k" in options or len(set(codes.tolist())) > 1


@runs
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("V", [1, 7, 64, 4097])
def test_seeds_and_shapes(V: int, seed: int, check):
    check(random(2, V), torch.tensor([3, 2**33]), step=2**32 - 1, seed=seed)
    check(random(2, V), torch.tensor([3, 2**33]), step=0, seed=seed, top_k=5, top_p=0.9)


@runs
@pytest.mark.parametrize("options", [{}, {"greedy": True}, *FILTERS], ids=str)
def test_the_codebook(options: dict, check):
    logits = random(4, 16384)
    check(logits[:2], IDS[4:], 255, uncond_logits=logits[2:], cfg_scale=1.5, seed=9, **options)


@runs
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_counts_as_it_is(dtype: torch.dtype, check):
    logits = random(6, 500).to(dtype)
    for options in ({}, *FILTERS):
        check(logits[:3], IDS[:3], uncond_logits=logits[3:], cfg_scale=1.5, **options)


@runs
def test_a_wrong_seed_is_seen(check, monkeypatch: pytest.MonkeyPatch):
    """With a wrong seed the tests above fail, so they prove something."""
    monkeypatch.setattr(kernel, "_signed", lambda word: (word + 1) % 2**31)
    with pytest.raises(AssertionError):
        check(random(4, 500), IDS[:4])


@runs
@pytest.mark.parametrize("options", [{}, {"greedy": True}, {"temperature": 0.0}, *FILTERS], ids=str)
def test_nan_and_infinity_give_what_they_give_in_the_reference(options: dict):
    """The first NaN, else the first +inf; -inf counts as absent; if nothing is left, code 0."""
    logits, uncond = random(7, 40), random(7, 40, seed=1)
    logits[0, [9, 30]] = NAN
    logits[1, 5], logits[1, 8] = INF, -NAN
    logits[2, [11, 12, 38]] = INF
    logits[3, 3:] = -INF
    logits[4] = -INF
    logits[5, ::2] = -INF
    uncond[6, 17] = logits[6, 17] = INF  # inf - inf under guidance.
    ids = torch.arange(7)
    codes = draw(logits, ids, **options)
    assert torch.equal(codes, reference(logits, ids, 3, **options))
    assert codes[[0, 1, 2, 4]].tolist() == [9, 8, 11, 0] and codes[3] < 3 and codes[5] % 2 == 1
    guided = {"uncond_logits": uncond, "cfg_scale": 1.5, **options}
    assert torch.equal(draw(logits, ids, **guided), reference(logits, ids, 3, **guided))


@runs
def test_zero_of_either_sign_ties_and_the_lowest_code_wins():
    logits = torch.full((1, 300), -1.0)
    logits[0, [20, 70, 299]] = torch.tensor([-0.0, 0.0, 0.0])
    assert draw(logits, IDS[:1], greedy=True).item() == 20
    logits[0, 20] = -1
    assert draw(logits, IDS[:1], greedy=True).item() == 70
    assert draw(torch.zeros(1, 9000), IDS[:1], greedy=True).item() == 0


@runs
def test_step_and_image_ids_in_every_form(launched):
    logits, ids = random(3, 400), torch.tensor([100, 0, 7])
    want = draw(logits, ids, 200)
    assert torch.equal(want, reference(logits, ids, 200))
    forms = [torch.tensor(200), torch.tensor([[200]], dtype=torch.int32)]
    forms += [
        torch.tensor([200], dtype=dtype) for dtype in (torch.uint8, torch.int16, torch.uint32)
    ]
    for step in forms:
        assert torch.equal(draw(logits, ids, step), want)
    for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        assert torch.equal(draw(logits, ids.to(dtype), 200), want)
    assert len(launched) == 1 + len(forms) + 4
    last = torch.tensor([2**32 - 1])
    assert torch.equal(draw(logits, ids, last), reference(logits, ids, 2**32 - 1))


@runs
@pytest.mark.parametrize("seed", [0, 2**32 + 7, 2**63 + 5, 2**64 - 1])
def test_a_seed_may_be_a_tensor(seed, launched):
    """A captured graph reads the seed from a tensor, so one graph serves all seeds."""
    logits, ids = random(3, 400), torch.tensor([100, 0, 7])
    want = draw(logits, ids, 200, seed=seed)
    assert torch.equal(want, reference(logits, ids, 200, seed=seed))
    signed = torch.tensor([seed - 2**64 * (seed >= 2**63)], device=DEVICE)
    assert torch.equal(draw(logits, ids, 200, seed=signed), want)
    assert len(launched) == 2


@runs
def test_rows_are_read_where_they_are(launched, check):
    wide = random(6, 2, 500).to(DEVICE)
    ids = torch.arange(3)
    for logits, uncond in (
        (wide[:3, 0], wide[3:, 1]),
        (wide[::2, 0, 50:450], wide[1::2, 1, 100:]),
        (wide[:1, 0].expand(3, -1), wide[3:, 1]),
    ):
        V = min(logits.shape[1], uncond.shape[1])
        logits, uncond = logits[:, :V], uncond[:, :V]
        codes = draw(logits, ids, uncond_logits=uncond, cfg_scale=1.5)
        assert torch.equal(
            codes, draw(logits.clone(), ids, uncond_logits=uncond.clone(), cfg_scale=1.5)
        )
        used = launched[-2]
        assert (used[0].data_ptr(), used[1].data_ptr()) == (logits.data_ptr(), uncond.data_ptr())
    check(random(500, 3).T, ids, uncond_logits=random(500, 3, seed=1).T, top_k=20)
    check(random(3, 500), torch.arange(6)[::2])


@runs
def test_a_draw_does_not_depend_on_the_batch():
    logits, ids = random(5, 301), IDS[:5]
    together = draw(logits, ids, top_p=0.9)
    order = torch.tensor([4, 2, 0, 1, 3])
    assert torch.equal(draw(logits[order], ids[order], top_p=0.9), together[order])
    assert draw(logits[3:4], ids[3:4], top_p=0.9).item() == together[3]
    assert torch.equal(draw(logits, ids, top_p=0.9), together)


@runs
def test_no_rows_and_many():
    codes = draw(random(0, 12), torch.arange(0))
    assert codes.shape == (0,) and codes.dtype == torch.int64
    logits = random(1000, 3)
    assert torch.equal(draw(logits, torch.arange(1000), greedy=True), logits.argmax(-1))


@runs
def test_the_switch_takes_it_and_says_why_not():
    logits, ids = random(2, 40000).to(DEVICE), torch.arange(2, device=DEVICE)
    with vfmtok_fast.enable("sample_token", strict=True):
        codes = ops.sample_token(logits, ids, 3, seed=2**64 - 1)
        assert torch.equal(codes.cpu(), reference(logits.cpu(), ids.cpu(), 3, seed=2**64 - 1))
        assert vfmtok_fast.status().ops["sample_token"].calls == {"triton": 1}
        with pytest.raises(RuntimeError, match="float32, float16 and bfloat16, not torch.float64"):
            ops.sample_token(logits.double(), ids, 3)
        with pytest.raises(RuntimeError, match="top_k and top_p of at most 16384 codes, not 40000"):
            ops.sample_token(logits, ids, 3, top_k=5)
        # Neither filters anything here.
        ops.sample_token(logits, ids, 3, top_k=5, top_p=0.5, greedy=True)
        ops.sample_token(logits, ids, 3, top_k=40000)


@runs
@pytest.mark.parametrize("at", [None, 7], ids=["number", "tensor"])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_opcheck(needs_grad: bool, at: int | None):
    logits = random(4, 300).to(DEVICE).requires_grad_(needs_grad)
    ids = torch.arange(2, device=DEVICE)
    step = None if at is None else torch.tensor([at], device=DEVICE)
    key = None if at is None else torch.tensor([-5], device=DEVICE)
    arguments = logits[:2], logits[2:], ids, step, 3, key, -5, 1.5, 0.9, 20, 0.9, False
    torch.library.opcheck(torch.ops.vfmtok_fast.sample_token_triton, arguments)


@runs
def test_torch_compile_takes_it_without_a_graph_break():
    logits, ids = random(4, 300).to(DEVICE), torch.arange(2, device=DEVICE)

    def sample(logits: Tensor, step: int | Tensor, seed: int) -> Tensor:
        guided = {"uncond_logits": logits[2:] * 2, "cfg_scale": 1.5}
        return ops.sample_token(logits[:2] * 2, ids, step, top_k=20, seed=seed, **guided) + 1

    compiled = torch.compile(sample, backend=BACKEND, fullgraph=True)
    seeds = 0, 5, 6, 2**62, 2**63 + 1, 2**64 - 1
    with vfmtok_fast.enable("sample_token", strict=True):
        for step in (3, torch.tensor([4], device=DEVICE)):
            for seed in seeds:
                assert torch.equal(compiled(logits, step, seed), sample(logits, step, seed))
        calls = vfmtok_fast.status().ops["sample_token"].calls
    # The first seed is a constant; the others are symbols, those from 2^63 on a separate one.
    assert 2 <= calls["triton (compiled)"] <= 6 and calls["triton"] == 2 * len(seeds)


@runs
@pytest.mark.parametrize(
    "options", [{}, {"cfg_scale": 1.5}, {"top_k": 9, "top_p": 0.7}, {"greedy": True}], ids=str
)
def test_a_row_that_is_shared_gets_the_same_code(options, record, monkeypatch):
    """This includes ties, NaN, infinities and rows of -inf, which fall into different shares."""
    V = 100
    x = random(9, V).round()
    x[1], x[2, V // 2 :], x[3, V - 1], x[4, V // 3], x[5, V - 2] = -INF, INF, NAN, NAN, INF
    x[6], x[7, : V - 1], x[8, :-2] = 1.5, -INF, -INF
    if "cfg_scale" in options:
        options = {**options, "uncond_logits": random(9, V, seed=1).round(), "seed": 7}
    kernels = record(kernel, "_sample_token", "_best_share")
    ids = torch.arange(9) * 3

    def shared_by(most: int):
        return kernel.DRAW.using(kernel.DRAW.setting({"chunk": 4096, "shares": most}))

    with shared_by(1):
        want = draw(x, ids, **options)
    assert not kernels["_best_share"].launches
    monkeypatch.setattr(kernel, "SMALLEST_SHARE", 12)
    for most in (2, 8):
        with shared_by(most):
            assert torch.equal(draw(x, ids, **options), want), most
        shares = 1 if options.get("greedy") else most
        assert kernels["_sample_token"].constants[-1]["SHARES"] == shares
    assert len(kernels["_best_share"].launches) == (0 if options.get("greedy") else 2)


@pytest.mark.parametrize(
    ("rows", "V", "shares"),
    [(1, 16384, 8), (16, 16384, 8), (17, 16384, 4), (66, 16384, 2), (67, 16384, 1),
     (1000, 16384, 1), (1, 4096, 4), (1, 2047, 1), (1, 37, 1), (1, 2**30, 8)],
)  # fmt: skip
def test_how_many_share_a_row(rows, V, shares):
    assert kernel._shares(rows, V, 8) == shares


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled there")
def test_no_number_compiles_a_variant():
    """Triton's own binder returns the key of its compiled kernels; this needs no GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    function = kernel._sample_token
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(function.signature, function.params, backend)
    tensor, ids = torch.zeros(2, 64), torch.zeros(2, dtype=torch.int64)
    keys = set()
    for number in (0, 1, 2, 16, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1):
        words = kernel._signed(number), kernel._signed(number >> 32)
        for scale, top_k in ((1.0, 1), (0.0, 16), (7.5, 2**31 - 1)):
            _, key, _ = bind(
                tensor, tensor, ids, words[0], ids, 64, 64, *words, scale, scale, top_k, scale,
                V=64, BLOCK=64, CHUNK=64, SHARES=1, GREEDY=False, OVERLAP=False,
            )  # fmt: skip
            keys.add(str(key))
    assert len(keys) == 1


DRAWS = 2**17
LAW = torch.tensor([0.5, 1.25, -0.5, 0.5, 2.0, 0.5, -1.0, 0.0])


@pytest.mark.gpu
@pytest.mark.parametrize("guided", [False, True], ids=["", "guided"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, *FILTERS, {"top_k": 3}], ids=str)
def test_draws_follow_the_law(options: dict, guided: bool, check_law):
    uncond = torch.tensor([1.0, 0.5, 0.25, 1.0, 0.0, 1.0, 0.5, -0.25])
    x, extra = LAW, {}
    if guided:
        x = uncond + 1.5 * (LAW - uncond)
        extra = {"uncond_logits": uncond.expand(DRAWS, -1), "cfg_scale": 1.5}
    codes = draw(LAW.expand(DRAWS, -1), torch.arange(DRAWS), 5, seed=11, **options, **extra)
    x = x[None].double() / options.get("temperature", 1.0)
    check_law(
        codes, filter_logits(x, options.get("top_k", 0), options.get("top_p", 1.0))[0].softmax(-1)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_a_thousand_rows(options: dict, check):
    logits = random(2000, 16384)
    extra = {"uncond_logits": logits[1000:], "cfg_scale": 1.5}
    check(logits[:1000], torch.arange(1000), 77, seed=2**63 + 1, **options, **extra)


@pytest.mark.gpu
def test_replay_is_not_repeat():
    logits, ids = random(3, 16384).cuda(), torch.arange(3, device="cuda")
    at = torch.zeros(1, dtype=torch.int64, device="cuda")
    kernel.sample_token(logits, ids, at, top_k=500)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernel.sample_token(logits, ids, at, top_k=500)
        at.add_(1)
    seen = []
    for step in range(4):
        graph.replay()
        assert torch.equal(captured, kernel.sample_token(logits, ids, step, top_k=500))
        seen.append(captured.tolist())
    assert len(set(map(tuple, seen))) == 4


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device():
    logits, ids = random(3, 2000), torch.arange(3)
    codes = kernel.sample_token(logits.to("cuda:1"), ids.to("cuda:1"), torch.tensor(3), top_p=0.9)
    assert codes.device == torch.device("cuda:1")
    assert torch.equal(codes.cpu(), draw(logits, ids, top_p=0.9))
