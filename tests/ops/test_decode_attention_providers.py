"""decode_attention with flash-attn and xformers, replaced by test doubles.

The real libraries need a GPU and are **not exercised**, except by the tests marked `gpu` at the
end. A double has the documented signature, refuses what the library is documented to refuse, and
computes with our reference. So layouts, dtypes, lengths and refusals are tested, but none of the
libraries' arithmetic.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import types
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import vfmtok_fast as vf
from vfmtok_fast import switch
from vfmtok_fast.ops import decode_attention
from vfmtok_fast.reference.decode_attention import decode_attention as reference

LIBRARIES = ("flash_attn", "xformers")
OP = "decode_attention"


def require(condition: bool, what: str) -> None:
    """Raise RuntimeError like the libraries."""
    if not condition:
        raise RuntimeError(what)


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
    cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,
    return_softmax_lse=False,
):  # fmt: skip
    """Return [B, 1, H, D] for q [B, 1, H, D], caches [B, T, G, D], lengths int or int32 [B]."""
    B, steps, H, D = q.shape
    rows, capacity, heads, _ = k_cache.shape
    require(q.dtype in (torch.float16, torch.bfloat16), "only fp16 and bf16")
    require(rows == B > 0 and steps == 1 and H % heads == 0 and D <= 256, "shapes")
    require(k_cache.shape == v_cache.shape and k_cache.shape[3] == D, "shapes")
    require(D % 8 == 0 and k_cache.stride(3) == v_cache.stride(3) == 1, "would copy the caches")
    if isinstance(cache_seqlens, Tensor):
        require(cache_seqlens.dtype == torch.int32, "lengths must be int32")
        require(cache_seqlens.shape == (B,) and cache_seqlens.is_contiguous(), "lengths [B]")
    else:
        require(isinstance(cache_seqlens, int) and cache_seqlens <= capacity, "length")
    calls.append("flash_attn")
    k_cache, v_cache = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    return reference(q[:, 0], k_cache, v_cache, cache_seqlens)[:, None]


def memory_efficient_attention(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
):
    """Take [B, M, H, K] or [B, M, G, H, K] with axis 3 expanded; keys and values like queries."""
    require(query.dtype in (torch.float16, torch.bfloat16), "only fp16 and bf16 here")
    require(key.shape == value.shape and key.shape[2:] == query.shape[2:], "never broadcasts")
    require(key.shape[0] == query.shape[0] > 0 and query.shape[1] == 1, "shapes")
    require(query.shape[-1] % 8 == 0 and key.stride(-1) == value.stride(-1) == 1, "alignment")
    if query.ndim == 5:
        require(key.stride(3) == 0 and value.stride(3) == 0, "expanded, not copied")
        key, value = key[:, :, :, 0], value[:, :, :, 0]
    calls.append("xformers")
    mixed = reference(
        query[:, 0].flatten(1, -2), key.transpose(1, 2), value.transpose(1, 2), key.shape[1]
    )
    return mixed.view(query.shape)


DOUBLES = {
    "flash_attn": {"flash_attn": {"flash_attn_with_kvcache": flash_attn_with_kvcache}},
    "xformers": {
        "xformers": {},
        "xformers.ops": {"memory_efficient_attention": memory_efficient_attention},
    },
}
calls: list[str] = []


@pytest.fixture(autouse=True)
def no_library(monkeypatch):
    """Neither library is installed, both accept a CPU as a GPU, and Triton is disabled."""
    for candidate in switch._registry[OP].candidates:
        if candidate.library:
            monkeypatch.setattr(candidate, "module", None)
            monkeypatch.setattr(candidate, "note", "")
            monkeypatch.setattr(candidate, "broken", False)
            monkeypatch.delitem(sys.modules, candidate.path, raising=False)
            monkeypatch.setitem(sys.modules, candidate.library, None)
    monkeypatch.setattr(switch.Implementation, "serves", lambda self, device: self.name != "triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    calls.clear()
    yield
    for candidate in switch._registry[OP].candidates:
        if candidate.library:
            sys.modules.pop(candidate.path, None)


@pytest.fixture
def install(monkeypatch):
    """``install("flash_attn")`` puts a double in the library's place."""

    def put(*libraries: str) -> None:
        for library in libraries:
            for name, functions in DOUBLES[library].items():
                module = types.ModuleType(name)
                module.__spec__ = ModuleSpec(name, None, is_package=True)
                module.__path__ = []
                vars(module).update(functions)
                monkeypatch.setitem(sys.modules, name, module)

    return put


def make(B=3, H=4, G=4, T=20, D=64, dtype=torch.float16) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = ((B, H, D), (B, G, T, D), (B, G, T, D))
    q, k, v = (torch.randn(shape, generator=draw).to(dtype) for shape in shapes)
    return q, k, v


def took() -> dict[str, int]:
    return vf.status().ops[OP].calls


LENGTHS = [7, torch.tensor(7), torch.tensor([[7]]), torch.tensor([7, 20, 1], dtype=torch.int16)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("H", "G", "D"), [(4, 4, 64), (6, 2, 80), (4, 1, 8), (2, 2, 256)])
@pytest.mark.parametrize("length", LENGTHS, ids=["int", "one", "ones", "rows"])
def test_flash_attn_gets_what_it_documents(length, H, G, D, dtype, install):
    install("flash_attn")
    q, k, v = make(H=H, G=G, D=D, dtype=dtype)
    with vf.enable(OP, strict=True):
        got = decode_attention(q, k, v, length)
    # The first call is the trial.
    assert calls == ["flash_attn"] * 2 and took() == {"flash_attn": 1}
    assert got.shape == q.shape and got.dtype == dtype
    assert torch.equal(got, reference(q, k, v, length))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("H", "G", "D"), [(4, 4, 64), (6, 2, 80), (4, 1, 8), (2, 2, 256)])
def test_xformers_gets_what_it_documents(H, G, D, dtype, install):
    install("xformers")
    q, k, v = make(H=H, G=G, D=D, dtype=dtype)
    k[:, :, 7:] = v[:, :, 7:] = float("nan")
    with vf.enable(OP, strict=True):
        got = decode_attention(q, k, v, 7)
    assert calls == ["xformers"] * 2 and took() == {"xformers": 1}
    assert got.shape == q.shape and got.dtype == dtype
    assert torch.equal(got, reference(q, k, v, 7))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda q, k, v: (q.float(), k.float(), v.float()), "not torch.float32"),
        (lambda q, k, v: (q.double(), k.double(), v.double()), "not torch.float64"),
        (lambda q, k, v: (q[..., :60], k[..., :60], v[..., :60]), "multiples of 8, not 60"),
        (lambda q, k, v: (q[..., :4], k[..., :4], v[..., :4]), "multiples of 8, not 4"),
        (lambda q, k, v: tuple(torch.cat([x] * 5, -1) for x in (q, k, v)), "8 to 256.* not 320"),
        (lambda q, k, v: (q[:0], k[:0], v[:0]), "at least one row"),
        (lambda q, k, v: (q[..., ::2], k[..., ::2], v[..., ::2]), "last stride is 1"),
    ],
)
def test_refusals(library, change, reason, install):
    install(library)
    arguments = change(*make())
    with (
        vf.enable(OP, strict=True),
        pytest.raises(switch.FallbackError, match=f"{library}: .*{reason}"),
    ):
        decode_attention(*arguments, 7)
    with vf.enable(OP), pytest.warns(switch.FallbackWarning, match=f"{library}: .*{reason}"):
        decode_attention(*arguments, 7)
    assert not calls and took() == {"cpu": 1}


@pytest.mark.parametrize("library", LIBRARIES)
def test_refuses_an_old_gpu_and_torch_compile(library, install, monkeypatch):
    install(library)
    q, k, v = make()
    module = importlib.import_module(f"vfmtok_fast.providers.{OP}_{library}")
    assert module.unsupported_reason(q, k, v, 7) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0" in module.unsupported_reason(q, k, v, 7)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert "torch.compile" in module.unsupported_reason(q, k, v, 7)


def test_xformers_refuses_lengths_on_the_device_and_flash_attn_gradients(install):
    install(*LIBRARIES)
    q, k, v = make()
    xformers, flash_attn = (
        importlib.import_module(f"vfmtok_fast.providers.{OP}_{library}")
        for library in ("xformers", "flash_attn")
    )
    assert "as an int" in xformers.unsupported_reason(q, k, v, torch.tensor(7))
    assert "no backward" in flash_attn.unsupported_reason(q.requires_grad_(), k, v, 7)
    with torch.no_grad():
        assert flash_attn.unsupported_reason(q, k, v, 7) is None


def test_the_order_and_what_is_said(install):
    """The order is flash-attn, xformers, torch; a library that is not installed is no fallback."""
    q, k, v = make()
    missing = {"flash_attn is not installed", "xformers is not installed"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with vf.enable(OP, strict=True):
            decode_attention(q, k, v, 7)
            assert set(vf.status().ops[OP].notes) >= missing
            assert not {*LIBRARIES} & {*vf.status().ops[OP].implementations}
            assert took() == {"cpu": 1}
        assert switch.forecast(OP, "cuda") == (
            "cpu, where it can take the call; flash_attn is not installed; "
            "xformers is not installed"
        )
        install("xformers")
        with vf.enable(OP, strict=True):
            decode_attention(q, k, v, 7)
            assert took() == {"xformers": 1}
        install("flash_attn")
        with vf.enable(OP, strict=True):
            decode_attention(q, k, v, 7)
            status = vf.status()
    assert took() == {"flash_attn": 1}
    assert not missing & set(status.ops[OP].notes) and not status.ops[OP].fallbacks
    names = [name for name in status.ops[OP].implementations if name != "triton"]
    assert names == ["reference", "flash_attn", "xformers", "cpu"]
    assert switch.forecast(OP, "cuda") == (
        "flash_attn, else xformers, else cpu, where it can take the call"
    )


def test_a_library_that_cannot_be_imported_says_why(install):
    """A library that is present but unusable, such as one built for another torch, says why."""
    install("flash_attn")
    del sys.modules["flash_attn"].flash_attn_with_kvcache
    with vf.enable(OP, strict=True):
        decode_attention(*make(), 7)
        (note,) = (n for n in vf.status().ops[OP].notes if n.startswith("its flash_attn"))
    assert "could not be imported (cannot import name 'flash_attn_with_kvcache'" in note
    assert took() == {"cpu": 1}


EXTENSION = "libcudart.so.12: cannot open shared object file"


@pytest.mark.parametrize("error", ["OSError", "ImportError", "RuntimeError", "AttributeError"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_whose_extension_cannot_be_loaded(library, error, tmp_path, monkeypatch):
    """A package on disk whose import raises is tried once, however often the op is enabled."""
    package = tmp_path / library
    package.mkdir()
    (package / "__init__.py").write_text(
        f"from pathlib import Path\nwith Path({str(tmp_path / 'tried')!r}).open('a') as log:\n"
        f"    log.write('x')\nraise {error}({EXTENSION!r} + chr(10) + 'built for another torch')\n"
    )
    monkeypatch.delitem(sys.modules, library)
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(2):
        with vf.enable(OP, strict=True):
            decode_attention(*make(), 7)
            assert took() == {"cpu": 1}
            (note,) = (x for x in vf.status().ops[OP].notes if x.startswith(f"its {library}"))
    assert f"{EXTENSION} built for another torch" in note and "\n" not in note
    assert note in switch.forecast(OP, "cuda")
    assert (tmp_path / "tried").read_text() == "x"


def break_it(monkeypatch, library: str, how: Callable) -> list[torch.Size]:
    """Replace the library's function by ``how``; return the list of shapes it is called with."""
    asked = []
    owner, name = {
        "flash_attn": ("flash_attn", "flash_attn_with_kvcache"),
        "xformers": ("xformers.ops", "memory_efficient_attention"),
    }[library]

    def broken(q: Tensor, *args, **kwargs) -> Tensor:
        asked.append(q.shape)
        return how(q)

    monkeypatch.setattr(sys.modules[owner], name, broken)
    return asked


def no_operator(q: Tensor) -> Tensor:
    raise NotImplementedError(
        "No operator found for `memory_efficient_attention_forward` with inputs:\n"
        "     query       : shape=(1, 1, 2, 64) (torch.float16)\n"
        "`cutlassF-pt` is not supported because:\n    xFormers wasn't build with CUDA support"
    )


def no_image(q: Tensor) -> Tensor:
    raise RuntimeError("CUDA error: no kernel image is available for execution on the device")


BROKEN = {
    no_operator: r"failed \(NotImplementedError: No op.* \.\.\. xFormers wasn't build with CUDA",
    no_image: r"failed \(RuntimeError: CUDA error: no kernel image is available",
    lambda q: q.new_zeros(q.shape): "gave a wrong result",
    lambda q: q.new_full(q.shape, float("nan")): "gave a wrong result",
}


@pytest.mark.parametrize(("how", "why"), BROKEN.items(), ids=["built", "image", "zeros", "nan"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_that_is_installed_and_does_not_work(library, how, why, install, monkeypatch):
    """This is found before the first call goes through, and reported once in every place."""
    install(library)
    asked = break_it(monkeypatch, library, how)
    q, k, v = make()
    with vf.enable(OP):
        with pytest.warns(switch.FallbackWarning, match=f"{library}: .*{why}"):
            got = decode_attention(q, k, v, 7)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(3):
                decode_attention(q, k, v, 7)
        status = vf.status().ops[OP]
    assert len(asked) == 1, "once for this kind of call"
    assert torch.allclose(got.float(), reference(q, k, v, 7).float(), atol=2e-3)
    assert took() == {"cpu": 4}
    (reason,) = status.fallbacks
    assert re.search(why, reason) and reason in status.notes and "\n" not in reason
    assert reason in switch.forecast(OP, "cpu")
    with vf.enable(OP, strict=True), pytest.raises(switch.FallbackError, match=why):
        decode_attention(q, k, v, 7)
    # Another head dim or dtype is another kernel of the library, so it has its own trial.
    with vf.enable(OP):
        decode_attention(q[..., :8], k[..., :8], v[..., :8], 7)
    assert len(asked) == 2


def test_what_doctor_says_of_it(install, monkeypatch):
    """The forecast runs the trial, so no call has to come first."""
    install(*LIBRARIES)
    break_it(monkeypatch, "xformers", no_operator)
    text = switch.forecast(OP, "cpu")
    assert text.startswith("flash_attn, else cpu, where it can take the call; xformers: it was")
    assert "xFormers wasn't build with CUDA support" in text and "\n" not in text


def test_a_trial_is_not_made_where_it_would_do_harm(install, monkeypatch):
    """No trial runs during graph capture, and one that runs out of memory proves nothing."""
    install("flash_attn")
    q, k, v = make()
    module = importlib.import_module(f"vfmtok_fast.providers.{OP}_flash_attn")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    assert "before this capture" in module.unsupported_reason(q, k, v, 7)
    assert not calls
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert module.unsupported_reason(q, k, v, 7) is None and calls == ["flash_attn"]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert module.unsupported_reason(q, k, v, 7) is None

    def full(q: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(module.trial, "attend", lambda q, *rest: full(q))
    with pytest.raises(torch.OutOfMemoryError):
        module.unsupported_reason(q.bfloat16(), k, v, 7)
    assert not module.trial.failures()
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (q, k, v)]
        assert "not FakeTensor" in module.unsupported_reason(*fakes, 7)


def test_torch_compile_neither_breaks_nor_compiles_twice(install, monkeypatch):
    """torch.compile never uses a provider, so a later trial does not change the compiled code."""
    install("xformers")
    break_it(monkeypatch, "xformers", no_operator)
    q, k, v = make()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(decode_attention, backend=backend, fullgraph=True)
    with vf.enable(OP), warnings.catch_warnings():
        warnings.simplefilter("ignore", switch.FallbackWarning)
        want = compiled(q, k, v, 7)
        decode_attention(q, k, v, 7)
        assert torch.equal(compiled(q, k, v, 7), want)
    torch._dynamo.reset()
    assert len(graphs) == 1 and vf.status().ops[OP].calls["cpu (compiled)"] == 1


def test_on_a_cpu_they_are_not_meant(install, monkeypatch):
    monkeypatch.undo()
    install(*LIBRARIES)
    with vf.enable(OP, strict=True):
        decode_attention(*make(), 7)
    assert took() == {"cpu": 1} and not calls


@pytest.fixture
def real(monkeypatch, no_library):
    """``real("flash_attn")``: the provider over the real library, if that is installed."""
    monkeypatch.undo()

    def load(library: str) -> types.ModuleType:
        pytest.importorskip(library)
        return importlib.import_module(f"vfmtok_fast.providers.{OP}_{library}")

    return load


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("H", "G", "D"), [(4, 4, 64), (8, 2, 128), (4, 4, 80)])
@pytest.mark.parametrize("library", LIBRARIES)
def test_the_real_library(library, H, G, D, dtype, real, check_error):
    """Skipped if the library is not installed; dead positions hold NaN."""
    module = real(library)
    q, k, v = make(H=H, G=G, T=256, D=D, dtype=dtype)
    for length in (1, 77, 256, torch.tensor([77]), torch.tensor([5, 256, 64])):
        lengths = (length if isinstance(length, Tensor) else torch.tensor([length])).expand(3)
        dead = torch.arange(256) >= lengths[:, None]
        keys, values = (x.masked_fill(dead[:, None, :, None], float("nan")).cuda() for x in (k, v))
        on_device = length.cuda() if isinstance(length, Tensor) else length
        if module.unsupported_reason(q.cuda(), keys, values, on_device) is None:
            got = module.decode_attention(q.cuda(), keys, values, on_device)
            truth = reference(q.double(), k.double(), v.double(), lengths)
            check_error(got.cpu(), truth, reference(q, k, v, lengths))
        elif not module.trial.failures():  # Otherwise it is installed but cannot run here.
            assert library == "xformers" and isinstance(length, Tensor)


@pytest.mark.gpu
def test_the_cpu_one_on_a_gpu_takes_an_int_length_only(check_error, monkeypatch):
    monkeypatch.undo()
    from vfmtok_fast.cpu import decode_attention as cpu

    q, k, v = make(D=100)
    k[:, :, 7:] = v[:, :, 7:] = float("nan")
    arguments = [x.cuda() for x in (q, k, v)]
    assert cpu.unsupported_reason(*arguments, torch.tensor([7]).cuda()) is not None
    assert cpu.unsupported_reason(*arguments, 7) is None
    truth = reference(q.double(), k.double(), v.double(), 7)
    check_error(cpu.decode_attention(*arguments, 7).cpu(), truth, reference(q, k, v, 7))
