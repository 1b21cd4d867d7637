"""Triton `ops.decode_step`: an embedding, five to nine launches per layer, and the head.

The cost of a step is reading the weights, once for all rows. The number of rows selects the
kernels:

    1 to 4     `vector`: products and sums in float32, without the matrix unit
    5 to 16    `matrix`: the matrix unit, with x normalised by a small kernel beforehand
    17 to 64   the same with other tiles
    more       cuBLAS, with small kernels between its products; see `many`

The bits of a row depend on that selection and on nothing else about the other rows. Attention is
`ops.decode_attention`, whose implementation is selected separately. README.md has the lower bound,
the measurements, and what was tried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ...decoding import KVCache, StepWeights
from ..launch import on, overlap
from ..linear import linear
from ..registered import registered
from ..tuning import Space, dtype_name
from . import matrix, vector
from .epilogue import ADDED, GATED, GELU, PLAIN, QKV
from .many import _append, _modulated, _rms_norm
from .matrix import _matrix
from .vector import _vector

# ``tile``: outputs per program; ``warps``; ``chunk``: columns that it holds at once; ``early``:
# whether it lets the next kernel begin at its start instead of after its wait.
_VECTOR = {
    "choices": {
        "tile": (1, 2, 4, 8), "warps": (1, 2, 4, 8), "chunk": (256, 1024, 4096), "early": (0, 1),
    },
    # The tile too, see `_in_registers`.
    "bits": ("tile", "warps", "chunk"),
    # 16-byte loads in half precision, and at most 32 columns per thread.
    "valid": lambda s: 8 <= s.chunk // (32 * s.warps) <= 32,
}  # fmt: skip
_ROW = {"tile": 1, "warps": 1, "chunk": 1024, "early": 0}
QKV_ROWS = Space("decode_step.qkv", defaults={80: _ROW}, **_VECTOR)
OUT_ROWS = Space("decode_step.out", defaults={80: {**_ROW, "tile": 2, "warps": 2}}, **_VECTOR)
GATE_ROWS = Space("decode_step.gate_up", defaults={80: _ROW}, **_VECTOR)
DOWN_ROWS = Space(
    "decode_step.down", defaults={80: {"tile": 2, "warps": 4, "chunk": 4096, "early": 0}}, **_VECTOR
)
HEAD_ROWS = Space("decode_step.head", defaults={80: {**_ROW, "tile": 8, "warps": 4}}, **_VECTOR)
# ``tile``: outputs per program; ``slices``: pieces of K processed side by side (1: four warps on
# one piece); ``piece``: bytes of a weight row per piece; ``stages``: one more than the pieces in
# flight. GPT-L on an H200, 256 codes: at 8 rows 174 ms with four slices and 228 with one, at 32
# rows 300 and 250. Within a class the setting does not depend on the number of rows, because an
# image must not depend on the batch that it is in.
_MATRIX = {
    "choices": {"tile": (16, 32, 64), "slices": (1, 4), "piece": (128, 256), "stages": (2, 3, 4)},
    # All of them: tile and stages too can make the pieces smaller, see `_depth`.
    "bits": ("tile", "slices", "piece", "stages"),
    # Either one tile per warp for four warps, or one tile for all four.
    "valid": lambda s: (s.tile == 64) == (s.slices == 1),
}
FEW = Space(
    "decode_step.few",
    defaults={80: {"tile": 16, "slices": 4, "piece": 128, "stages": 4}},
    **_MATRIX,
)
SOME = Space(
    "decode_step.some",
    defaults={80: {"tile": 64, "slices": 1, "piece": 256, "stages": 4}},
    **_MATRIX,
)
SPACES = QKV_ROWS, OUT_ROWS, GATE_ROWS, DOWN_ROWS, HEAD_ROWS, FEW, SOME


def unsupported_reason(
    code: Tensor, embedding: Tensor, weights: StepWeights, cache: KVCache, *rest: object,
    **options: object,
) -> str | None:  # fmt: skip
    """Why this cannot take the call, or None."""
    if embedding.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float32, float16 and bfloat16, not {embedding.dtype}"
    if weights.rotary is not None and weights.rotary.dtype != torch.float32:
        return f"it takes a float32 rotary table, not {weights.rotary.dtype}"
    conditions = [weights.condition, *(block.condition for block in weights.blocks)]
    conditions = {id(part): part for part in conditions if part is not None}
    # They are slices of one table.
    if any(part.stride()[1:] != (part.shape[2], 1) for part in conditions.values()):
        return "it takes conditions whose rows are contiguous"
    parts = [part for part in weights.tensors() if id(part) not in conditions]
    for layer in cache:
        parts.extend(layer)
    if not all(part is None or part.is_contiguous() for part in parts):
        return "it takes contiguous weights and caches"
    if embedding.shape[1] > 2**15:
        return f"it takes up to 32768 channels, not {embedding.shape[1]}"
    return None


def tuning_key(
    code: Tensor, embedding: Tensor, weights: StepWeights, cache: KVCache, *rest: object,
    **options: object,
) -> tuple[str, int]:  # fmt: skip
    """Kind and size under which a measurement of the whole op is stored; see `tuning`."""
    return f"{dtype_name(embedding)} C={embedding.shape[1]}", len(code)


def decode_step(
    code: Tensor, embedding: Tensor, weights: StepWeights, cache: KVCache,
    position: int | Tensor, length: int | Tensor, attend: Callable[..., Tensor],
) -> Tensor:  # fmt: skip
    """See `vfmtok_fast.ops.decode_step`; takes calls that `unsupported_reason` accepts."""
    if not isinstance(position, Tensor):
        position = torch.full((1,), position, dtype=torch.int64, device=code.device)
    x, eps = embedding.index_select(0, code), weights.eps
    if weights.condition is not None:
        x += weights.condition[:, 0]
    for block, layer in zip(weights.blocks, cache, strict=True):
        biases, condition = block.biases, block.condition
        before, gate, after, ffn_gate = (None,) * 4
        if condition is not None:
            before, gate, after, ffn_gate = (
                condition[:, 0:2], condition[:, 2], condition[:, 3:5], condition[:, 5]
            )  # fmt: skip
        q = _queries(
            x, block.attention_norm, block.qkv, weights.rotary, *layer, position, eps,
            biases.qkv, block.head_norms and list(block.head_norms), before,
        )  # fmt: skip
        mixed = attend(q, layer.keys, layer.values, length, **layer.scales)
        _add(x, mixed.flatten(1), block.out, True, biases.out, gate)
        gelu = block.up.shape[0] == block.down.shape[1]
        hidden = _hidden(x, block.ffn_norm, block.up, eps, gelu, biases.up, after)
        _add(x, hidden, block.down, False, biases.down, ffn_gate)
    condition = None if weights.condition is None else weights.condition[:, 1:]
    return _logits(x, weights.norm, weights.head, eps, weights.head_bias, condition)


def _product(
    epilogue: int, space: Space, x: Tensor, norm: Tensor | None, weight: Tensor, out: Tensor,
    eps: float = 0.0, bias: Tensor | None = None, gate: Tensor | None = None,
    rotary: Tensor | None = None, position: Tensor | None = None, keys: Tensor | None = None,
    values: Tensor | None = None,
) -> None:  # fmt: skip
    """Launch one product for up to 64 rows of x; only q, k and v need the last four arguments."""
    (rows, K), device, pairs = x.shape, x.device, epilogue < ADDED
    N = weight.shape[0] // 2 if pairs else weight.shape[0]
    H, T, D = (1, 2, 2) if keys is None else keys.shape[1:]
    what = {"EPILOGUE": epilogue, "H": H, "T": T, "D": D, **overlap(device)}
    after = bias, gate, 0 if gate is None else gate.stride(0)
    with on(device):
        if rows <= vector.MAX_ROWS:
            tile, warps, chunk, early = space.at(device, dtype_name(x), K)
            chunk = min(chunk, vector.CHUNK, triton.next_power_of_2(K))
            tile, warps, chunk = _in_registers(tile, warps, chunk, K, pairs, x)
            _vector[(triton.cdiv(N, tile),)](
                x, norm, weight, out, *after, rotary, position, keys, values, rows, N, eps,
                K=K, P=triton.next_power_of_2(rows), TILE=tile, CHUNK=chunk,
                EARLY=bool(early), **what, num_warps=warps,
            )  # fmt: skip
            return
        # One setting is measured for all layers of a step; the nearest K is used.
        few = rows <= matrix.FEW_ROWS
        setting = (FEW if few else SOME).at(device, dtype_name(x), K)
        padded = max(8, triton.next_power_of_2(rows))
        # For the most rows of the class, because the depth decides which columns a slice adds up.
        depth = _depth(*setting, matrix.FEW_ROWS if few else matrix.MAX_ROWS, pairs, x)
        _matrix[(triton.cdiv(N, setting.tile),)](
            x, weight, out, *after, rotary, position, keys, values, rows, N, K=K, P=padded,
            TILE=setting.tile, DEPTH=depth, SLICES=setting.slices, STAGES=setting.stages, **what,
            num_warps=4,
        )  # fmt: skip


def _in_registers(
    tile: int, warps: int, chunk: int, K: int, pairs: bool, x: Tensor
) -> tuple[int, int, int]:
    """The chosen tile, warps and chunk, reduced to fit into registers for any number of rows.

    A thread may hold 256 bytes of weights and, if K takes several chunks, 128 sums, counted for
    the largest number of rows. If the setting needs more, it gets fewer outputs, then more warps;
    then fewer columns at a time, down to 16-byte loads in half precision.
    """
    both = 2 if pairs else 1
    while tile * both * chunk * x.itemsize > 256 * 32 * warps:
        tile, warps = (tile // 2, warps) if tile > 1 else (tile, 2 * warps)
    sums = vector.MAX_ROWS * (both * tile + 1)
    while K > chunk and sums * chunk > 128 * 32 * warps and chunk > 256 * warps:
        chunk //= 2
    return tile, warps, chunk


def _depth(
    tile: int, slices: int, piece: int, stages: int, most: int, pairs: bool, x: Tensor
) -> int:
    """Columns per piece: as chosen, or as many as shared memory has room for with ``most`` rows."""
    depth, both = max(16, piece // x.itemsize), 2 if pairs else 1
    column = (both * tile + most) * x.itemsize
    # The smallest chips give a program 99 KiB; the sums of the slices pass through it at the end.
    room = 96 * 1024 - (both * slices * tile * most * 4 if slices > 1 else 0)
    while depth > 16 and (stages - 1) * slices * depth * column > room:
        depth //= 2
    return depth


def _ready(
    x: Tensor, norm: Tensor | None, eps: float, condition: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Up to 4 rows, x and its RMSNorm, which the product applies; else normalised x and None."""
    if condition is None and x.shape[0] <= vector.MAX_ROWS:
        return x, norm
    out, (rows, K) = torch.empty_like(x), x.shape
    what = {"K": K, "WIDTH": triton.next_power_of_2(K), **overlap(x.device), "num_warps": 4}
    with on(x.device):
        if condition is None:
            _rms_norm[(rows,)](x, norm, out, eps, **what)
        else:
            _modulated[(rows,)](x, condition, out, eps, condition.stride(0), **what)
    return out, None


@registered(
    "decode_step_queries(Tensor x, Tensor? norm, Tensor weight, Tensor? rotary, "
    "Tensor(a!) keys, Tensor(b!) values, Tensor(c!)? key_scale, Tensor(d!)? value_scale, "
    "Tensor position, float eps, Tensor? bias=None, Tensor[]? head_norms=None, "
    "Tensor? condition=None) -> Tensor",
    lambda x, norm, weight, rotary, keys, *rest: x.new_empty(
        x.shape[0], keys.shape[1], keys.shape[3]
    ),
)
def _queries(
    x: Tensor, norm: Tensor | None, weight: Tensor, rotary: Tensor | None, keys: Tensor,
    values: Tensor, key_scale: Tensor | None, value_scale: Tensor | None, position: Tensor,
    eps: float, bias: Tensor | None = None, head_norms: Sequence[Tensor] | None = None,
    condition: Tensor | None = None,
) -> Tensor:  # fmt: skip
    (rows, _), (_, H, T, D) = x.shape, keys.shape
    out = torch.empty(rows, H, D, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x, norm = _ready(x, norm, eps, condition)
    plain = bias is None and not head_norms and rotary is not None
    if rows <= matrix.MAX_ROWS and key_scale is None and plain:
        turned = rotary, position, keys, values
        _product(QKV, QKV_ROWS, x, norm, weight, out, eps, None, None, *turned)
        return out
    # A scale or a norm needs a whole head, which no program of the product holds.
    if rows <= matrix.MAX_ROWS:
        qkv = torch.empty(rows, 3 * H * D, dtype=x.dtype, device=x.device)
        _product(PLAIN, QKV_ROWS, x, norm, weight, qkv, eps, bias)
    else:
        qkv = F.linear(x, weight, bias)
    half = triton.next_power_of_2(D // 2)
    heads = max(1, min(triton.next_power_of_2(H), 256 // half))
    with on(x.device):
        _append[(rows, triton.cdiv(H, heads))](
            qkv, rotary, position, out, keys, values, key_scale, value_scale,
            *(head_norms or (None,) * 4), eps, H=H, T=T, D=D, HEADS=heads, HALF=half,
            **overlap(x.device), num_warps=2,
        )  # fmt: skip
    return out


@registered(
    "decode_step_add(Tensor(a!) x, Tensor y, Tensor weight, bool attention, Tensor? bias=None, "
    "Tensor? gate=None) -> ()"
)
def _add(
    x: Tensor, y: Tensor, weight: Tensor, attention: bool, bias: Tensor | None = None,
    gate: Tensor | None = None,
) -> None:  # fmt: skip
    """x += gate * (y @ weight.T + bias), for attention or the feed-forward layer."""
    if x.numel() == 0:
        return
    if x.shape[0] <= matrix.MAX_ROWS:
        space = OUT_ROWS if attention else DOWN_ROWS
        _product(ADDED, space, y, None, weight, x, bias=bias, gate=gate)
    elif bias is None and gate is None:
        torch.addmm(x, y, weight.T, out=x)
    else:
        y = F.linear(y, weight, bias)
        x += y if gate is None else y.mul_(gate)


@registered(
    "decode_step_hidden(Tensor x, Tensor? norm, Tensor weight, float eps, bool gelu=False, "
    "Tensor? bias=None, Tensor? condition=None) -> Tensor",
    lambda x, norm, weight, eps, gelu=False, *rest: x.new_empty(
        x.shape[0], weight.shape[0] // (1 if gelu else 2)
    ),
)
def _hidden(
    x: Tensor, norm: Tensor | None, weight: Tensor, eps: float, gelu: bool = False,
    bias: Tensor | None = None, condition: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """silu(gate) * up of the norm of x, or GELU."""
    if x.shape[0] > matrix.MAX_ROWS:
        x, _ = _ready(x, norm, eps, condition)
        return linear(x, weight, bias, "gelu" if gelu else "swiglu")
    width = weight.shape[0] // (1 if gelu else 2)
    out = torch.empty(x.shape[0], width, dtype=x.dtype, device=x.device)
    if out.numel() > 0:
        x, norm = _ready(x, norm, eps, condition)
        _product(GELU if gelu else GATED, GATE_ROWS, x, norm, weight, out, eps, bias)
    return out


@registered(
    "decode_step_logits(Tensor x, Tensor? norm, Tensor weight, float eps, Tensor? bias=None, "
    "Tensor? condition=None) -> Tensor",
    lambda x, norm, weight, *rest: x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32),
)
def _logits(
    x: Tensor, norm: Tensor | None, weight: Tensor, eps: float, bias: Tensor | None = None,
    condition: Tensor | None = None,
) -> Tensor:  # fmt: skip
    rows = x.shape[0]
    out = torch.empty(rows, weight.shape[0], dtype=torch.float32, device=x.device)
    if out.numel() == 0:
        return out
    x, norm = _ready(x, norm, eps, condition)
    if rows <= matrix.MAX_ROWS:
        _product(PLAIN, HEAD_ROWS, x, norm, weight, out, eps, bias)
        return out
    if x.is_cuda and x.dtype != torch.float32:
        out = torch.mm(x, weight.T, out_dtype=torch.float32)
    else:
        out = torch.mm(x, weight.T).float()
    return out if bias is None else out.add_(bias)
