"""`ops.nearest_code` on a CPU: blocked, certified exact, within 64 MB of extra memory.

For every row of z [N, d], it finds the k rows of codebook [K, d] with the largest scores in float64
arithmetic; ties go to the lowest index. For one block of codes it works as follows:

1. *Screen* in float32: compute scores of the codes against a few rows at a time, [codes, QUERIES],
   in one reused buffer; keep only the largest score of every GROUP codes.
2. *Certify*: both sides have length at most one, so a float32 score is off by no more than
   ``_screen_error(d)``. Let M be the k-th largest group maximum: k codes score at least M, so each
   of the k best codes has a float32 score of at least M minus twice the error (their exact scores
   are no lower than those of these k). A group whose maximum is below that holds none of them.
   Every other group is *rescanned* in float64.

Distances (``normalize=False``) are screened relative to a point among the codes. In exact
arithmetic this does not change any order, and a difference of float64 numbers is rounded once.
What float32 then loses is as small as the spread of the codes. Far from the origin it would
otherwise be everything.

A codebook with dead codes, equal rows by the hundred, would send most groups to the rescan. If rows
have more than `_MANY` candidates on average for each of their k codes, only the first k of equal
codes are kept.

The bound. Let u = 2^-24. Rounding ``z`` and ``e`` from float64 changes each product ``z_i e_i`` by
a factor within (1 + u)^2. Multiplying and adding d terms in float32 in any order, fused or not,
changes it by a factor within (1 + u)^d (Higham, Accuracy and Stability, section 3.1). So the score
is off by at most ((1 + u)^(d+2) - 1) * sum |z_i e_i|, where the sum is at most |z| |e| <= 1, and
lengths of "one" are themselves rounded. (d + 4) u covers this for every d that is accepted here.
Products that underflow are below 2^-126 and are absorbed by the last of the four u.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# The epsilon of F.normalize: shorter rows are divided by this instead of by their length.
_EPS = 1e-12
# Keeps a division by a zero length finite.
_TINY = 1e-300
# "No code": larger than any code.
_NONE = torch.iinfo(torch.int64).max
# Codes per float32 group maximum; the rescan costs 2 GROUP d float64 operations per row.
_GROUP = 32
# Values in one block of codes; its copies and temporaries take 28 bytes each.
_CODE_VALUES = 2**20
_CODES = 16384
# Queries of one matrix product of the screen: many codes, few queries. The other way round, 64 rows
# against 16,384 codes, takes 2.3 times as long (two cores, d = 12: 43 against 19 ms for 8,192
# rows).
_QUERIES = 512
# Scores in the reused buffer: 4 MB, the share of the last-level cache that a busy host leaves.
_SCORES = 2**20
# Rows per superblock, the unit of the rescan: its group maxima are 4 MB.
_ROWS = 2048
# Candidates of a row per each of its k codes above which repeated codes are looked for.
_MANY = 8
# Number of codes whose mean is taken.
_SAMPLE = 1024
# Values of codes that one step of the rescan gathers: 8 MB of float64.
_GATHER_VALUES = 2**20

_SCHEMA = "(Tensor z, Tensor codebook, int k, bool normalize) -> (Tensor code, Tensor score)"
_library = torch.library.Library("vfmtok_fast", "FRAGMENT")
_library.define("nearest_code_cpu" + _SCHEMA)


def unsupported_reason(
    z: Tensor, codebook: Tensor, *, k: int = 1, normalize: bool = True, return_score: bool = False
) -> str | None:  # fmt: skip
    """Why this cannot take the call, or None."""
    if z.shape[1] > 4096:
        return f"vectors of dimension {z.shape[1]} do not fit its 64 MB (4096 at most)"
    compiling = torch.compiler.is_compiling()
    if z.is_cuda and not compiling and torch.cuda.is_current_stream_capturing():
        return "it reads from the device how much to rescan, which a captured graph cannot"
    return None


def nearest_code(
    z: Tensor, codebook: Tensor, *, k: int = 1, normalize: bool = True, return_score: bool = False
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """See `vfmtok_fast.ops.nearest_code`; takes calls that `unsupported_reason` accepts."""
    code, score = torch.ops.vfmtok_fast.nearest_code_cpu(z, codebook, k, normalize)
    return (code, score) if return_score else code


def _screen_error(dim: int) -> float:
    """Bound on |float32 score - exact score| for vectors of length at most one."""
    return (dim + 4) * 2.0**-24


def _screen_dtype(device: torch.device) -> torch.dtype:
    """float32, unless the user lets float32 products round further, which voids the bound."""
    if device.type == "cpu":
        kept = torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")
    else:
        kept = torch.backends.cuda.matmul.fp32_precision in ("none", "ieee")
    return torch.float32 if kept else torch.float64


@dataclass(frozen=True)
class _Codes:
    """One block of codes in whole groups, the last one padded with repeats of the last code."""

    index: Tensor  # [GROUP * G] indices of the codes, ascending
    count: int  # number of codes, without the padding
    screen: Tensor  # [GROUP * G, d'] float32, rows no longer than one
    exact: Tensor  # [G, d', GROUP] float64
    broken: int  # the first code that is not finite, or _NONE
    compact: bool = False  # whether repeats among the codes have been looked for


def _finite(rows: Tensor) -> Tensor:
    """Which rows hold neither NaN nor infinity, in a ninth of the time of `isfinite().all(1)`."""
    return rows.abs().amax(1) < torch.inf


def _prepare_codes(codebook: Tensor, index: Tensor, centre: Tensor | None, dtype) -> _Codes:
    """Prepare the codes ``index``; distances are screened from ``centre`` if it is not None."""
    count = len(index)
    index = torch.cat([index, index[-1:].expand(-count % _GROUP)])
    exact = codebook.index_select(0, index).double()
    length, broken = exact.norm(dim=1, keepdim=True), _NONE
    # `_search` handles a code that is not finite, for all queries; here it must do no harm.
    if not bool(length.sum().isfinite()):
        wrong = ~_finite(exact)
        broken = int(torch.where(wrong, index, _NONE).amin())
        exact.nan_to_num_(0.0, 0.0, 0.0)
        length = exact.norm(dim=1, keepdim=True)
    if centre is None:
        exact /= length.clamp_(min=_EPS)
        screen = exact.to(dtype)
    else:
        # The score z.e - |e|^2 / 2 is the product of (z, 1) and (e, -|e|^2 / 2).
        screen = _with_square(exact - centre)
        screen = (screen / screen.norm(dim=1).amax().clamp_(min=_TINY)).to(dtype)
        exact = _with_square(exact)
    exact = exact.view(-1, _GROUP, exact.shape[1]).transpose(1, 2).contiguous()
    return _Codes(index, count, screen, exact, broken)


def _with_square(codes: Tensor) -> Tensor:
    return torch.cat([codes, codes.square().sum(1, keepdim=True).mul_(-0.5)], dim=1)


def _without_repeats(codebook: Tensor, codes: _Codes, centre: Tensor | None, k: int) -> _Codes:
    """Keep only the first ``k`` of equal codes, or return ``codes`` if that removes few."""
    index = codes.index[: codes.count]
    rows = codebook.index_select(0, index).double().nan_to_num_(0.0, 0.0, 0.0)
    # Equal rows get equal sums, bit for bit. Repeats may be missed if other rows get that sum too.
    key = rows.new_zeros(len(rows))
    weight = torch.rand(
        rows.shape[1], generator=torch.Generator().manual_seed(0), device="cpu"
    ).tolist()
    for column, factor in zip(rows.unbind(1), weight, strict=True):
        key.add_(column, alpha=factor)
    order = key.argsort(stable=True)
    rows = rows[order]
    repeat = torch.zeros_like(order, dtype=torch.bool)
    # A row is a repeat if it equals each of the k before it: other rows may have the same key.
    if len(rows) > k:
        repeat[k:] = True
        for before in range(1, k + 1):
            repeat[k:] &= (rows[k:] == rows[k - before : len(rows) - before]).all(1)
    first = index[order[~repeat].sort().values]
    if len(first) > 0.75 * len(index):
        return replace(codes, compact=True)
    return replace(
        _prepare_codes(codebook, first, centre, codes.screen.dtype),
        broken=codes.broken, compact=True,
    )  # fmt: skip


def _group_maxima(queries: Tensor, codes: Tensor) -> Tensor:
    """Largest score of every group of codes [GROUP * G, d'] for every query [R, d']: [G, R]."""
    count, rows = codes.shape[0], queries.shape[0]
    # Each thread has its own batch, so that it takes the maximum of scores that it wrote itself.
    parts = torch.get_num_threads() if queries.device.type == "cpu" else 1
    size = max(1, _SCORES // (min(rows, _QUERIES) * parts * _GROUP)) * _GROUP
    maxima = queries.new_empty(count // _GROUP, rows)
    buffer = queries.new_empty(min(count, parts * size) * min(rows, _QUERIES))
    whole = count - count % (parts * size)
    spans = [(i, i + parts * size, parts) for i in range(0, whole, parts * size)]
    spans += [(i, min(i + size, count), 1) for i in range(whole, count, size)]
    for start in range(0, rows, _QUERIES):
        query = queries[start : start + _QUERIES].T
        found = maxima[:, start : start + _QUERIES]
        for first, last, split in spans:
            scores = buffer[: (last - first) * query.shape[1]].view(split, -1, query.shape[1])
            part = codes[first:last].view(split, -1, codes.shape[1])
            torch.bmm(part, query.expand(split, -1, -1), out=scores)
            grouped = scores.view(-1, _GROUP, query.shape[1])
            torch.amax(grouped, 1, out=found[first // _GROUP : last // _GROUP])
    return maxima


def _rescan(queries: Tensor, codes: _Codes, group: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best float64 scores of pairs of a query and a group, and their codes: [P, k]."""
    table = codes.exact[group]
    scores = queries.new_zeros(table.shape[0], _GROUP)
    # Product by product, never by a matrix product, so that equal codes get equal bits.
    for i in range(table.shape[1]):
        scores.addcmul_(queries[:, i, None], table[:, i])
    if k > 1:
        # Exclude the padding: repeats of the last code would be found beside it.
        place = torch.arange(_GROUP, device=group.device) + group[:, None] * _GROUP
        scores.masked_fill_(place >= codes.count, -torch.inf)
    found = [scores.max(dim=1, keepdim=True)]
    while len(found) < k:
        # `max` returns the first of equal scores; the codes of a group are ascending.
        scores.scatter_(1, found[-1].indices, -torch.inf)
        found.append(scores.max(dim=1, keepdim=True))
    score, place = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    return score, codes.index[group[:, None] * _GROUP + place]


def _merge(best: Tensor, code: Tensor, row: Tensor, score: Tensor, found: Tensor) -> None:
    """Merge the candidates [P, k] of rows [P] into the ``best`` k so far, in place.

    Both are sorted, so the next best is always first in one of the two.
    """
    old_score, old_code = best.clone(), code.clone()
    k = best.shape[1]
    for i in range(k):
        top = old_score[:, 0].scatter_reduce(0, row, score[:, 0], "amax")
        # The lowest of the codes that have their row's top score, including the current best.
        reached = torch.where(score[:, 0] == top[row], found[:, 0], _NONE)
        lowest = torch.where(old_score[:, 0] == top, old_code[:, 0], _NONE)
        lowest = lowest.scatter_reduce(0, row, reached, "amin")
        best[:, i], code[:, i] = top, lowest
        if i == k - 1:
            break
        for scores, codes, taken in (
            (old_score, old_code, old_code[:, 0] == lowest),
            (score, found, found[:, 0] == lowest[row]),
        ):
            # Remove the winner; those behind it move up.
            taken = taken[:, None]
            scores[:, :-1] = torch.where(taken, scores[:, 1:], scores[:, :-1])
            codes[:, :-1] = torch.where(taken, codes[:, 1:], codes[:, :-1])
            scores[:, -1:].masked_fill_(taken, -torch.inf)


def _candidates(screen: Tensor, live: Tensor, codes: _Codes, k: int) -> Tensor:
    """Which groups [G, R] may hold one of the k best codes of a row."""
    maxima = _group_maxima(screen, codes.screen)
    limit, below = maxima.amax(0), maxima
    for _ in range(k - 1):
        # The next lower maximum. It is at most the k-th largest, if several are equal.
        below = below.masked_fill(below >= limit, -torch.inf)
        limit = below.amax(0)
    limit = limit - 2 * _screen_error(screen.shape[1])
    # A row without a direction has nothing to search, and would select every group. If numbers
    # overflowed, comparisons with NaN are false, and every group is selected.
    return ~(maxima < torch.where(live, limit, torch.inf))


def _search(z: Tensor, codebook: Tensor, k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """Search all rows, a superblock at a time against each block of codes: [N, k]."""
    count, dim = codebook.shape
    dtype = _screen_dtype(z.device)
    size = max(_GROUP, min(_CODES, _CODE_VALUES // dim) // _GROUP * _GROUP)
    blocks = torch.arange(count, device=z.device).split(size)
    centre = None if normalize else _centre(codebook)
    # A single block is prepared once; several would exceed the memory, so each is prepared again.
    kept = _prepare_codes(codebook, blocks[0], centre, dtype) if len(blocks) == 1 else None
    score = z.new_empty(z.shape[0], k, dtype=torch.promote_types(z.dtype, torch.float32))
    code = torch.empty(z.shape[0], k, dtype=torch.int64, device=z.device)
    lowest = torch.arange(k, device=z.device)
    step = max(1, _GATHER_VALUES // (_GROUP * (dim + (not normalize))))
    for rows in (slice(i, i + _ROWS) for i in range(0, z.shape[0], _ROWS)):
        # A copy, because non-finite values are cleared in it.
        exact = z[rows].to(torch.float64, copy=True)
        finite = _finite(exact)
        exact.nan_to_num_(0.0, 0.0, 0.0)
        length = exact.norm(dim=1)
        live, screen = finite, exact
        if normalize:
            live = finite & (length > 0)
        else:
            one = torch.ones_like(exact[:, :1])
            exact, screen = (torch.cat([x, one], dim=1) for x in (exact, exact - centre))
        screen = (screen / screen.norm(dim=1).clamp(min=_TINY)[:, None]).to(dtype)
        best = exact.new_full((len(exact), k), -torch.inf)
        found = torch.full_like(best, _NONE, dtype=torch.int64)
        broken = _NONE
        for block in blocks:
            codes = kept or _prepare_codes(codebook, block, centre, dtype)
            broken = min(broken, codes.broken)
            groups, of = _candidates(screen, live, codes, k).nonzero(as_tuple=True)
            if len(of) > _MANY * k * len(exact) and not codes.compact:
                # If there are dead codes, most candidates hold the same codes.
                codes = _without_repeats(codebook, codes, centre, k)
                kept = kept and codes
                groups, of = _candidates(screen, live, codes, k).nonzero(as_tuple=True)
            # Every step merges its candidates into the best so far.
            for row, group in zip(of.split(step), groups.split(step), strict=True):
                _merge(best, found, row, *_rescan(exact[row], codes, group, k))
        # float64 scores that overflow are no scores.
        lost = found == _NONE
        best, found = best.masked_fill(lost, torch.nan), torch.where(lost, lowest, found)
        if normalize:
            best /= length.clamp(min=_EPS)[:, None]
        finite, live = finite[:, None], live[:, None]
        defined = finite & (broken == _NONE)
        score[rows] = torch.where(defined, torch.where(live, best, 0.0), torch.nan)
        # The first broken code, then the lowest others.
        others = (
            lowest
            if broken == _NONE
            else torch.cat([lowest.new_full((1,), broken), lowest[:-1] + (lowest[:-1] >= broken)])
        )
        code[rows] = torch.where(
            defined, torch.where(live, found, lowest), torch.where(finite, others, lowest)
        )
    return (code[:, 0], score[:, 0]) if k == 1 else (code, score)


def _centre(codebook: Tensor) -> Tensor:
    """A finite point [d] among the codes, float64. Any will do; a near one screens more sharply."""
    rows = codebook[:: -(-len(codebook) // _SAMPLE)].to(torch.float64, copy=True)
    return rows.nan_to_num_(0.0, 0.0, 0.0).mean(0).nan_to_num_(0.0, 0.0, 0.0)


def _in_eager(z: Tensor, codebook: Tensor, k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    # Autocast would run the screen's products in half precision, which violates the bound.
    with torch.autocast(z.device.type, enabled=False):
        return _search(z, codebook, k, normalize)


def _in_fake(z: Tensor, codebook: Tensor, k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    shape = (z.shape[0],) if k == 1 else (z.shape[0], k)
    score = torch.promote_types(z.dtype, torch.float32)
    return z.new_empty(shape, dtype=torch.int64), z.new_empty(shape, dtype=score)


def _mark_discrete(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output)


def _no_gradient(ctx, *grads: Tensor) -> tuple[None, None, None, None]:
    return None, None, None, None


_NAME = "vfmtok_fast::nearest_code_cpu"
_library.impl("nearest_code_cpu", _in_eager, "CompositeExplicitAutograd")
torch.library.register_fake(_NAME, _in_fake, lib=_library)
torch.library.register_autograd(_NAME, _no_gradient, setup_context=_mark_discrete, lib=_library)
