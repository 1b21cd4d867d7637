"""Triton `ops.sample_token`: guidance, temperature, top-k, top-p and Gumbel-max.

What it computes: for every row of logits [B, V] one code, int64 [B], with the same noise as the
reference and, except for ties within rounding, the same codes. One program per row, in two parts.
With few rows, up to eight programs share a row: each runs the filters and draws among a part of the
codes.

    filters  only with top-k or top-p: all V logits in registers, as integers of the same order;
             thresholds are found by bisection
    draw     4,096 codes per iteration: logit plus noise, and the best so far of each lane

Bytes: V logits per row, twice that with guidance, read once; after the filters, the draw finds them
in the L1 cache. B = 64, V = 16,384, float32, guided: 8.4 MB, 2 us at an H200's 4.3 TB/s. The noise
sets the lower bound: 95 instructions per code, all V on one multiprocessor, 7.0 us (predicted).
For this reason programs share a row if there are fewer rows than multiprocessors. sample_token.md
has the measured times, the error of the noise, the searches and the rejected variants.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import _let_next_begin, _wait_for_last, on, overlap
from .registered import registered
from .tuning import Space, dtype_name

# ``chunk``: codes per iteration of the draw, 8 per thread; ``shares``: most programs per row. The
# drawn codes depend on neither.
DRAW = Space(
    "sample_token.draw",
    {"chunk": (2048, 4096), "shares": (1, 2, 4, 8)},
    {80: {"chunk": 4096, "shares": 8}},
)
SPACES = (DRAW,)
# Codes per iteration with filters, which leave no registers for another choice.
FILTERED_CHUNK = 4096
CODES_PER_WARP = 256
# Rows are shared until there are up to 132 programs, the multiprocessors of an H200. A share of
# fewer than 1,024 codes is not worth a second launch.
WANTED_PROGRAMS = 132
SMALLEST_SHARE = 1024
# Rows per program of the launch that compares shares.
BEST_ROWS = 32
# The filters hold a key and a weight for every code: half of a multiprocessor's registers. Twice as
# many codes spill on compute capabilities 8.0 and 9.0 with any number of warps.
LARGEST_FILTERED = 16384
LARGEST = 2**30
# Codes this far below the largest logit are never drawn, because the noise lies between -2.82 and
# 22.88. So the filters need not distinguish them.
HOPELESS = tl.constexpr(32.0)
# A search bisects by value for this many iterations, which converges faster, and then by key, which
# always terminates.
BY_VALUE = tl.constexpr(20)
# Keys (see `_key`) of NaN and the sign bit of float32, as int32.
NAN_KEY = tl.constexpr(2**31 - 1)
# Not smaller than any code.
LAST = tl.constexpr(2**31 - 1)
SIGN = tl.constexpr(-(2**31))
# The bits of 2/3 as float32, the mask of sign and exponent, and log(2) per unit of masked bits.
TWO_THIRDS = tl.constexpr(0x3F2AAAAB)
POWER = tl.constexpr(-(2**23))
LOG_2 = tl.constexpr(0.6931471805599453 * 2.0**-23)


@triton.jit
def _multiply(a, b):
    """High and low word of a product, in one instruction; umulhi and * would be two."""
    product = a.to(tl.uint64) * b
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def _philox(k0, k1, c0, c1, c2, c3):
    """First word of Philox 4x32-10, as in ``tl.philox`` and the reference."""
    for _ in tl.static_range(10):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0


@triton.jit
def _log1p(m):
    """log(1 + m) for m in [-1/3, 1/3], with a relative error of 2^-27.6 before rounding."""
    p = tl.fma(m, -0.12891684, 0.13984437)
    p = tl.fma(p, m, -0.121842615)
    p = tl.fma(p, m, 0.14005868)
    p = tl.fma(p, m, -0.16680488)
    p = tl.fma(p, m, 0.20010406)
    p = tl.fma(p, m, -0.24999797)
    p = tl.fma(p, m, 0.33333215)
    p = tl.fma(p, m, -0.5)
    return tl.fma(p * m, m, m)


@triton.jit
def _gumbel(word):
    """-log(-log(1 - u)) with u = (word + 1/2) / 2^32, rounded and clamped as in the reference."""
    u = tl.minimum((word.to(tl.float32) + 0.5) * 2.0**-32, 1.0 - 2.0**-24)
    # 1 - u = 2^k (1 + m) with 1 + m in [2/3, 4/3). For k < 0 all steps to m are exact. For k = 0,
    # m is -u: 1 - u has lost the low bits of a small u, and these bits decide samples.
    bits = (1.0 - u).to(tl.int32, bitcast=True)
    power = (bits - TWO_THIRDS) & POWER
    m = tl.where(power == 0, -u, (bits - power).to(tl.float32, bitcast=True) - 1.0)
    e = -tl.fma(power.to(tl.float32), LOG_2, _log1p(m))
    bits = e.to(tl.int32, bitcast=True)
    power = (bits - TWO_THIRDS) & POWER
    m = (bits - power).to(tl.float32, bitcast=True) - 1.0
    return -tl.fma(power.to(tl.float32), LOG_2, _log1p(m))


@triton.jit
def _key(x):
    """Map float32 to int32 of the same order: -0 equals 0, and NaN is above all."""
    bits = x.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, -(bits & NAN_KEY), bits)
    return tl.where(x != x, NAN_KEY, key)


@triton.jit
def _value(key):
    """The float32 of a key."""
    return tl.where(key < 0, -key | SIGN, key).to(tl.float32, bitcast=True)


@triton.jit
def _read(logits, uncond, code, V: tl.constexpr):
    """Load conditional and unconditional logits in their stored dtype."""
    x = tl.load(logits + code, mask=code < V, other=0.0)
    other = x
    if uncond is not None:
        other = tl.load(uncond + code, mask=code < V, other=0.0)
    return x, other


@triton.jit
def _guide(x, other, code, uncond, cfg_scale, temperature, V: tl.constexpr):
    """Guided logits / temperature, rounded as in the reference on a CPU; -inf past the end."""
    x = x.to(tl.float32)
    if uncond is not None:
        other = other.to(tl.float32)
        x = other + cfg_scale * (x - other)
    if temperature is not None:
        x = tl.div_rn(x, temperature)
    return tl.where(code < V, x, float("-inf"))


@triton.jit
def _between(low, high, turn):
    """A key strictly between low and high, which must not be adjacent."""
    by_value = _key(_value(low) * 0.5 + _value(high) * 0.5)
    middle = (low & high) + ((low ^ high) >> 1)
    inside = (by_value > low) & (by_value < high) & (turn < BY_VALUE)
    return tl.where(inside, by_value, middle)


@triton.jit
def _top_k(key, low, high, top_k):
    """A key such that the codes above it are the top_k largest and their ties."""
    turn = 0
    # top_k or more codes are above low, and fewer are above high.
    while low + 1 < high:
        middle = _between(low, high, turn)
        count = tl.sum((key > middle).to(tl.int32))
        low = tl.where(count >= top_k, middle, low)
        high = tl.where(count > top_k, high, tl.where(count == top_k, low + 1, middle))
        turn += 1
    return low


@triton.jit
def _top_p(key, code, low, top, top_p, V: tl.constexpr):
    """(key, code): the nucleus is every key above, and equal keys up to and including the code."""
    largest = _value(top)
    # The largest have weight 1 exactly, even if infinite; codes dropped by top-k have weight 0.
    left = tl.where(key < top, _value(key) - largest, 0.0)
    weight = tl.where(key > low, tl.exp(left), 0.0)
    high = top
    mass_low = tl.sum(weight)
    mass_high = tl.zeros_like(mass_low)
    limit = mass_low * top_p
    turn = 0
    # The mass above low exceeds the limit, the mass above high does not. Two codes in between would
    # weigh at least twice as much as low; a single one belongs to the nucleus.
    while (low + 1 < high) & (mass_low - mass_high >= 1.5 * tl.exp(_value(low) - largest)):
        middle = _between(low, high, turn)
        mass = tl.sum(tl.where(key > middle, weight, 0.0))
        past = mass > limit
        low = tl.where(past, middle, low)
        mass_low = tl.where(past, mass, mass_low)
        high = tl.where(past, high, middle)
        mass_high = tl.where(past, mass_high, mass)
        turn += 1
    last = -1
    if low + 1 == high:
        # Codes equal to high count one after another while the mass before them is within limit.
        tied = key == high
        size = tl.where(high < top, tl.exp(_value(high) - largest), 1.0)
        room = tl.floor(tl.minimum(tl.div_rn(limit - mass_high, size), V)).to(tl.int32) + 1
        if tl.sum(tied.to(tl.int32)) > room:
            low = high
            before = tl.full((), -1, tl.int32)
            last = V - 1
            while before + 1 < last:
                middle = (before + last) >> 1
                count = tl.sum((tied & (code <= middle)).to(tl.int32))
                last = tl.where(count >= room, middle, last)
                before = tl.where(count < room, middle, before)
    return low, last


@triton.jit
def _filters(
    logits, uncond, cfg_scale, temperature, top_k, top_p, V: tl.constexpr, BLOCK: tl.constexpr
):
    """(value, code): keep logits above the value, and equal ones up to and including the code."""
    code = tl.arange(0, BLOCK)
    x, other = _read(logits, uncond, code, V)
    key = _key(_guide(x, other, code, uncond, cfg_scale, temperature, V))
    top = tl.max(key)
    # A row with NaN or +inf has no interval to search: only its largest logits are kept.
    low = _key(_value(top) - HOPELESS) - 1
    last = -1
    if top_k is not None:
        low = _top_k(key, low, top, top_k)
    if top_p is not None:
        low, last = _top_p(key, code, low, top, top_p, V)
    return _value(low), last


@triton.jit(do_not_specialize=["step", "seed_low", "seed_high", "top_k"])
def _sample_token(
    logits, uncond, image_ids, step, out, stride, uncond_stride, seed_low, seed_high,
    cfg_scale, temperature, top_k, top_p,
    V: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, SHARES: tl.constexpr,
    GREEDY: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Draw for one row, or for a share of its codes.

    With several shares, ``out`` [B, SHARES] receives the best code as a number that is larger for a
    larger key, then for a lower code. Unused arguments are None: uncond, temperature, top_k, top_p;
    and seed_high if seed_low is a pointer to the whole seed.
    """
    if OVERLAP:
        _wait_for_last()
        _let_next_begin()
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    if uncond is not None:
        uncond += row * uncond_stride
    filtered: tl.constexpr = BLOCK > 0
    if filtered:
        threshold, last = _filters(logits, uncond, cfg_scale, temperature, top_k, top_p, V, BLOCK)
    if not GREEDY:
        image = tl.load(image_ids + row).to(tl.int64)
        if step.dtype.is_ptr():
            step = tl.load(step)
        c1, c2, c3 = step.to(tl.uint32), image.to(tl.uint32), (image >> 32).to(tl.uint32)
        if seed_low.dtype.is_ptr():
            seed = tl.load(seed_low)
            k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
        else:
            k0, k1 = seed_low.to(tl.uint32), seed_high.to(tl.uint32)

    each: tl.constexpr = (V + SHARES * CHUNK - 1) // (SHARES * CHUNK) * CHUNK
    first = tl.program_id(1) * each if SHARES > 1 else 0
    o_code = tl.arange(0, CHUNK)
    best = tl.full((CHUNK,), float("-inf"), tl.float32)
    pick = first + o_code
    next_x, next_other = _read(logits, uncond, pick, V)
    for start in range(first, first + each, CHUNK):
        code = start + o_code
        raw, other = next_x, next_other
        # Needed only in the next iteration: the noise of this one hides the latency.
        next_x, next_other = _read(logits, uncond, code + CHUNK, V)
        x = _guide(raw, other, code, uncond, cfg_scale, temperature, V)
        if filtered:
            # Not `x > threshold | ...`: NaN must be kept.
            dropped = (x < threshold) | ((x == threshold) & (code > last))
            x = tl.where(dropped, float("-inf"), x)
        if not GREEDY:
            x += _gumbel(_philox(k0, k1, code.to(tl.uint32), c1, c2, c3))
        # The first NaN of a lane is kept.
        better = ((x > best) | (x != x)) & (best == best)
        best = tl.where(better, x, best)
        pick = tl.where(better, code, pick)
    key = _key(best)
    top = tl.max(key)
    lowest = tl.min(tl.where(key == top, pick, LAST))
    if SHARES == 1:
        tl.store(out + row, lowest.to(tl.int64))
    else:
        packed = (top.to(tl.int64) << 32) + (lowest ^ LAST)
        tl.store(out + row * SHARES + tl.program_id(1), packed)


@triton.jit(do_not_specialize=["rows"])
def _best_share(shares, out, rows, SHARES: tl.constexpr, ROWS: tl.constexpr, OVERLAP: tl.constexpr):
    """Choose the best share of each row: the largest key, then the lowest code."""
    if OVERLAP:
        _wait_for_last()
        _let_next_begin()
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < rows
    at = o_row[:, None] * SHARES + tl.arange(0, SHARES)[None, :]
    packed = tl.max(tl.load(shares + at, mask=m_row[:, None], other=0), axis=1)
    tl.store(out + o_row, (packed & LAST) ^ LAST, mask=m_row)


def unsupported_reason(
    logits: Tensor, *rest: object, top_k: int = 0, top_p: float = 1.0, greedy: bool = False,
    **settings: object,
) -> str | None:  # fmt: skip
    """Why this cannot take the call, or None."""
    if logits.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float32, float16 and bfloat16, not {logits.dtype}"
    V = logits.shape[1]
    if V > LARGEST:
        return f"it takes at most 2^30 codes, not {V}"
    filtered = not greedy and (0 < top_k < V or top_p < 1)
    if filtered and V > LARGEST_FILTERED:
        return f"it takes top_k and top_p of at most {LARGEST_FILTERED} codes, not {V}"
    return None


def sample_token(
    logits: Tensor, image_ids: Tensor, step: int | Tensor, *, uncond_logits: Tensor | None = None,
    cfg_scale: float = 1.0, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
    greedy: bool = False, seed: int | Tensor = 0,
) -> Tensor:  # fmt: skip
    """See `vfmtok_fast.ops.sample_token`; takes calls that `unsupported_reason` accepts."""
    at, number = (step, 0) if isinstance(step, Tensor) else (None, step)
    key, seed = (seed, 0) if isinstance(seed, Tensor) else (None, seed)
    # torch passes integers as signed 64-bit.
    seed = seed - 2**64 if seed >= 2**63 else seed
    return _draw(
        logits, uncond_logits, image_ids, at, number, key, seed,
        cfg_scale, temperature, top_k, top_p, bool(greedy),
    )  # fmt: skip


def tuning_key(logits: Tensor, *rest: object, **settings: object) -> tuple[str, int]:
    """Kind and size under which a measurement is stored; see `tuning`.

    The number of rows is not part of it, because an image must not depend on its batch.
    """
    filtered = settings.get("top_k") or settings.get("top_p", 1.0) < 1
    return f"{dtype_name(logits)} V={logits.shape[1]}{' filtered' if filtered else ''}", 1


def _signed(word: int) -> int:
    """The low 32 bits as int32; larger numbers get another type and compile another variant."""
    return (word + 2**31) % 2**32 - 2**31


def _shares(rows: int, V: int, most: int) -> int:
    """Programs per row, a power of two."""
    wanted = min(most, WANTED_PROGRAMS // rows, V // SMALLEST_SHARE)
    return 1 << max(0, wanted.bit_length() - 1)


def _rows(logits: Tensor | None) -> Tensor | None:
    """Make the codes of a row contiguous; the stride between rows may be any."""
    return logits if logits is None or logits.stride(1) == 1 else logits.contiguous()


@registered(
    "sample_token_triton(Tensor logits, Tensor? uncond, Tensor image_ids, Tensor? at, SymInt step, "
    "Tensor? key, SymInt seed, float cfg_scale, float temperature, SymInt top_k, float top_p, "
    "bool greedy) -> Tensor",
    lambda logits, *rest: logits.new_empty(logits.shape[0], dtype=torch.int64),
)
def _draw(
    logits: Tensor, uncond: Tensor | None, image_ids: Tensor, at: Tensor | None, step: int,
    key: Tensor | None, seed: int, cfg_scale: float, temperature: float, top_k: int, top_p: float,
    greedy: bool,
) -> Tensor:  # fmt: skip
    B, V = logits.shape
    out = torch.empty(B, dtype=torch.int64, device=logits.device)
    if B == 0:
        return out
    logits, uncond = _rows(logits), _rows(uncond)
    guided = uncond is not None
    takes_k, takes_p = not greedy and 0 < top_k < V, not greedy and top_p < 1
    block = triton.next_power_of_2(V)
    chunk, most = DRAW.at(logits.device, tuning_key(logits)[0], B)
    chunk = FILTERED_CHUNK if takes_k or takes_p else chunk
    shares = 1 if greedy else _shares(B, V, most)
    best = out if shares == 1 else torch.empty(B, shares, dtype=torch.int64, device=logits.device)
    warps = max(1, min(chunk, block) // CODES_PER_WARP)
    with on(logits.device):
        _sample_token[(B, shares)](
            logits, uncond, image_ids.contiguous(),
            _signed(step) if at is None else at,
            best, logits.stride(0), uncond.stride(0) if guided else None,
            *((_signed(seed), _signed(seed >> 32)) if key is None else (key, None)),
            cfg_scale if guided else None,
            None if greedy or temperature == 1 else max(temperature, 1e-5),
            top_k if takes_k else None, top_p if takes_p else None,
            V=V, BLOCK=block if takes_k or takes_p else 0, CHUNK=min(chunk, block // shares),
            SHARES=shares, GREEDY=greedy,
            # Products and sums are rounded separately, as in torch.
            num_warps=warps, enable_fp_fusion=False, **overlap(logits.device),
            # The most that each of 16 warps can have. Without it, the assembler spills 8 bytes on
            # compute capability 10.0 rather than use more than half of that.
            maxnreg=128 if greedy else None,
        )  # fmt: skip
        if shares > 1:
            _best_share[(triton.cdiv(B, BEST_ROWS),)](
                best, out, B, SHARES=shares, ROWS=BEST_ROWS, **overlap(logits.device), num_warps=1
            )
    return out
