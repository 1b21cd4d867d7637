"""append_code, the reference and the portable implementation: against plain indexing."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing

from vfmtok_fast import ops

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def chosen(taking, clean_switch):
    yield from taking("append_code")


def call(B=3, T=5, V=7, C=6, copies=2, position=1, dtype=torch.float32):
    """(code, codes, position, embedding, x) before the call, made to show what is left alone."""
    embedding = torch.arange(V * C).view(V, C).to(dtype)
    code = torch.arange(B) * 3 % V
    return (
        code,
        torch.full((B, T), -1),
        position,
        embedding,
        torch.full((copies * B, C), -1).to(dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("copies", [1, 2, 3])
@pytest.mark.parametrize("B", [1, 3, 200])
@pytest.mark.parametrize("position", [0, 4, torch.tensor([2]), torch.tensor([3, 9])], ids=str)
def test_code_embedding_and_counters(B, copies, dtype, position):
    counters = position.clone() if isinstance(position, torch.Tensor) else position
    code, codes, _, embedding, x = given = call(B, copies=copies, position=counters, dtype=dtype)
    with torch.no_grad():
        assert ops.append_code(*given) is None
    at = int(position[0]) if isinstance(position, torch.Tensor) else position
    assert torch.equal(codes[:, at], code)
    assert int((codes == -1).sum()) == 4 * B
    for part in x.split(B):
        assert torch.equal(part, embedding[code])
    if isinstance(position, torch.Tensor):
        assert torch.equal(counters, position + 1)


def test_no_images():
    code, codes, _, _, x = given = call(B=0, position=torch.tensor([2, 3]))
    ops.append_code(*given)
    assert codes.shape == (0, 5) and x.shape == (0, 6) and given[2].tolist() == [3, 4]


def test_embeddings_of_nothing():
    code, codes, position, embedding, x = given = call(C=0)
    ops.append_code(*given)
    assert torch.equal(codes[:, position], code)


def test_positions_compile_no_variants(implementation):
    """One for the first position, one for all others; torch.compile gives up after eight."""
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(ops.append_code, backend=counter, fullgraph=True)
    with torch.no_grad():
        for position in range(5):
            code, codes, _, embedding, x = call()
            compiled(code, codes, position, embedding, x)
            assert torch.equal(codes[:, position], code) and torch.equal(x[:3], embedding[code])
    assert counter.frame_count <= 2


def test_rows_of_larger_buffers_are_written_alone():
    """As the engine has it once guidance is off."""
    code, codes, position, embedding, _ = call()
    x = torch.full((6, 6), -1.0)
    ops.append_code(code, codes, position, embedding, x[:3])
    assert torch.equal(x[:3], embedding[code]) and bool((x[3:] == -1).all())


CODE, CODES, _, TABLE, X = call()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((CODE.int(), CODES, 1, TABLE, X), TypeError, "code must be an int64 tensor, got torch.i"),
        ((3, CODES, 1, TABLE, X), TypeError, "code must be an int64 tensor, got int"),
        ((CODE[None], CODES, 1, TABLE, X), ValueError, r"code must have shape \[B\], got \(1, 3\)"),
        ((CODE, CODES.int(), 1, TABLE, X), TypeError, "codes must be an int64 tensor, got"),
        ((CODE, CODES[:2], 1, TABLE, X), ValueError, r"codes must have shape \(3, 5\), got"),
        ((CODE, CODES, 5, TABLE, X), ValueError, "position must be in 0..4, got 5"),
        ((CODE, CODES, -1, TABLE, X), ValueError, "position must be in 0..4, got -1"),
        ((CODE, CODES, True, TABLE, X), TypeError, "position must be an int or a tensor, got bool"),
        ((CODE, CODES, torch.ones(1).int(), TABLE, X), TypeError, "position must be an int64"),
        ((CODE, CODES, torch.zeros(3).long(), TABLE, X), ValueError, "position must have 1 or 2"),
        (
            (CODE, CODES, torch.tensor(1), TABLE, X),
            ValueError,
            r"position must have shape \[1\] or",
        ),
        ((CODE, CODES, 1, TABLE.long(), X), TypeError, "embedding must be floating point, got"),
        ((CODE, CODES, 1, TABLE, X.half()), TypeError, "x must be torch.float32, as embedding is"),
        (
            (CODE, CODES, 1, TABLE, X[:4]),
            ValueError,
            r"x must have shape \[R \* 3, 6\], got \(4, 6",
        ),
        ((CODE, CODES, 1, TABLE, X[:, :5]), ValueError, r"x must have shape \[R \* 3, 6\], got"),
        ((CODE + 1, CODES, 1, TABLE, X), ValueError, r"code must be in \[0, 7\), got 7"),
        ((CODE - 1, CODES, 1, TABLE, X), ValueError, r"code must be in \[0, 7\), got -1"),
        ((CODE.to("meta"), CODES, 1, TABLE, X), ValueError, "code must be on cpu, as embedding is"),
    ],
)
def test_refuses_in_one_line(arguments, error, message):
    with pytest.raises(error, match=f"^append_code: {message}") as caught:
        ops.append_code(*arguments)
    assert "\n" not in str(caught.value)
