"""The policy: what is enabled when, what each call used, and what the user is told."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
import threading
import types
import warnings
from pathlib import Path

import pytest
import torch

import vfmtok_fast as vf
from vfmtok_fast import ops, switch
from vfmtok_fast.switch import FallbackError, FallbackWarning

NAMES = set(ops.__all__)
Z, CODEBOOK = torch.eye(3), torch.eye(3).flip(0)
NEAREST = [2, 1, 0]
FAKE = -7  # The code that `fake_op` returns.


def call() -> int:
    return int(ops.nearest_code(Z, CODEBOOK)[0])


def took(op: str = "nearest_code") -> dict[str, int]:
    return vf.status().ops[op].calls


def test_nothing_is_enabled_at_first(fake_op):
    assert call() == NEAREST[0]
    status = vf.status()
    assert not status.enabled and not status.strict
    assert set(status.ops) == NAMES
    assert took() == {"reference": 1}
    assert not status.ops["nearest_code"].fallbacks


def test_enable_acts_at_once_and_disable_undoes_it(fake_op):
    vf.enable()
    assert call() == FAKE
    assert vf.status().enabled and vf.status().ops["nearest_code"].enabled
    vf.disable()
    assert call() == NEAREST[0]
    assert took() == {"cpu": 1, "reference": 1}


def test_with_block_ends_the_policy(fake_op):
    with vf.enable() as handle:
        assert call() == FAKE
        assert "open" in repr(handle)
    assert call() == NEAREST[0]
    assert "closed" in repr(handle)


def test_with_block_ends_the_policy_after_an_exception(fake_op):
    with pytest.raises(KeyError), vf.enable():
        raise KeyError("inside")
    assert call() == NEAREST[0] and not vf.status().enabled


def test_the_innermost_policy_decides_alone(fake_op):
    with vf.enable(strict=True):
        with vf.enable(ops=["sample_token"]):
            assert call() == NEAREST[0]
            assert not vf.status().strict
            with vf.enable(ops="nearest_code"):
                assert call() == FAKE
            assert call() == NEAREST[0]
        assert call() == FAKE
        assert vf.status().strict
    assert call() == NEAREST[0]


def test_disable_inside_a_block_holds_inside_and_after(fake_op):
    with vf.enable(), vf.enable():
        vf.disable()
        assert call() == NEAREST[0]
    assert call() == NEAREST[0] and not vf.status().enabled


def test_enable_after_disable_outlives_an_older_block(fake_op):
    with vf.enable():
        vf.disable()
        vf.enable()
    assert call() == FAKE


def test_handles_close_in_any_order_and_twice(fake_op):
    outer = vf.enable()
    inner = vf.enable(ops="sample_token")
    outer.close()
    outer.close()
    assert vf.status().ops["sample_token"].enabled and call() == NEAREST[0]
    inner.close()
    assert not vf.status().enabled


def test_equal_handles_are_not_confused(fake_op):
    first, second = vf.enable(), vf.enable()
    first.close()
    first.close()
    assert call() == FAKE
    second.close()
    assert call() == NEAREST[0]


def test_no_ops_enables_nothing(fake_op):
    with vf.enable(), vf.enable(ops=[]):
        assert call() == NEAREST[0]
        assert not vf.status().enabled


@pytest.mark.parametrize("ops", ["nearest", ["nearest_code", "nearest"]])
def test_an_unknown_op_is_named_and_changes_nothing(ops):
    with pytest.raises(ValueError, match=r"unknown op \['nearest'\]; the ops are \['add_norm"):
        vf.enable(ops=ops)
    assert not vf.status().enabled


def test_a_fallback_warns_once_per_op_and_reason_where_it_was_called(fake_op):
    reasons = ["3 codes", "3 codes", "a Monday", "3 codes"]
    left = iter(reasons)
    fake_op.unsupported_reason = lambda *args, **kwargs: next(left)
    with vf.enable(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in reasons:
            assert call() == NEAREST[0]
        ops.sample_token(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64), 0)
    assert [type(w.message) for w in caught] == [FallbackWarning] * len(caught)
    assert [str(w.message) for w in caught] == [
        "nearest_code fell back to reference: cpu: 3 codes",
        "nearest_code fell back to reference: cpu: a Monday",
        "sample_token fell back to reference: "
        "this version has no fast implementation of it for cpu tensors",
    ]
    assert {w.filename for w in caught} == {__file__}
    fallbacks = vf.status().ops["nearest_code"].fallbacks
    assert fallbacks == {"cpu: 3 codes": 3, "cpu: a Monday": 1}
    assert took() == {"reference": 4}


def test_a_cleared_record_forgets_and_warns_anew(fake_op):
    with vf.enable(ops="sample_token"):
        for _ in range(2):
            with pytest.warns(FallbackWarning, match="sample_token"):
                ops.sample_token(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64), 0)
            switch.record.clear()
    assert not took("sample_token") and not vf.status().ops["sample_token"].fallbacks


def test_unsupported_reason_sees_the_call_and_None_takes_it(fake_op):
    seen = []
    fake_op.unsupported_reason = lambda *args, **kwargs: seen.append((args, kwargs))
    with vf.enable(strict=True):
        assert call() == FAKE
    ((z, codebook), options) = seen[0]
    assert torch.equal(z, Z) and torch.equal(codebook, CODEBOOK)
    assert options == {"k": 1, "normalize": True, "return_score": False}


def test_strict_raises_with_the_reason_and_records_no_call(fake_op):
    fake_op.unsupported_reason = lambda *args, **kwargs: "K must be even"
    with vf.enable(strict=True):
        with pytest.raises(FallbackError, match="nearest_code: cpu: K must be even .*strict"):
            call()
        with pytest.raises(FallbackError, match="sample_token: this version has no fast"):
            ops.sample_token(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64), 0)
    assert not took() and not took("sample_token")
    assert call() == NEAREST[0]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("nearest_code", "sample_token"), {}, "takes from 0 to 1 positional"),
        ((), {"strict": "yes"}, "^enable: strict must be True or False, got 'yes'"),
        ((3,), {}, "^enable: ops must be names of ops, got 3"),
    ],
)
def test_enable_refuses_what_it_would_misread(arguments, options, message):
    with pytest.raises(TypeError, match=message):
        vf.enable(*arguments, **options)
    assert not vf.status().enabled


def test_strict_binds_only_what_is_enabled(fake_op):
    with vf.enable(ops="nearest_code", strict=True):
        ops.sample_token(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64), 0)
    assert took("sample_token") == {"reference": 1}


def test_the_triton_kernel_comes_first_and_its_refusal_is_told(fake_op, monkeypatch):
    kernel = types.ModuleType("kernel")
    kernel.nearest_code = lambda z, codebook, **options: torch.full((len(z),), 2 * FAKE)
    monkeypatch.setattr(switch._registry["nearest_code"].candidates[0], "module", kernel)
    # Without the interpreter, a kernel does not serve CPU tensors, so this is no fallback.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with vf.enable(strict=True):
        assert call() == FAKE
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with vf.enable(strict=True):
        assert call() == 2 * FAKE
        kernel.unsupported_reason = lambda *args, **kwargs: "d is odd"
        with pytest.raises(FallbackError, match="triton: d is odd .*fallback to cpu"):
            call()
    assert took() == {"triton": 1}
    with vf.enable(), pytest.warns(FallbackWarning, match="fell back to cpu: triton: d is od"):
        assert call() == FAKE
    assert took() == {"cpu": 1}


def test_status_reads_as_text(fake_op):
    fake_op.unsupported_reason = lambda *args, **kwargs: "too few codes"
    assert str(vf.status()).startswith("vfmtok_fast disabled: every op takes its reference\n")
    with vf.enable(ops=["nearest_code"]), pytest.warns(FallbackWarning):
        call()
        call()
        text = str(vf.status())
    lines = text.splitlines()
    assert lines[0] == "vfmtok_fast enabled"
    assert re.search(r"\n  nearest_code: on; has reference, .*cpu; calls: 2 reference\n", text)
    assert "    fell back 2x: cpu: too few codes" in lines
    assert any(line.startswith("  sample_token: off; has reference") for line in lines)
    with vf.enable(strict=True):
        assert str(vf.status()).startswith("vfmtok_fast enabled, strict\n")


def test_a_reference_that_nothing_is_faster_than_says_so(fake_op, monkeypatch):
    monkeypatch.setattr(switch._registry["sample_token"], "reference_for", "cpu")
    with vf.enable(strict=True):
        ops.sample_token(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64), 0)
    assert took("sample_token") == {"reference": 1}
    assert vf.status().ops["sample_token"].slower == {"nothing known is faster for cpu tensors": 1}
    assert "    took its reference 1x: nothing known is faster for cpu tensors" in str(vf.status())


def test_replays_have_lines_of_their_own(fake_op):
    with vf.enable():
        switch.record.replay("encode")
        switch.record.replay("encode")
        assert vf.status().replays == {"encode": 2}
        assert "  CUDA graph of encode: replayed 2x" in str(vf.status()).splitlines()
    with vf.enable():
        assert not vf.status().replays


def test_what_does_not_exist_is_named():
    for question in (switch.reference, switch.kernel, lambda op: switch.forecast(op, "cpu")):
        with pytest.raises(ValueError, match=r"unknown op 'nothing'; the ops are \['add_norm'"):
            question("nothing")
    with pytest.raises(ValueError, match="device must be 'cuda' or 'cpu', got 'gpu'"):
        switch.forecast("nearest_code", "gpu")


def test_calls_from_before_do_not_look_like_those_of_now(fake_op):
    fake_op.unsupported_reason = lambda *args, **kwargs: "too few codes"
    call()
    switch._record_trace("nearest_code", "cpu", (), None)
    with vf.enable(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert took() == {"cpu (compiled)": 1}  # may be called again, and will not be traced again
        call()
        with vf.enable(ops="sample_token"):
            call()
        assert took() == {"cpu (compiled)": 1, "reference": 2}
    assert took()["reference"] == 2
    with vf.enable(), warnings.catch_warnings(record=True) as again:
        warnings.simplefilter("always")
        assert not vf.status().ops["nearest_code"].fallbacks
        call()
        assert vf.status().ops["nearest_code"].fallbacks == {"cpu: too few codes": 1}
    assert len(caught) == 1 and not again


def test_status_is_a_snapshot(fake_op):
    before = vf.status()
    with vf.enable():
        call()
    assert not before.enabled and before.ops["nearest_code"].calls == {}


def test_threads_never_see_a_broken_policy(fake_op):
    """Every call obeys some open policy, no record is lost, and every policy closes."""
    rounds, workers = 200, 4
    wrong, barrier = [], threading.Barrier(workers + 1)

    def switcher():
        barrier.wait()
        for i in range(rounds):
            handle = vf.enable(ops="nearest_code" if i % 2 else None, strict=i % 3 == 0)
            str(vf.status())
            handle.close()

    def caller():
        barrier.wait()
        for _ in range(rounds):
            try:
                if call() not in (FAKE, NEAREST[0]):
                    wrong.append("result")
            except FallbackError as error:
                wrong.append(error)

    threads = [threading.Thread(target=caller) for _ in range(workers - 1)]
    threads += [threading.Thread(target=switcher) for _ in range(2)]
    with vf.enable(ops="sample_token"):  # The outermost, so that no other one resets the record.
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert sum(took().values()) == (workers - 1) * rounds
    assert set(took()) <= {"cpu", "reference"}
    assert not vf.status().enabled and call() == NEAREST[0]


def test_the_policy_is_the_process_not_the_thread(fake_op):
    seen = []
    with vf.enable():
        thread = threading.Thread(target=lambda: seen.append(call()))
        thread.start()
        thread.join()
    assert seen == [FAKE]


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_kernel_whose_triton_cannot_be_imported_says_so(tmp_path):
    """The machine appears to have no Triton; the kernel is made by the test."""
    (tmp_path / "nearest_code.py").write_text("import triton\n")
    out = run(f"""
        import sys, warnings
        sys.modules["triton"] = None
        import torch, vfmtok_fast as vf
        import vfmtok_fast.kernels
        vfmtok_fast.kernels.__path__.insert(0, {str(tmp_path)!r})
        import os; os.environ["TRITON_INTERPRET"] = "1"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with vf.enable():
                print(vf.ops.nearest_code(torch.eye(2), torch.eye(2)).tolist())
        print(caught[0].message)
        print(vf.status())
    """)
    reason = "its triton implementation could not be imported (import of triton halted"
    lines = out.splitlines()
    assert lines[0] == "[0, 1]"
    assert reason in lines[1] and lines[1].startswith("nearest_code fell back to ")
    assert any(reason in line for line in lines[2:])


def test_enable_and_status_work_where_there_are_no_kernels():
    """With the bare folder on sys.path, kernels/ is not mapped to vfmtok_fast.kernels."""
    root = Path(__file__).parents[1]
    out = run(f"""
        import sys
        sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in str(finder)]
        sys.path.insert(0, {str(root)!r})
        import vfmtok_fast as vf
        print(vf.status())
        vf.enable()
        print(vf.status())
    """)
    assert out.count("no Triton kernel in this version yet") == 2 * len(NAMES)


def test_the_switch_alone_knows_the_ops():
    """A process may import nothing else: an actor, a spawned worker."""
    code = (
        "from vfmtok_fast import switch\n"
        "assert 'nearest_code' in switch.enable().policy.ops and switch.status().ops\n"
        "assert switch.reference('nearest_code') and switch.forecast('nearest_code', 'cpu')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
