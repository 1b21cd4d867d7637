"""`tune` with real kernels in Triton's interpreter; a child pytest of tests/test_tuner.py."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
from vfmtok_fast.kernels.tuning import Space
from vfmtok_fast.tuner.calls import BY_DEFORMABLE, Call
from vfmtok_fast.tuner.compile import asked_spaces
from vfmtok_fast.tuner.run import Tuner

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs in the child pytest"
)
LEVELS = ((4, 4), (3, 3))
DEFORMABLE = {"B": 1, "Q": 4, "H": 1, "D": 8, "P": 2, "levels": LEVELS}
STEP = {"layers": 1, "C": 16, "H": 2, "F": 24, "V": 20, "T": 6, "position": 3}
CALLS = (
    Call("decode_attention", "", "float32", {"B": 1, "H": 1, "G": 1, "T": 6, "D": 4, "length": 5}),
    Call("sample_token", "", "float32", {"B": 1, "V": 40, "cfg_scale": 1.5}),
    Call("nearest_code", "", "float32", {"N": 5, "K": 40, "d": 4}),
    Call("deformable_sample", "", "float32", DEFORMABLE, BY_DEFORMABLE),
    *(Call("decode_step", "", "float32", {"rows": rows, **STEP}) for rows in (2, 5, 6)),
    Call("decode_step", "int8 cache", "float32", {"rows": 1, "int8_cache": True, **STEP}),
)


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_settings_are_right_by_the_oracle(call, tmp_path, monkeypatch):
    """The timer makes the last setting win, whichever it is.

    A few settings of each kernel's whole list are tested; the kernel's own tests cover all of them.
    """
    every = Space.candidates

    def few(space: Space) -> list:
        found = every(space)
        return found[:: -(-len(found) // 4)]

    monkeypatch.setattr(Space, "candidates", few)

    def timer(functions, rounds):
        return [1.0 / (i + 1) for i in range(len(functions))]

    tuner = Tuner(
        torch.device("cpu"),
        timer,
        compiler=lambda jobs: ((job, "") for job in jobs),
        path=tmp_path / "card.json",
    )
    outcome = tuner.run([call], 3600)
    assert not outcome.failed, outcome
    assert outcome.settings or not asked_spaces(call, 90)
