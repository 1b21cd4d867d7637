"""Triton `ops.nearest_code`: screened on the matrix unit, certified, exact in float64.

What it computes: for every row of z [N, d], the k rows of codebook [K, d] with the largest cosine,
lowest index first on ties, int64 [N, k], and those cosines, float32 [N, k]. Six launches:

    _insert    a hash table of the codes by their bits, to find repeated codes (k = 1)
    _prepare   directions of the codes as two float16 halves for the screens; the codes in float32
               for the rescans
    _screen    scores of all codes from the upper halves: for each row and each of 4 lanes, the best
               group of consecutive codes and the value of the second best; nothing of size N x K
               leaves the registers
    _rescan    float64 scores of the groups that can contain the answer; rows where a second group
               of a lane can contain it too are listed
    _screen    the listed rows again, with both halves, a bound 50 times smaller, smaller groups
    _rescan    float64 scores of the remaining candidates: groups, or all codes of a lane

Bytes: (4 d + 12) N + 4 d K in and out; scratch does not grow beyond 65,536 rows. Lower bound on an
H200 at N = 65,536, K = 16,384, d = 12: the product on the matrix unit, 44 us. README.md derives
bounds and costs.
"""

from __future__ import annotations

import os

import torch
import triton
from torch import Tensor

from .. import tuning
from ..launch import on
from ..registered import library, registered
from ..tuning import Space, dtype_name
from .rescan import _rescan
from .screen import LANES, _insert, _prepare, _screen

SCREEN = Space(
    "nearest_code.screen",
    {
        "scores": ("float32", "float16"),
        "tile": (64, 128),
        "rows": (64, 128),
        "warps": (4, 8),
        "stages": (2, 3, 4),
    },
    {
        80: {"scores": "float32", "tile": 64, "rows": 64, "warps": 4, "stages": 3},
        90: {"scores": "float16", "tile": 128, "rows": 64, "warps": 4, "stages": 3},
    },
    # More scores per thread do not fit into its registers.
    valid=lambda s: s.rows * s.tile // s.warps <= (2048 if s.scores == "float16" else 1024),
)
AGAIN = Space(
    "nearest_code.screen_again",
    {"tile": (64, 128), "sub": (8, 16, 32), "rows": (64, 128), "warps": (4, 8), "stages": (2, 3)},
    {80: {"tile": 64, "sub": 16, "rows": 64, "warps": 4, "stages": 2}},
    # Eight warps with 64 rows get another layout, which would copy every score. Tiles of 128 codes
    # fit into registers only with groups of 8 codes.
    valid=lambda s: s.rows == 16 * s.warps and (s.tile == 64 or s.sub == 8),
)
RESCAN = Space(
    "nearest_code.rescan",
    {"rows": (8, 16, 32), "warps": (2, 4, 8)},
    {80: {"rows": 16, "warps": 4}},
)
RESCAN_AGAIN = Space(
    "nearest_code.rescan_again",
    {"rows": (4, 8, 16), "warps": (1, 2, 4)},
    {80: {"rows": 8, "warps": 2}},
)
# All settings are exact: none changes a code or the bits of a score.
SPACES = SCREEN, AGAIN, RESCAN, RESCAN_AGAIN

# Codes per group in the first screen. Larger groups cost the screen fewer instructions, about 20
# per column of a tile at the end of a span, and the rescan more loads.
GROUP = 32
# For k > 1: smaller groups give more slots, so that two of the best codes rarely share one.
GROUP_K = 16
MAX_SPLITS = 32
SPLITS_AGAIN = 16
# Enough programs of the first screen to fill the multiprocessors twice if rows are few; and enough
# for the launches that read their amount of work on the device.
WANTED_PROGRAMS = 264
PROGRAMS_AGAIN = 528
# Rows per round of launches: enough to fill any chip, with about 50 MB of scratch for slots, or
# twice that if k > 1.
BLOCK_ROWS = 65536
# Codes per program of _insert.
INSERT = 64
# Factors on the error bounds of both screens; tests set them to 0 to show that they are needed.
BOUND = BOUND_AGAIN = 1.0


def unsupported_reason(
    z: Tensor, codebook: Tensor, *, k: int = 1, normalize: bool = True, return_score: bool = False
) -> str | None:
    """Why this cannot take the call, or None."""
    if not normalize:
        return "it compares directions only (normalize=True)"
    if z.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float32, float16 and bfloat16, not {z.dtype}"
    if not 4 <= z.shape[1] <= 64:
        return f"it takes vectors of dimension 4 to 64, not {z.shape[1]}"
    if codebook.shape[0] > 2**30:
        return "it counts codes in 32 bits"
    return None


def tuning_key(
    z: Tensor, codebook: Tensor, *, k: int = 1, normalize: bool = True, return_score: bool = False
) -> tuple[str, int]:
    """Kind and size under which a measurement is stored; see `tuning`."""
    kind = f"{dtype_name(z)} d={z.shape[1]} K={_power(codebook.shape[0])}"
    return kind if k == 1 else f"{kind} k={k}", max(1, z.shape[0])


def nearest_code(
    z: Tensor, codebook: Tensor, *, k: int = 1, normalize: bool = True, return_score: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """See `vfmtok_fast.ops.nearest_code`; takes calls that `unsupported_reason` accepts."""
    code, score = _search(z, codebook, k)
    return (code, score) if return_score else code


def _power(n: int) -> int:
    """The largest power of two that is at most n."""
    return 1 << (n.bit_length() - 1)


def _group(codes: int, tile: int, wanted: int, most: int) -> int:
    """Codes per group: fewer if there are too few codes to fill ``wanted`` spans of tiles."""
    group = most
    while group > 2 and triton.cdiv(codes, tile * group) < wanted:
        group //= 2
    return group


def _table(codes: int) -> int:
    """Slots of the hash table; a code is compared only with the lowest code of its slot."""
    return 4 * triton.next_power_of_2(codes)


def _fake(z: Tensor, codebook: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (z.shape[0],) if k == 1 else (z.shape[0], k)
    return z.new_empty(shape, dtype=torch.int64), z.new_empty(shape, dtype=torch.float32)


@registered(
    "nearest_code_triton(Tensor z, Tensor codebook, int k) -> (Tensor code, Tensor score)", _fake
)
def _search(z: Tensor, codebook: Tensor, k: int) -> tuple[Tensor, Tensor]:
    (n, d), codes, device = z.shape, codebook.shape[0], z.device
    shape = (n,) if k == 1 else (n, k)
    code = torch.empty(shape, dtype=torch.int64, device=device)
    score = torch.empty(shape, dtype=torch.float32, device=device)
    if n == 0:
        return code, score
    z, codebook = z.contiguous(), codebook.contiguous()
    key = tuning_key(z, codebook, k=k)
    screen, again, rescan, rescan_again = (space.at(device, *key) for space in SPACES)
    wide = screen.scores == "float32"
    block = min(n, BLOCK_ROWS)
    row_blocks = triton.cdiv(block, screen.rows)
    wanted = min(MAX_SPLITS, max(1, WANTED_PROGRAMS // row_blocks), triton.cdiv(codes, screen.tile))
    group = _group(codes, screen.tile, wanted, GROUP if k == 1 else GROUP_K)
    sub = min(again.sub, group)
    # Whole spans for the tiles of both screens.
    groups = triton.cdiv(codes, 128 * group) * 128
    spans, steps = groups // screen.tile, groups // again.tile * (group // sub)
    # For k > 1 a split is one span or nearly so, because two of the best groups then rarely share a
    # slot.
    splits = min(MAX_SPLITS, triton.next_power_of_2(spans)) if k > 1 else _power(min(wanted, spans))
    splits_again = min(SPLITS_AGAIN, triton.next_power_of_2(steps))

    def empty(*size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    columns = max(16, triton.next_power_of_2(d))
    packed = empty(groups * group, columns, dtype=torch.float16)
    rest = empty(3, groups * group, columns, dtype=torch.float16)
    exact = empty(groups * group, d, dtype=torch.float32)
    inverse = empty(groups * group, dtype=torch.float64)
    alive = empty(groups, dtype=torch.int8)
    table = _table(codes) if k == 1 else 0
    first = torch.zeros(max(table, 1), dtype=torch.int32, device=device)
    rounds = triton.cdiv(n, BLOCK_ROWS)
    # Each counter takes 16 bytes: another alignment would compile another variant.
    facts = torch.zeros(4 + 2 * rounds, dtype=torch.int64, device=device)
    slots = max(splits, splits_again) * LANES.value
    best, second = (empty(block, slots, dtype=torch.float32) for _ in range(2))
    where = empty(block, slots, dtype=torch.int32)
    slack = empty(block, dtype=torch.float32)
    listed = empty(block, dtype=torch.int64)
    # Three-way maxima, also of two float16 values in one register, exist from sm_90 on.
    asm = tuning.capability(device) >= 90 and os.environ.get("TRITON_INTERPRET") != "1"
    # Before sm_90 the assembler would spill half of the maxima to fit seven warps per scheduler.
    limit = {} if asm else {"maxnreg": 96}
    row = {"D": d, "C": columns}
    last = {**row, "GROUP": group, "TAKE": k, "PLACES": triton.next_power_of_2(k)}
    with on(device):
        if table:
            _insert[(triton.cdiv(codes, INSERT),)](
                codebook, first, codes, SLOTS=table, **row, BLOCK=INSERT, num_warps=2
            )
        _prepare[(groups,)](
            codebook, first, packed, rest, exact, inverse, alive, facts, codes,
            **row, TILE=screen.tile, TILE_AGAIN=again.tile, GROUP=group, SLOTS=table,
            num_warps=columns // 16,
        )  # fmt: skip
        for i in range(rounds):
            part = slice(i * BLOCK_ROWS, min((i + 1) * BLOCK_ROWS, n))
            rows, count = part.stop - part.start, facts[4 + 2 * i :]
            blocks = triton.cdiv(rows, screen.rows)
            found = best, second, where, slack
            _screen[(blocks * splits,)](
                z[part], packed, facts, listed, count, *found, rows, spans,
                triton.cdiv(spans, splits), BOUND, **row, ROWS=screen.rows, TILE=screen.tile,
                SUB=group, SPLITS=splits, WIDE=wide, AGAIN=False, ASM=asm, STAGES=screen.stages,
                num_warps=screen.warps, **limit,
            )  # fmt: skip
            _rescan[(triton.cdiv(rows, rescan.rows),)](
                z[part], exact, inverse, alive, facts, listed, count, *found, code[part],
                score[part], rows, codes, groups, triton.cdiv(spans, splits),
                screen.tile * 2.0**-22 if wide else 0.0, **last, SLOTS=splits * LANES.value,
                TILE=screen.tile, ROWS=rescan.rows, SUB=group, AGAIN=False, num_warps=rescan.warps,
            )  # fmt: skip
            most = triton.cdiv(rows, again.rows) * splits_again
            _screen[(min(PROGRAMS_AGAIN, most),)](
                z[part], rest, facts, listed, count, *found, rows, steps,
                triton.cdiv(steps, splits_again), BOUND_AGAIN, **row, ROWS=again.rows,
                TILE=again.tile, SUB=sub, SPLITS=splits_again, WIDE=True, AGAIN=True, ASM=asm,
                STAGES=again.stages, num_warps=again.warps,
            )  # fmt: skip
            _rescan[(min(2 * PROGRAMS_AGAIN, triton.cdiv(rows, rescan_again.rows)),)](
                z[part], exact, inverse, alive, facts, listed, count, *found, code[part],
                score[part], rows, codes, groups, triton.cdiv(steps, splits_again), 0.0, **last,
                SLOTS=splits_again * LANES.value, TILE=again.tile, ROWS=rescan_again.rows, SUB=sub,
                AGAIN=True,
                num_warps=rescan_again.warps,
            )  # fmt: skip
    return code, score


def _mark_discrete(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output)


def _no_gradient(ctx, *grads: Tensor) -> tuple[None, None, None]:
    return None, None, None


torch.library.register_autograd(
    _search.default, _no_gradient, setup_context=_mark_discrete, lib=library
)
