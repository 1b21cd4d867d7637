"""`tune` without a GPU: with a fake kernel, timer and clock, but real compilers."""

from __future__ import annotations

import contextlib
import json
import types
from pathlib import Path

import pytest
import torch

import vfmtok_fast as vf
from vfmtok_fast import cli, switch
from vfmtok_fast.generator import GPTConfig
from vfmtok_fast.reference.decode_attention import decode_attention as reference
from vfmtok_fast.tuner import calls, compile, oracles, run
from vfmtok_fast.tuner.calls import Call

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources

from vfmtok_fast.kernels import tuning

CPU = torch.device("cpu")
SIZES = {"B": 3, "H": 2, "G": 2, "T": 8, "D": 4, "length": 5}
CALL = Call("decode_attention", "three rows", "float32", SIZES)
SECOND = Call("decode_attention", "other heads", "float32", {**SIZES, "D": 8})


class FakeKernel(types.SimpleNamespace):
    """The reference of decode_attention, made wrong or failing for some settings."""

    def __init__(self, monkeypatch):
        monkeypatch.setattr(tuning.Space, "made", [])
        self.space = tuning.Space(
            "decode_attention.fake",
            {"rows": (1, 2, 3, 4), "warps": (4, 8)},
            {80: {"rows": 1, "warps": 4}},
        )
        self.SPACES = (self.space,)
        self.wrong: set = set()
        self.broken: set = set()
        self.took: list = []

    def tuning_key(self, q, k_cache, v_cache, length):
        return f"D={q.shape[2]}", k_cache.shape[2]

    def decode_attention(self, q, k_cache, v_cache, length):
        setting = self.space.at(q.device, *self.tuning_key(q, k_cache, v_cache, length))
        self.took.append(setting)
        if setting in self.broken:
            raise OutOfResources(200000, 101376, "shared memory")
        out = reference(q, k_cache, v_cache, length)
        return out * 1.001 if setting in self.wrong else out


@pytest.fixture
def fake(monkeypatch) -> FakeKernel:
    kernel = FakeKernel(monkeypatch)
    monkeypatch.setattr(switch, "kernel", lambda op: kernel)
    return kernel


@pytest.fixture
def tuner(fake, tmp_path) -> run.Tuner:
    """Times are 10 for the default, 10 - rows for any other setting, and 8 for the reference."""

    def timer(functions, rounds):
        times = []
        for function in functions:
            fake.took.clear()
            function()
            setting = fake.took[0] if fake.took else None
            default = fake.space.default(CPU)
            slow = 8 if setting is None else 10 if setting == default else 10 - setting.rows
            times.append(slow * 1e-6)
        return times

    return run.Tuner(
        CPU,
        timer,
        clock=lambda: 0.0,
        compiler=lambda jobs: ((job, "") for job in jobs),
        path=tmp_path / "tuned" / "card.json",
    )


def test_the_fastest_setting_is_kept_with_its_margin(fake, tuner):
    outcome = tuner.run([CALL], 10)
    (row,) = outcome.settings
    assert row == {"space": "decode_attention.fake", "kind": "D=4", "size": 8,
                   "take": {"rows": 4, "warps": 4}, "us": 6.0, "default_us": 10.0}  # fmt: skip
    (op,) = outcome.ops
    assert op == {"op": "decode_attention", "kind": "D=4", "size": 8, "us": 6.0,
                  "reference_us": 8.0}  # fmt: skip
    content = json.loads(tuner.path.read_text())
    assert content["settings"] == [row] and content["ops"] == [op]
    assert "1.67 x the default: rows=4, warps=4" in str(outcome)
    assert not outcome.failed and not outcome.not_reached


def test_where_the_reference_wins_the_outcome_says_so(fake, tuner):
    fake.broken = {s for s in fake.space.candidates() if s.rows > 1 or s.warps > 4}
    outcome = tuner.run([CALL], 10)
    assert outcome.ops[0]["us"] == 10.0 and not outcome.settings
    assert "enable() takes the reference" in str(outcome)


def test_a_wrong_setting_is_never_kept(fake, tuner):
    fake.wrong = {s for s in fake.space.candidates() if s.rows == 4}
    outcome = tuner.run([CALL], 10)
    assert outcome.settings[0]["take"]["rows"] == 3
    assert len(outcome.failed) == 2 and all("off by" in why for why in outcome.failed)


def test_a_setting_that_does_not_launch_or_compile_is_named(fake, tuner):
    fake.broken = {s for s in fake.space.candidates() if s.rows == 4}
    tuner.compiler = lambda jobs: ((j, "too large" if j[2]["rows"] == 3 else "") for j in jobs)
    outcome = tuner.run([CALL], 10)
    assert outcome.settings[0]["take"]["rows"] == 2
    assert sum("out of resource" in why for why in outcome.failed) == 2
    assert sum("too large" in why for why in outcome.failed) == 2


def test_a_gain_within_noise_changes_nothing(fake, tuner):
    tuner.timer = lambda functions, rounds: [1e-5] + [0.99e-5] * (len(functions) - 1)
    assert tuner.run([CALL], 10).settings[0]["take"] == {"rows": 1, "warps": 4}


def test_where_the_default_is_wrong_nothing_is_chosen(fake, tuner):
    fake.wrong = {fake.space.default(CPU)}
    outcome = tuner.run([CALL], 10)
    assert not outcome.settings and "off by" in outcome.failed[0]


def test_where_the_default_does_not_launch_the_run_goes_on(fake, tuner):
    def compiler(jobs):
        # Only now, because before this, launches that only compile show which spaces a call looks
        # up.
        fake.broken = {fake.space.default(CPU)} if jobs[0][0] == CALL else set()
        yield from ((job, "") for job in jobs)

    tuner.compiler = compiler
    outcome = tuner.run([CALL], 10)
    assert not outcome.settings and not outcome.ops and "out of resource" in outcome.failed[0]
    fake.broken = set()
    assert tuner.run([SECOND], 10).settings


def test_of_calls_that_a_table_cannot_tell_apart_the_first_decides(fake, tuner):
    other = Call("decode_attention", "less important", "float32", {**CALL.sizes, "B": 7})
    outcome = tuner.run([CALL, other], 10)
    assert len(outcome.ops) == 1


def test_graphs_of_old_settings_are_captured_anew(fake, tuner):
    before = switch.generation()
    tuner.run([CALL], 10)
    assert switch.generation() > before


def test_what_was_not_reached_in_time_is_named(fake, tuner):
    tuner.clock = lambda: 100.0 if tuner.path.exists() else 0.0
    outcome = tuner.run([CALL, SECOND], 10)
    assert [r["kind"] for r in outcome.settings] == ["D=4"]
    assert outcome.not_reached == [str(SECOND)] and str(SECOND) in str(outcome)


def test_an_interrupted_run_keeps_what_it_has(fake, tuner):
    whole = tuner.timer

    def interrupted(functions, rounds):
        if tuner.path.exists():
            raise KeyboardInterrupt
        return whole(functions, rounds)

    tuner.timer = interrupted
    with pytest.raises(KeyboardInterrupt):
        tuner.run([CALL, SECOND], 10)
    assert [r["kind"] for r in json.loads(tuner.path.read_text())["settings"]] == ["D=4"]
    tuner.timer = whole
    tuner.best.clear()
    tuner.run([SECOND], 10)
    rows = json.loads(tuner.path.read_text())["settings"]
    assert [r["kind"] for r in rows] == ["D=4", "D=8"]


def test_a_kind_is_measured_once(fake, tuner):
    outcome = tuner.run([CALL, CALL.__class__(**{**vars(CALL), "what": "again"})], 10)
    assert len(outcome.settings) == 1


def test_a_reference_that_does_not_fit_claims_nothing(fake, tuner):
    whole = tuner.timer

    def timer(functions, rounds):
        if rounds == run.MORE_TURNS and len(functions) == 2:
            raise torch.OutOfMemoryError("too large")
        return whole(functions, rounds)

    tuner.timer = timer
    outcome = tuner.run([CALL], 10)
    assert outcome.settings and not outcome.ops


def test_a_call_that_does_not_fit_ends_no_run(fake, tuner, monkeypatch):
    whole = run.oracles.oracle

    def oracle(call, args, kwargs):
        if call == CALL:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate much")
        return whole(call, args, kwargs)

    monkeypatch.setattr(run.oracles, "oracle", oracle)
    outcome = tuner.run([CALL, SECOND], 10)
    assert outcome.failed == [f"{CALL}: CUDA out of memory."]
    assert [row["kind"] for row in outcome.settings] == ["D=8"]
    assert json.loads(tuner.path.read_text())["settings"] == outcome.settings


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "GPU"),
        ({"models": "GPT-M"}, "unknown model 'GPT-M'"),
        ({"models": 3}, "models must be"),
        ({"ops": "conv"}, "unknown op"),
        ({"seconds": 0}, "seconds must be positive"),
        ({"device": "gpu0"}, "device must be a GPU such as cuda:0, got 'gpu0'"),
    ],
)
def test_wrong_arguments_are_said_in_one_line(arguments, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "device" in arguments)
    with pytest.raises((ValueError, TypeError), match=said) as error:
        vf.tune(**arguments)
    assert "\n" not in str(error.value) and str(error.value).startswith("tune: ")


def test_the_names_of_ops_may_come_from_an_iterator(monkeypatch):
    class Planned(types.SimpleNamespace):
        def run(self, todo, seconds, progress):
            return todo

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(run, "Tuner", lambda device, path: Planned())
    todo = vf.tune("GPT-B", ops=iter(["sample_token", "decode_step"]), device="cuda:0")
    assert {call.op for call in todo} == {"sample_token", "decode_step"}


def test_the_command_says_so_too(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune", "--models", "GPT-B", "--seconds", "5"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("models", ["all", ["all"]])
def test_all_models(models):
    tokenizer, generators = run._models(models)
    assert tokenizer == vf.VFMTokConfig()
    assert [name for name, _ in generators] == list(run.PRESETS)
    kinds = {call.what.split()[0] for call in calls.model_calls(tokenizer, generators)}
    assert {"GPT-B", "GPT-3B", "64"} <= kinds


def test_models_that_someone_holds():
    config = GPTConfig(num_layers=1, num_heads=2, dim=16, vocab_size=8, block_size=4)
    tokenizer, ((name, found),) = run._models(vf.GPT(config))
    assert tokenizer is None and found == config and name == "GPT 1x16"


STEP = {"layers": 1, "C": 16, "H": 2, "F": 24, "V": 64, "T": 4, "position": 2}
# A kind that no model's list holds.
SMALLER = [Call("decode_step", "int8 cache", "float32", {"rows": 4, **STEP, "int8_cache": True})]


def every_call() -> list[Call]:
    return calls.model_calls(vf.VFMTokConfig(), [("GPT-B", GPTConfig.preset("GPT-B"))])


@pytest.mark.parametrize("call", [*every_call(), *SMALLER], ids=str)
def test_calls_are_what_their_op_takes(call):
    """Small calls of each kind run, so the op's own validation checks their arguments."""
    small = {"B": 2, "N": 40, "K": 96, "Q": 6, "rows": 2, "V": 64, "T": 4, "H": 2, "G": 2}
    small["side"] = 6
    sizes = {name: small.get(name, size) for name, size in call.sizes.items()}
    sizes |= {name: 2 for name in ("length", "position") if name in sizes}
    sizes |= {"C": 16, "F": 24} if "F" in sizes else {}
    if "levels" in sizes:
        sizes["levels"] = ((3, 3),) * 2
    small_call = Call(call.op, call.what, "float32", sizes, call.backward)
    args, kwargs = small_call.arguments(CPU)
    op = getattr(vf.ops, call.op)
    kwargs.pop("attend", None)  # Only implementations take it.
    again, _ = small_call.arguments(CPU)
    assert all(torch.equal(a, b) for a, b in zip(args, again, strict=True) if torch.is_tensor(a))
    got = small_call.run(op, args, kwargs)
    assert all(tensor.isfinite().all() for tensor in got)
    # The oracle accepts the op's own results and rejects wrong ones.
    args, _ = small_call.arguments(CPU)
    check = oracles.oracle(small_call, args, kwargs)
    got = small_call.run(op, args, kwargs)
    assert check(got) == ""
    wrong = [(t + 1) % 4 if t.dtype == torch.int64 else t * 1.01 for t in got]
    assert check(wrong) != ""


def test_processes_compile_what_launches_need_and_say_what_fails(tmp_path, monkeypatch):
    """The compilers are real, and one gets a job that cannot be done."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    # Other code may print to the stream that carries the answers.
    (tmp_path / "sitecustomize.py").write_text("print('hello')")
    monkeypatch.syspath_prepend(tmp_path)
    call = next(c for c in every_call() if c.op == "decode_attention")
    good = {"values": 4096, "stages": 2, "warps": 4, "matrix": 1, "resident": 3}
    jobs = [(call, "decode_attention.half", good),
            (call, "decode_attention.half", {**good, "values": 1})]  # fmt: skip
    found = {json.dumps(job[2]): why for job, why in compile.compile_in_processes(jobs, 90)}
    assert found[json.dumps(good)] == ""
    assert "ValueError" in found[json.dumps({**good, "values": 1})]
    assert list(tmp_path.rglob("*.cubin"))


def test_processes_end_with_who_no_longer_listens(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    started = []
    popen = compile.subprocess.Popen

    def noted(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(compile.subprocess, "Popen", noted)
    call = next(c for c in every_call() if c.op == "sample_token")
    jobs = [(call, "sample_token.draw", {"chunk": 4096, "shares": n}) for n in (1, 2, 4)]
    running = compile.compile_in_processes(jobs, 90, processes=2)
    next(running)
    running.close()
    assert len(started) == 2 and all(process.poll() is not None for process in started)


@pytest.mark.slow
def test_a_real_kernel_in_the_interpreter(run_in_interpreter):
    run_in_interpreter(str(Path(__file__).parent / "ops" / "test_tuner_kernel.py"))
