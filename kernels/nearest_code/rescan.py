"""`_rescan` of `nearest_code`: find the groups that can contain the answer; score in float64."""

from __future__ import annotations

import triton
import triton.language as tl

from .screen import BROKEN, EPS, LANES

LAST = tl.constexpr(2**31 - 1)


@triton.jit
def _dot(z, exact, row, m_row, code, D: tl.constexpr, GROUP: tl.constexpr):
    """float64 dot products [R, W] of rows and codes, all in one order, so that equal codes tie."""
    total = tl.zeros(code.shape, tl.float64)
    p_e = exact + (code // GROUP).to(tl.int64) * (D * GROUP) + code % GROUP
    for i in range(D):
        a = tl.load(z + row * D + i, mask=m_row, other=0.0).to(tl.float32).to(tl.float64)
        total += a[:, None] * tl.load(p_e + i * GROUP).to(tl.float64)
    return total


@triton.jit
def _keep(
    z, exact, inverse, row, m_row, code, m_code, b_score, b_code, K,
    TAKE: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Merge the codes [R, W] into the best so far, float64 and int32 [R, P], in any order."""
    score = _dot(z, exact, row, m_row, code, D, GROUP) * tl.load(inverse + code)
    score = tl.where(m_code & (code < K), score, float("-inf"))
    for _ in tl.static_range(TAKE):
        most = tl.max(score, axis=1)
        lowest = tl.min(tl.where(score == most[:, None], code, LAST), axis=1)
        score = tl.where(code == lowest[:, None], float("-inf"), score)
        # A better code replaces the worst one kept; among equal scores the lower code is better.
        worst = tl.min(b_score, axis=1)
        highest = tl.max(tl.where(b_score == worst[:, None], b_code, -1), axis=1)
        better = (most > worst) | ((most == worst) & (lowest < highest))
        better &= most > float("-inf")
        gives_way = (b_score == worst[:, None]) & (b_code == highest[:, None]) & better[:, None]
        b_score = tl.where(gives_way, most[:, None], b_score)
        b_code = tl.where(gives_way, lowest[:, None], b_code)
    return b_score, b_code


# Not specialised: the last round of a call may have any number of rows.
@triton.jit(do_not_specialize=["N"])
def _rescan(
    z, exact, inverse, alive, facts, listed, count, best, second, where, slack, code, score,
    N, K, groups, per_split, cut,
    SLOTS: tl.constexpr, D: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    GROUP: tl.constexpr, SUB: tl.constexpr, TAKE: tl.constexpr, PLACES: tl.constexpr,
    AGAIN: tl.constexpr,
):  # fmt: skip
    """Find the TAKE best codes of rows whose candidates are all known; list the other rows.

    AGAIN: for the listed rows; if a slot's candidates are not all known, all of its codes are
    candidates.
    """
    rows = N
    if AGAIN:
        rows = tl.load(count).to(tl.int32)
    broken = tl.load(facts + BROKEN)
    o_dim = tl.arange(0, C)
    slot = tl.arange(0, SLOTS)[None, :]
    place = tl.arange(0, PLACES)[None, :]
    member = tl.arange(0, SUB)[None, :]
    width = tl.full((), ROWS, tl.int64)
    # Small groups per column of a span.
    parts: tl.constexpr = GROUP // SUB
    for item in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        at = item * width + tl.arange(0, ROWS)
        m_row = at < rows
        row = at
        if AGAIN:
            row = tl.load(listed + at, mask=m_row, other=0)
        p_z = z + row[:, None] * D + o_dim[None, :]
        value = tl.load(p_z, mask=m_row[:, None] & (o_dim < D)[None, :], other=0.0).to(tl.float32)
        finite = tl.min(tl.where(tl.abs(value) < float("inf"), 1, 0), axis=1) > 0
        length = tl.sqrt(tl.sum(value.to(tl.float64) * value.to(tl.float64), axis=1))
        live = m_row & finite & (length > 0) & (broken == 0)

        p_slot = at[:, None] * SLOTS + slot
        m_slot = m_row[:, None] & (slot >= 0)
        left = tl.load(best + p_slot, mask=m_slot, other=0.0)
        other = tl.load(second + p_slot, mask=m_slot, other=0.0)
        places = tl.load(where + p_slot, mask=m_slot, other=0)
        # The score of the TAKE-th best group: at least TAKE codes have no lower score.
        top, below, least = left, other, tl.max(left, axis=1)
        for _ in tl.static_range(TAKE - 1):
            # Remove one of several equal scores: the first of the best, else of the second best.
            in_top = tl.max(top, axis=1) == least
            first = tl.min(tl.where(top == least[:, None], slot, SLOTS), axis=1)
            next_first = tl.min(tl.where(below == least[:, None], slot, SLOTS), axis=1)
            top = tl.where(in_top[:, None] & (slot == first[:, None]), 0.0, top)
            gone = (in_top == 0)[:, None] & (slot == next_first[:, None])
            below = tl.where(gone, 0.0, below)
            least = tl.maximum(tl.max(top, axis=1), tl.max(below, axis=1))
        # Keys are truncated by less than ``cut`` relative to the score: README.md, "Keys".
        limit = least - tl.load(slack + at, mask=m_row, other=0.0) - least * cut
        dark = live & (limit <= 0)
        unknown = other >= limit[:, None]
        if AGAIN:
            known = live & (dark == 0)
        else:
            known = live & (dark == 0) & (tl.max(tl.where(unknown, 1, 0), axis=1) == 0)
        left = tl.where(known[:, None] & (left >= limit[:, None]), left, float("-inf"))

        b_score = tl.full((ROWS, PLACES), float("-inf"), tl.float64)
        # Places beyond TAKE are never the worst.
        b_score = tl.where(place < TAKE, b_score, float("inf"))
        b_code = LAST - 1 - place + tl.zeros((ROWS, PLACES), tl.int32)
        # One slot of every row at a time; most rows have only one.
        while tl.max(left) > float("-inf"):
            most, pick = tl.max(left, axis=1, return_indices=True)
            taken = slot == pick[:, None]
            its_place = tl.sum(tl.where(taken, places, 0), axis=1)
            its_step, column = its_place // TILE, its_place % TILE
            left = tl.where(taken, float("-inf"), left)
            m_taken = most > float("-inf")
            group = ((its_step // parts) * TILE + column) * parts + its_step % parts
            if AGAIN:
                several = m_taken & (tl.max(tl.where(taken & unknown, 1, 0), axis=1) > 0)
                columns: tl.constexpr = TILE // LANES
                turns = tl.where(tl.max(tl.where(several, 1, 0)) > 0, per_split * columns, 1)
                lane, split = pick % LANES, pick // LANES
                for i in range(turns):
                    # The i-th group of the slot: by step, then by every fourth pair of columns.
                    turn = i + tl.zeros((), tl.int32)
                    a_step, o = split * per_split + turn // columns, turn % columns
                    a_column = (o // 2) * (2 * LANES) + 2 * lane + o % 2
                    another = ((a_step // parts) * TILE + a_column) * parts + a_step % parts
                    which = tl.where(several, another, group)
                    m_which = m_taken & (several | (turn == 0)) & (which < groups * parts)
                    which = tl.where(m_which, which, 0)
                    b_score, b_code = _keep(
                        z, exact, inverse, row, m_row, which[:, None] * SUB + member,
                        m_which[:, None], b_score, b_code, K, TAKE, D, GROUP,
                    )  # fmt: skip
            else:
                group = tl.where(m_taken, group, 0)
                b_score, b_code = _keep(
                    z, exact, inverse, row, m_row, group[:, None] * SUB + member,
                    m_taken[:, None], b_score, b_code, K, TAKE, D, GROUP,
                )  # fmt: skip
        if AGAIN:
            if tl.max(tl.where(dark, 1, 0)) > 0:
                whole = tl.arange(0, GROUP)[None, :]
                for i in range(groups):
                    if tl.load(alive + i) > 0:
                        b_score, b_code = _keep(
                            z, exact, inverse, row, m_row,
                            i * GROUP + whole + tl.zeros((ROWS, GROUP), tl.int32),
                            dark[:, None], b_score, b_code, K, TAKE, D, GROUP,
                        )  # fmt: skip
        else:
            m_list = live & (known == 0)
            into = tl.atomic_add(count + tl.zeros_like(row), 1, mask=m_list)
            tl.store(listed + into, row, mask=m_list)

        # The rank of each place: how many come before it.
        ahead = b_score[:, None, :] > b_score[:, :, None]
        ahead |= (b_score[:, None, :] == b_score[:, :, None]) & (
            b_code[:, None, :] < b_code[:, :, None]
        )
        ahead &= (place < TAKE)[:, None, :]
        rank = tl.sum(tl.where(ahead, 1, 0), axis=2)
        rank = tl.where(live[:, None], rank, place)
        shown = (b_score / tl.maximum(length, EPS)[:, None]).to(tl.float32)
        shown = tl.where(live[:, None], shown, 0.0)
        shown = tl.where(((finite == 0) | (broken > 0))[:, None], float("nan"), shown)
        # The broken code first, then the lowest other codes.
        odd = K - broken
        instead = tl.where(place == 0, odd, tl.where(place - 1 < odd, place - 1, place))
        instead = tl.where((finite & (broken > 0))[:, None], instead, place)
        found = tl.where(live[:, None], b_code.to(tl.int64), instead)
        ready = m_row & ((live == 0) | known)
        if AGAIN:
            ready = m_row
        m_out = ready[:, None] & (place < TAKE)
        tl.store(code + row[:, None] * TAKE + rank, found, mask=m_out)
        tl.store(score + row[:, None] * TAKE + rank, shown, mask=m_out)
