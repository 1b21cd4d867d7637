"""RAR against the authors' outputs for the same weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from ways import STEP, WAYS, enabled, on

import vfmtok_fast
from vfmtok_fast import RAR, RARConfig
from vfmtok_fast.checkpoint import RAR_NAMES, official_name

EPS = torch.finfo(torch.float32).eps


class Golden:
    """A golden case: the authors' weights in our model, and their outputs."""

    def __init__(self, case: str, golden, official_weights):
        self.want = golden(case)
        self.codes, self.classes = self.want["tokens"].long(), self.want["class"].long()
        self.model = RAR.from_official(official_weights(case))
        # By prefix of the golden names: the orders of the codes.
        self.orders = {"": None, "perm_": self.want["orders"].long()}

    def check_teacher_forcing(self, prefix: str) -> None:
        want, orders = self.want, self.orders[prefix]
        with torch.no_grad():
            logits = self.model(self.codes, self.classes, orders)
        bound = 32 * EPS * float(logits.abs().max())
        top = logits.gather(-1, want[f"{prefix}logits_top8_index"].long())
        assert (top - want[f"{prefix}logits_top8"]).abs().max() <= bound
        assert (logits.logsumexp(-1) - want[f"{prefix}logits_lse"]).abs().max() <= bound
        ordered = self.codes if orders is None else self.codes.gather(1, orders)
        loss = F.cross_entropy(logits.flatten(0, 1), ordered.flatten())
        assert abs(float(loss - want[f"{prefix}loss"])) <= bound

    def check_greedy(self, name: str, way: str) -> None:
        """The top two logits are never closer than 1e-3, so all codes must be equal."""
        scale, power = (float(part) for part in name.removeprefix("greedy_scale").split("_pow"))
        # The authors' 0 means none, which is our 1.
        settings = {"cfg_scale": scale, "cfg_power": power} if scale else {"cfg_power": power}
        vfmtok_fast.switch.record.clear()
        with on(self.model, way) as device, enabled(way):
            got = self.model.generate(self.classes.to(device), greedy=True, **settings)
        assert torch.equal(got.cpu(), self.want[name].long())
        assert all(set(vfmtok_fast.status().ops[op].calls) == {way} for op in STEP)


@pytest.fixture(scope="module")
def rar_small(golden, official_weights) -> Golden:
    return Golden("rar_small", golden, official_weights)


GREEDY = ("greedy_scale0.0_pow1.0", "greedy_scale16.0_pow2.75", "greedy_scale4.0_pow1.0")


@pytest.mark.parametrize("prefix", ["", "perm_"], ids=["raster", "permuted"])
def test_golden_small_teacher_forcing(rar_small, prefix):
    rar_small.check_teacher_forcing(prefix)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", GREEDY)
def test_golden_small_greedy(rar_small, name, way):
    rar_small.check_greedy(name, way)


def test_golden_small_has_no_other_setting(rar_small):
    assert {name for name in rar_small.want if name.startswith("greedy")} == set(GREEDY)


def test_golden_small_guided_logits(rar_small, monkeypatch):
    """The logits that are drawn from, at every step, not only the largest."""
    seen: list[Tensor] = []
    draw = vfmtok_fast.ops.sample_token

    def noted(logits: Tensor, *args, **options) -> Tensor:
        seen.append(logits.logsumexp(-1))
        assert options["uncond_logits"] is None
        return draw(logits, *args, **options)

    monkeypatch.setattr(vfmtok_fast.ops, "sample_token", noted)
    rar_small.model.generate(rar_small.classes, cfg_scale=4.0, cfg_power=1.0, greedy=True)
    want = rar_small.want["step_logits_lse"]
    assert (torch.stack(seen, dim=1) - want).abs().max() <= 64 * EPS * want.abs().max()


def test_golden_small_gradients(rar_small):
    """In float64 gradients differ by the float32 rounding of the authors' alone."""
    want, model = rar_small.want, rar_small.model.double()
    try:
        logits = model(rar_small.codes, rar_small.classes)
        F.cross_entropy(logits.flatten(0, 1), rar_small.codes.flatten()).backward()
        checked = 0
        for name, parameter in model.named_parameters():
            theirs = official_name(name, RAR_NAMES)
            if f"gradnorm/{theirs}" not in want:
                # A shift of all keys cancels in the softmax.
                assert theirs.endswith("attn.k_norm.bias")
                continue
            grad = parameter.grad.flatten()
            norm = float(want[f"gradnorm/{theirs}"])
            assert abs(float(grad.norm()) - norm) <= 1e-5 * norm, name
            head = grad[:: max(1, grad.numel() // 64)][:64]
            error = (head - want[f"gradhead/{theirs}"]).abs().max()
            assert float(error) <= 1e-4 * float(grad.abs().max()), name
            checked += 1
        assert checked == len(list(model.parameters())) - len(model.blocks)
    finally:
        model.zero_grad()
        model.float()


@pytest.fixture(scope="module")
def rar_l(golden, official_weights) -> Golden:
    case = Golden("rar_l", golden, official_weights)
    assert case.model.config == RARConfig()
    return case


@pytest.mark.slow
def test_golden_l_teacher_forcing(rar_l):
    rar_l.check_teacher_forcing("")


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS[1:])
def test_golden_l_steps(rar_l, way):
    """The first codes at full size; on a GPU the whole images."""
    if way == "triton":
        for name in GREEDY:
            rar_l.check_greedy(name, way)
        return
    steps, done = 6, RuntimeError("enough")

    def stop(codes: int, of: int) -> None:
        if codes >= steps * len(rar_l.classes):
            raise done

    with on(rar_l.model, way), enabled(way), pytest.raises(RuntimeError, match="enough"):
        decoder = rar_l.model.decoder(len(rar_l.classes), guided=True)
        decoder.generate(rar_l.classes, cfg_scale=16.0, cfg_power=2.75, greedy=True, progress=stop)
    want = rar_l.want["greedy_scale16.0_pow2.75"].long()
    assert torch.equal(decoder.codes[:, :steps], want[:, :steps])
