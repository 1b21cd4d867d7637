"""The policy under torch.compile."""

from __future__ import annotations

import pytest
import torch

import vfmtok_fast as vf
from vfmtok_fast import ops
from vfmtok_fast.switch import FallbackError, FallbackWarning

Z, CODEBOOK = torch.eye(3), torch.eye(3).flip(0)
NEAREST = [2, 1, 0]
FAKE = -7  # The code that `fake_op` returns.


def took(op: str = "nearest_code") -> dict[str, int]:
    return vf.status().ops[op].calls


# Recompilations of a function that torch allows; timm's optimizers set it to a million.
LIMIT = 8


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=LIMIT):
        yield
    torch._dynamo.reset()


def compiled(**options):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    function = torch.compile(
        lambda z, codebook: ops.nearest_code(z, codebook) + 0, backend=backend, **options
    )
    return function, graphs


def test_flipping_the_policy_is_right_and_compiles_once_each(fake_op):
    function, graphs = compiled(fullgraph=True)
    # More switches than torch's limit on recompilations: equal policies share one graph.
    for _ in range(LIMIT + 2):
        assert function(Z, CODEBOOK).tolist() == NEAREST
        with vf.enable(ops="nearest_code"):
            assert function(Z, CODEBOOK).tolist() == [FAKE] * 3
    assert len(graphs) == 2
    assert took() == {"reference (compiled)": 1, "cpu (compiled)": 1}


def test_an_op_left_out_stays_on_its_reference(fake_op):
    function, _ = compiled(fullgraph=True)
    with vf.enable(ops="sample_token"):
        assert function(Z, CODEBOOK).tolist() == NEAREST
    with vf.enable():
        assert function(Z, CODEBOOK).tolist() == [FAKE] * 3


def test_a_fallback_is_warned_of_and_recorded(fake_op):
    fake_op.unsupported_reason = lambda z, *args, **kwargs: f"{z.shape[1]} is odd"
    function, _ = compiled(fullgraph=True)
    with vf.enable(), pytest.warns(FallbackWarning, match="cpu: 3 is odd"):
        assert function(Z, CODEBOOK).tolist() == NEAREST
    assert vf.status().ops["nearest_code"].fallbacks == {"cpu: 3 is odd": 1}


def test_strict_reaches_code_that_was_compiled_before(fake_op):
    fake_op.unsupported_reason = lambda *args, **kwargs: "never"
    function, _ = compiled()
    with vf.enable(), pytest.warns(FallbackWarning):
        function(Z, CODEBOOK)
    with vf.enable(strict=True), pytest.raises(FallbackError, match="cpu: never"):
        function(Z, CODEBOOK)


def test_the_second_call_compiles_nothing(fake_op):
    function, graphs = compiled(fullgraph=True)
    with vf.enable():
        function(Z, CODEBOOK)
        ops.nearest_code(Z, CODEBOOK)
        function(Z, CODEBOOK)
    assert len(graphs) == 1
    assert took("nearest_code") == {"cpu (compiled)": 1, "cpu": 1}


def small_gpt() -> vf.GPT:
    config = vf.GPTConfig(
        num_layers=2, num_heads=2, dim=16, vocab_size=11, block_size=4, num_classes=3,
        ffn_multiple_of=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = vf.GPT(config)
    torch.nn.init.normal_(model.head.weight)
    return model


@pytest.mark.parametrize("at", [1, torch.tensor([1])], ids=["int", "tensor"])
def test_a_step_compiles_as_the_cpu_one(at):
    model = small_gpt()
    weights, table = model.step_weights(), model.token_embedding.weight

    def step(code, cache):
        return ops.decode_step(code, table, weights, cache, at) + 1

    code, caches = torch.arange(2), [model.decoder(2).cache for _ in range(2)]
    for cache in caches:
        for layer in cache:
            layer.keys.fill_(0.5), layer.values.fill_(0.5)
    names = ["decode_step", "decode_attention"] if isinstance(at, int) else ["decode_step"]
    with vf.enable(names, strict=True):
        want = step(code, caches[0])
        got = torch.compile(step, backend="eager", fullgraph=True)(code, caches[1])
    assert torch.equal(got, want)
    for mine, theirs in zip(*caches, strict=True):
        assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)
    assert took("decode_step") == {"cpu": 1, "cpu (compiled)": 1}


def test_every_op_compiles_without_a_graph_break():
    ids = torch.arange(2)
    shapes = ((2, 2),)
    model = small_gpt()
    weights, table, keys = model.step_weights(), model.token_embedding.weight, model.decoder(2)

    def everything(x):
        cache = x.view(2, 2, 4, 4)
        a = ops.decode_attention(cache[:, :, 0], cache, cache, 3)
        b = ops.deformable_sample(
            x.view(2, 4, 2, 4), shapes, x.view(-1)[:4].view(1, 2, 1, 2) * 0,
            x.view(-1)[:32].view(2, 2, 2, 1, 2, 2), x.view(-1)[:16].view(2, 2, 2, 2),
        )  # fmt: skip
        logits = x.view(2, 32)
        c = ops.sample_token(
            logits, ids, 3, uncond_logits=-logits, cfg_scale=1.5, top_k=5, top_p=0.9
        )
        d = ops.decode_step(ids, table, weights, keys.cache, 0)
        rows, maps, four = x.view(16, 4), x.view(2, 4, 2, 4), x[:4]
        norm, conv = (four, four), (x.view(-1)[:36].view(4, 1, 3, 3).expand(4, 4, 3, 3), four)
        return (
            *(a, b, c, d, ops.nearest_code(rows, rows[:5])),
            *ops.add_norm(rows, rows, four, four, eps=1e-6),
            ops.linear(rows, rows[:3], activation="gelu"),
            ops.linear_cross_entropy(rows, rows[:5], ids.repeat(8)),
            ops.group_norm_silu(maps, *norm, 2),
            ops.residual_block(maps, norm, conv, norm, conv, num_groups=2),
            ops.upsample_conv(maps, *conv),
            ops.patch_embed(
                x[:48].view(1, 3, 4, 4), x[:3], x[3:6].abs(), x[:12].view(1, 3, 2, 2), x[:1]
            ),
        )

    x = torch.linspace(-1, 1, 64).sin()
    want = everything(x)
    got = torch.compile(everything, backend="eager", fullgraph=True)(x)
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)
    assert all("reference (compiled)" in took(op) for op in vf.status().ops)
