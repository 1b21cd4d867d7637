"""Code captured in a CUDA graph must neither wait for the device nor copy pageable memory.

The tests check all ops in every implementation, the tokenizer, training steps of both models and
decoding steps, without a GPU. Tensors are torch's meta tensors, which have shapes but no values,
and claim to be on a GPU. A dispatch mode sees every operation on them, including those of the
backward pass and of our kernels' launchers. (torch's own fake tensors on "cuda" have no backward
pass without a GPU.)
"""

from __future__ import annotations

import contextlib
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import vfmtok_fast as vf
from vfmtok_fast import GPT, RAR, BackboneConfig, GPTConfig, VFMTok, VFMTokConfig, ops, switch
from vfmtok_fast.decoding import (
    Biases,
    BlockWeights,
    HeadNorms,
    KVCache,
    LayerCache,
    StepWeights,
)
from vfmtok_fast.generator import Decoder, Sampling
from vfmtok_fast.kernels import tuning

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter runs kernels"
)
HERE = Path(__file__).resolve()
ROOT = HERE.parents[1]
GPU, META = torch.device("cuda", 0), torch.device("meta")
# The host reads their results or a state; these are in addition to those that torch tags.
WAITS = {"multinomial", "_unique2", "unique_dim", "unique_consecutive", "histc", "randperm"}
TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# They copy a number that is on the host as a tensor, which other ops take as an argument.
COPIES_NUMBERS = {"where", "index", "index_put", "index_put_", "copy_", "_to_copy"}


class WouldBreakCapture(AssertionError):
    """An operation that fails while a CUDA graph is captured."""


class OnGpu(Tensor):
    """A meta tensor that claims to be on a GPU, except to torch's own rules for meta tensors."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    honest = False
    device = property(lambda self: META if OnGpu.honest else GPU)
    is_cuda = property(lambda self: not OnGpu.honest)
    is_meta = property(lambda self: OnGpu.honest)

    # For a meta tensor, these do not even create a tensor from the data.
    def new_tensor(self, data: object, **options: object) -> Tensor:
        raise WouldBreakCapture(f"new_tensor: it copies {data} from pageable memory, at {blame()}")

    def __getitem__(self, index: object) -> Tensor:
        refuse_lists(index)
        return super().__getitem__(index)

    def __setitem__(self, index: object, value: object) -> None:
        refuse_lists(index)
        super().__setitem__(index, value)


def _refusing(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap torch.tensor or torch.as_tensor to refuse copies; both ask for a driver first."""

    def made(data: object, *args: object, device: object = None, **options: object) -> Tensor:
        if isinstance(data, OnGpu) and make.__name__ == "as_tensor":
            return data.to(**options)
        if device is not None and torch.device(device).type == "cuda":
            raise WouldBreakCapture(
                f"{make.__name__}: it copies {data} from pageable memory, at {blame()}"
            )
        return make(data, *args, device=device, **options)

    return made


def refuse_lists(index: object) -> None:
    """Refuse a list as an index, because it becomes a tensor that is copied."""
    parts = index if isinstance(index, tuple) else (index,)
    if any(isinstance(part, list) for part in parts):
        raise WouldBreakCapture(f"index {index}: it copies from pageable memory, at {blame()}")


def on_gpu(tensor: Tensor) -> Tensor:
    """Return ``tensor`` without its values."""
    tensor = tensor if tensor.device == META else torch.empty_like(tensor, device=META)
    return Tensor._make_subclass(OnGpu, tensor, tensor.requires_grad)


class Watch(TorchDispatchMode):
    """Raises `WouldBreakCapture`, which names the responsible line of this repository."""

    def __init__(self):
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func._schema.name.split("::")[1]
        self.seen.add(name)
        if func.namespace == "vfmtok_fast":
            # Run what runs on a device: the launcher, not the rule for its result's shape.
            with self:
                keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
                return func.redispatch(keys, *args, **kwargs)
        if why := objection(func, name, args, kwargs):
            raise WouldBreakCapture(f"{func}: {why}, at {blame()}")
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = META
        kwargs.pop("pin_memory", None)
        OnGpu.honest = True
        try:
            return tree_map(_marked, func(*args, **kwargs))
        finally:
            OnGpu.honest = False


def _marked(value: object) -> object:
    fresh = type(value) is Tensor and value.device == META
    return Tensor._make_subclass(OnGpu, value) if fresh else value


def objection(func, name: str, args: tuple, kwargs: dict) -> str | None:
    """Return why ``func`` cannot be captured, or None."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    to = kwargs.get("device")
    to = None if to is None else torch.device(to).type
    # Where C++ moves a tensor to another tensor's device, that device shows as "meta".
    there = to in ("cuda", "meta") or any(x.device.type == "cuda" for x in tensors)
    if not there:
        return None
    if name in WAITS or (name != "index" and TAGS & {*func.tags}):
        return "the host must wait for its result"
    if to == "cpu" and tensors:
        return "it copies to the host"
    if name in ("index", "index_put", "index_put_"):
        marks = (torch.bool, torch.uint8)
        if any(isinstance(x, Tensor) and x.dtype in marks for x in args[1]):
            return "the host must wait for the number of marked elements"
    if name.endswith("_like") or name.startswith("new_"):
        return None  # Only the shape of their tensor matters.
    for x in tensors:
        if x.device.type == "cpu" and (x.ndim > 0 or name in COPIES_NUMBERS):
            return f"it copies {tuple(x.shape)} from pageable memory of the host"
    return None


def blame() -> str:
    """Return the innermost line of this repository outside the checking code."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename).resolve()
        ours = ROOT in path.parents and ".venv" not in path.parts
        if ours and (path != HERE or frame.name.startswith("test_")):
            return f"{path.relative_to(ROOT)}:{frame.lineno} ({frame.line})"
    return "no line of this repository"


@contextlib.contextmanager
def capturing(launched: Callable[[str], object] = lambda name: None) -> Iterator[Watch]:
    """Run the body as if a graph were captured on a GPU of compute capability 9.0.

    Create its tensors with `on_gpu` or `moved`, before or inside. Triton kernels do not run;
    ``launched`` is called with their names.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        patch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
        patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        for name in ("tensor", "as_tensor"):
            patch.setattr(torch, name, _refusing(getattr(torch, name)))
        with contextlib.suppress(ImportError):
            from triton.runtime.jit import JITFunction

            def run(self: JITFunction, *args: object, **options: object) -> None:
                launched(self.__name__)

            patch.setattr(JITFunction, "run", run)
        with tuning.pretend(90), Watch() as watch:
            yield watch


def moved(module: nn.Module) -> nn.Module:
    """Return the module with its parameters and buffers `on_gpu`."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                part._parameters[name] = on_gpu(parameter.data).requires_grad_(
                    parameter.requires_grad
                )
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = on_gpu(buffer)
    return module


def floats(*shape: int, dtype: torch.dtype = torch.float32, learns: bool = False) -> Tensor:
    return on_gpu(torch.empty(*shape, dtype=dtype, device=META)).requires_grad_(learns)


def integers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return on_gpu(torch.empty(*shape, dtype=dtype, device=META))


def marked() -> Tensor:
    return integers(3, dtype=torch.bool)


BREAKS = {
    "new_tensor": lambda x: x.new_tensor([1.0, 2.0]),
    "tensor": lambda x: torch.tensor([1.0], device=x.device),
    "as_tensor": lambda x: torch.as_tensor(3, device=x.device),
    "to the device": lambda x: torch.zeros(3).to(x.device),
    "a number to the device": lambda x: torch.tensor(3.0).to(x.device),
    "copy_": lambda x: x.copy_(torch.zeros(3)),
    "cpu": lambda x: x.cpu(),
    "item": lambda x: x[0].item(),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool(x.isnan().any()),
    "if": lambda x: 1 if x.sum() > 0 else 0,
    "tolist": lambda x: x.tolist(),
    "equal": torch.equal,
    "nonzero": lambda x: x.nonzero(),
    "masked_select": lambda x: x.masked_select(x > 0),
    "mask as an index": lambda x: x[x > 0],
    "assignment by a mask": lambda x: x.__setitem__(marked(), 1.0),
    "list as an index": lambda x: x[[0, 2]],
    "assignment by a list": lambda x: x.__setitem__([0, 2], 1.0),
    "index on the host": lambda x: x[torch.tensor([0, 2])],
    "unique": torch.unique,
    "multinomial": lambda x: x.multinomial(1),
    "repeat_interleave": lambda x: torch.repeat_interleave(integers(3)),
    "where with a number on the host": lambda x: torch.where(x > 0, x, torch.tensor(0.0)),
    "backward pass": lambda x: CopiesBackward.apply(x.requires_grad_()).sum().backward(),
}


class CopiesBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * torch.ones(3).to(grad.device)


@pytest.mark.parametrize("name", BREAKS)
def test_the_look_finds(name):
    x = floats(3)
    with capturing(), pytest.raises(WouldBreakCapture, match=r"test_captured\.py:\d+"):
        BREAKS[name](x) if name != "equal" else torch.equal(x, x)


def test_the_look_lets_pass():
    """No copy is needed for numbers as arguments, fills, or device tensors everywhere."""
    x = floats(3, learns=True)
    with capturing() as watch:
        at = torch.arange(3, device=x.device)
        y = torch.where(x > 0, x[at], 0.0) * torch.tensor(2.0) + x.new_full((3,), 3)
        y = y / torch.full((), 3.0, device=x.device) + torch.rand(3, device=x.device)
        y.masked_fill(y > 1, float("nan")).index_select(0, at).sum().backward()
        torch.zeros(3)[torch.tensor([0, 2])].tolist()  # All on the host.
    assert x.grad.shape == (3,) and "where" in watch.seen


def deformable(dtype: torch.dtype) -> None:
    levels = ((3, 2), (2, 3))
    arguments = [
        floats(2, 12, 2, 8, dtype=dtype, learns=True),
        floats(1, 5, 2, 2, dtype=dtype, learns=True),
        floats(2, 5, 2, 2, 3, 2, dtype=dtype, learns=True),
        floats(2, 5, 2, 6, dtype=dtype, learns=True),
    ]
    ops.deformable_sample(arguments[0], levels, *arguments[1:]).sum().backward()
    assert all(x.grad.shape == x.shape for x in arguments)


def nearest(dtype: torch.dtype) -> None:
    ops.nearest_code(floats(40, 12, dtype=dtype), floats(100, 12, dtype=dtype), return_score=True)


def attention(dtype: torch.dtype) -> None:
    q, cache = floats(2, 4, 16, dtype=dtype), floats(2, 2, 16, 16, dtype=dtype)
    for length in (3, integers(1), integers(2)):
        ops.decode_attention(q, cache, cache, length)


def sampling(dtype: torch.dtype) -> None:
    logits, ids = floats(3, 64, dtype=dtype), integers(3)
    for step in (5, integers(1)):
        for options in ({}, {"top_k": 5, "top_p": 0.9, "temperature": 0.7}, {"greedy": True}):
            ops.sample_token(logits, ids, step, **options)
        ops.sample_token(logits, ids, step, uncond_logits=logits, cfg_scale=1.5)


@torch.no_grad()
def step(dtype: torch.dtype) -> None:
    """A few rows, more, and many; full and int8 caches."""
    table, norm = floats(10, 32, dtype=dtype), floats(32, dtype=dtype)
    shapes = ((96, 32), (32, 32), (80, 32), (32, 40), (50, 32))
    qkv, out, gate_up, down, head = (floats(*shape, dtype=dtype) for shape in shapes)
    block = BlockWeights(norm, qkv, out, norm, gate_up, down)
    gpt = StepWeights((block,), norm, head, floats(6, 8, 2))
    biases = Biases(*(floats(size, dtype=dtype) for size in (96, 32, 40, 32)))
    norms = HeadNorms(*(floats(16, dtype=dtype) for _ in range(4)))
    for rows, rar in ((2, False), (8, False), (80, False), (2, True), (8, True), (80, True)):
        weights = gpt
        if rar:
            condition = floats(rows, 6, 32, dtype=dtype)
            block = BlockWeights(None, qkv, out, None, down.T.contiguous(), down, biases, norms)
            weights = StepWeights(
                (block._replace(condition=condition),), None, head, None,
                head_bias=floats(50, dtype=dtype), condition=condition[:, :3],
            )  # fmt: skip
        shape = (rows, 2, 6, 16)
        full = LayerCache(floats(*shape, dtype=dtype), floats(*shape, dtype=dtype))
        small = (integers(*shape, dtype=torch.int8) for _ in range(2))
        for layer in (full, LayerCache(*small, floats(*shape[:3]), floats(*shape[:3]))):
            for at in (3, integers(1)):
                ops.decode_step(integers(rows), table, weights, KVCache((layer,)), at)


def last(*shape: int, dtype: torch.dtype) -> Tensor:
    return floats(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def norm(dtype: torch.dtype) -> None:
    x, weight = last(2, 8, 4, 4, dtype=dtype).requires_grad_(), floats(8, dtype=dtype)
    ops.group_norm_silu(x, weight, weight, 4).sum().backward()


def block(dtype: torch.dtype) -> None:
    """Without and with gradients."""
    x, weight = last(2, 8, 4, 4, dtype=dtype), floats(8, dtype=dtype)
    pairs = [(weight, weight), (floats(8, 8, 3, 3, dtype=dtype), weight)] * 2
    with torch.no_grad():
        ops.residual_block(x, *pairs, num_groups=4)
    ops.residual_block(x.requires_grad_(), *pairs, num_groups=4).sum().backward()


def upsampling(dtype: torch.dtype) -> None:
    x, weight = last(2, 8, 4, 4, dtype=dtype), floats(6, 8, 3, 3, dtype=dtype).requires_grad_()
    with torch.no_grad():
        ops.upsample_conv(x, weight, floats(6, dtype=dtype))
    ops.upsample_conv(x, weight, floats(6, dtype=dtype)).sum().backward()


def residual(dtype: torch.dtype) -> None:
    x, branch = (floats(3, 5, 40, dtype=dtype, learns=True) for _ in range(2))
    weight, bias, scale = (floats(40, dtype=dtype, learns=True) for _ in range(3))
    for factor in (None, scale):
        total, normed = ops.add_norm(x, branch, weight, bias, scale=factor, eps=1e-6)
        (total + normed).sum().backward()
    with torch.no_grad():
        ops.add_norm(x.float(), branch, weight, bias, scale=scale, eps=1e-6, dtype=dtype)


def layer(dtype: torch.dtype) -> None:
    x, weight, bias = (floats(*s, dtype=dtype, learns=True) for s in ((3, 8), (5, 8), (5,)))
    for activation in ("gelu", "relu", None):
        ops.linear(x, weight, bias, activation=activation).sum().backward()
    ops.linear(x, weight[:4], bias[:4], activation="swiglu").sum().backward()
    with torch.no_grad():
        ops.linear(x, weight, bias, activation="gelu")
        ops.linear(x, weight[:4], bias[:4], activation="swiglu")


def cutting(dtype: torch.dtype) -> None:
    images, three = floats(2, 3, 8, 8), floats(3)
    with torch.no_grad():
        ops.patch_embed(
            images, three, three, floats(5, 3, 4, 4, dtype=dtype), floats(5, dtype=dtype)
        )


def head(dtype: torch.dtype) -> None:
    x, weight, bias = (floats(*s, dtype=dtype, learns=True) for s in ((9, 8), (5, 8), (5,)))
    for reduction in ("mean", "sum", "none"):
        loss = ops.linear_cross_entropy(
            x, weight, integers(9), bias=bias, label_smoothing=0.1, reduction=reduction
        )
        loss.sum().backward()


CALLS = {
    "add_norm": residual, "linear": layer, "linear_cross_entropy": head,
    "deformable_sample": deformable,
    "nearest_code": nearest, "decode_attention": attention,
    "sample_token": sampling, "decode_step": step, "group_norm_silu": norm,
    "residual_block": block, "upsample_conv": upsampling, "patch_embed": cutting,
}  # fmt: skip
# During capture, these CPU implementations leave some or all calls to the reference.
LEFT = {"nearest_code", "decode_attention"}
# Without Triton these ops have only their references.
UNCHANGED = {"group_norm_silu", "residual_block", "patch_embed"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("implementation", ["reference", "cpu", "triton"])
def test_ops(implementation, name, dtype, monkeypatch):
    """Every implementation can be captured: forward, and backward if there is one."""
    launched: list[str] = []
    if (implementation, name, dtype) == ("cpu", "linear", torch.bfloat16):
        from vfmtok_fast.cpu.linear import BFLOAT16

        if not BFLOAT16:
            pytest.skip("this processor has no instructions for bfloat16")
    if implementation == "triton":
        pytest.importorskip("triton")
    else:
        monkeypatch.setattr(
            switch.Implementation, "serves", lambda self, device: self.name == "cpu"
        )
    enabled = () if implementation == "reference" else name
    with vf.enable(enabled, strict=implementation == "triton"), warnings.catch_warnings():
        if name in LEFT or name in UNCHANGED:
            warnings.simplefilter("ignore", switch.FallbackWarning)
        else:
            warnings.simplefilter("error", switch.FallbackWarning)
        with capturing(launched.append):
            CALLS[name](dtype)
        took = set(vf.status().ops[name].calls)
    there = switch._registry[name].candidates[-1].module is not None
    if implementation == "cpu" and (not there or name == "nearest_code"):
        assert took == {"reference"}
    elif name in LEFT and implementation == "cpu":
        assert took == {"cpu", "reference"}
    else:
        assert took == {implementation}
    assert bool(launched) == (implementation == "triton")


def test_all_ops_are_looked_at():
    assert set(CALLS) == set(switch._registry)


def tokenizer(dtype: torch.dtype, **changes: object) -> VFMTok:
    config = {
        "image_size": 112, "dim": 64, "encoder_depth": 2, "decoder_depth": 2, "num_heads": 4,
        "decoder_mlp_dim": 96, "codebook_size": 100, "pixel_channels": 32,
        "pixel_channel_mult": (1, 1, 1, 1, 2), "decoder_dropout": 0.1,
        "backbone": BackboneConfig(dim=32, depth=4, num_heads=2, levels=(0, 1, 2, 3)),
    }  # fmt: skip
    return moved(VFMTok(VFMTokConfig(**(config | changes))).to(dtype))


policies = pytest.mark.parametrize("enabled", [(), None], ids=["reference", "enabled"])
types = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@policies
@types
def test_tokenizer(enabled, dtype):
    """Capturable are encode, encode_regions, sampling_points, decode, decode_to_uint8."""
    model, images = tokenizer(dtype).eval(), floats(2, 3, 112, 112, dtype=dtype)
    codes = integers(2, 256, dtype=torch.uint16)
    with vf.enable(enabled, strict=True), capturing():
        assert model.encode(images).shape == (2, 256)
        assert model.encode_regions(images)[0].shape == (2, 256, 12)
        assert model.sampling_points(images)[0].shape == (2, 256, 4, 4, 4, 2)
        assert model.decode(codes).shape == (2, 3, 112, 112)
        assert model.decode_to_uint8(codes, size=64).shape == (2, 64, 64, 3)


@policies
@types
@pytest.mark.parametrize("weight", [0.0, 0.1], ids=["", "entropy"])
def test_training_of_the_tokenizer(enabled, dtype, weight):
    model = tokenizer(dtype, entropy_weight=weight).train()
    images = floats(2, 3, 112, 112, dtype=dtype)
    with vf.enable(enabled, strict=True), capturing():
        out = model(images)
        loss = F.mse_loss(out.reconstruction, images)
        loss = loss + 1 - F.cosine_similarity(out.semantic, out.features, dim=-1).mean()
        (loss + out.codebook_loss + out.commit_loss + out.entropy_loss).backward()
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad.shape == p.shape for p in learning.values())


def generator(dtype: torch.dtype) -> GPT:
    config = GPTConfig(
        num_layers=2, num_heads=4, dim=64, vocab_size=32, block_size=16, num_classes=5,
        ffn_multiple_of=32,
    )  # fmt: skip
    model = GPT(config).to(dtype)
    return moved(model)


@policies
@types
def test_training_of_the_generator(enabled, dtype):
    model = generator(dtype).train()
    codes, classes = integers(2, 16, dtype=torch.uint16), integers(2)
    with vf.enable(enabled, strict=True), capturing():
        logits = model(codes, classes)
        F.cross_entropy(logits.flatten(0, 1), codes.long().flatten()).backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())


@policies
@types
@pytest.mark.parametrize("guided", [False, True], ids=["", "guided"])
@torch.no_grad()
def test_a_decoding_step(enabled, dtype, guided):
    """Everything between two codes, with the position on the host and on the device."""
    model = generator(dtype)
    settings = Sampling(cfg_scale=1.5 if guided else 1.0, top_k=7, top_p=0.9)
    with vf.enable(enabled, strict=True), capturing():
        decoder, weights = Decoder(model, 3, guided=guided), model.step_weights()
        classes, table = model.embeddings()
        decoder._advance(weights, decoder.cache, settings, classes, True, 0)
        decoder._advance(weights, decoder.cache, settings, classes, True, decoder.at)
        rest = (settings, table, True, decoder.at)
        decoder._advance(weights, decoder.cache, *rest)
        decoder._advance(weights, decoder.cache.first_rows(3), *rest)
    assert decoder.codes.is_cuda


@policies
@types
@pytest.mark.parametrize("guided", [False, True], ids=["", "guided"])
@torch.no_grad()
def test_a_decoding_step_of_a_rar(enabled, dtype, guided):
    """Its start, a code's place, and what is computed ahead."""
    model = RAR(
        {
            "num_layers": 2, "num_heads": 2, "dim": 32, "mlp_dim": 48, "vocab_size": 50,
            "block_size": 16, "num_classes": 10,
        }
    )  # fmt: skip
    model = moved(model.to(dtype).eval())
    settings = Sampling(cfg_scale=1.5 if guided else 1.0, cfg_power=2.0, temperature=1.02)
    with vf.enable(enabled, strict=True), capturing():
        decoder = Decoder(model, 3, guided=guided)
        weights, tables = model.step_weights(decoder.condition), model.embeddings()
        model.fill_condition(decoder.conditions, decoder.classes, 0)
        decoder._advance(weights, decoder.cache, settings, tables[0], False, 0)
        for table, draws in zip(tables, (False, True, True), strict=True):
            arguments = settings, table, draws, decoder.at
            decoder._advance(weights, decoder.cache, *arguments)
        decoder._advance(weights.first_rows(3), decoder.cache.first_rows(3), *arguments)
    assert decoder.codes.is_cuda and len(decoder.conditions) == 17


@torch.no_grad()
def test_steps_are_captured_on_the_device_of_the_model():
    """A graph's streams belong to the current device, which may differ from the model's."""
    model, inside, steps = generator(torch.float32), [], []

    @contextlib.contextmanager
    def current(tensor: Tensor) -> Iterator[None]:
        inside.append(tensor.device)
        yield
        inside.pop()

    with vf.enable(strict=True), capturing(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device_of", current)
        decoder = model.decoder(2)
        decoder._replay = lambda *step: steps.append(list(inside))
        decoder.generate(integers(2), image_ids=integers(2))
        ended = []
        patch.setattr(torch.cuda, "synchronize", ended.append)
        decoder.graphs = {(): None}
        decoder.end()
    assert steps == [[GPU]] * model.config.block_size
    assert ended == [GPU] and not inside and not decoder.graphs
