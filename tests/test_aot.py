"""Without a GPU, every kernel compiles for an H200 within the committed budget.

`make aot` does this for all chips that we name.
"""

from __future__ import annotations

import ast
import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "aot.py"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Run in a separate process, where the interpreter of other tests is off."""
    out = tmp_path_factory.mktemp("aot")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, SCRIPT, "--check", "--chip", "h200", "--out", out],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    return result, out


@pytest.fixture
def aot(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec = importlib.util.spec_from_file_location("aot_under_test", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_within_the_budget(compiled):
    result, _ = compiled
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.mark.slow
def test_every_kernel_of_every_module_is_compiled(compiled):
    _, out = compiled
    wanted = {
        name
        for path in (ROOT / "kernels").rglob("*.py")
        for name in launched_kernels(path.read_text(encoding="utf-8"))
    }
    (path,) = out.glob("*.json")
    kernels = json.loads(path.read_text())["kernels"]
    assert wanted <= {name.split()[0].partition(".")[2] for name in kernels}


def launched_kernels(source: str) -> set[str]:
    """Return names of kernels that a module launches, ``_name[grid](...)``; all start with "_"."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return {
        call.func.value.id
        for call in calls
        if isinstance(call.func, ast.Subscript)
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id.startswith("_")
    }


@pytest.mark.slow
@pytest.mark.parametrize("key", ["registers", "alu_per_score"])
def test_a_number_over_the_budget_fails(compiled, aot, key: str):
    rows = json.loads((compiled[1] / "h200.json").read_text())["kernels"]
    budget = json.loads(aot.BUDGET.read_text()) | {"triton": aot.triton.__version__}
    name = "nearest_code._screen d=12 float32"
    tight = copy.deepcopy(budget)
    # Slightly below whatever the installed compiler produces.
    tight["H200"]["kernels"][name][key] = (
        rows[name].get(key, rows[name]["main_loop"].get(key)) - 0.001
    )
    assert len(aot.check(name, "H200", rows[name], tight)) == 1
    assert aot.check(name, "H200", rows[name], tight | {"triton": "another"}) == []
    spilled = {**rows[name], "spill_bytes": 4, "matrix_in_kernel": 0}
    assert len(aot.check(name, "H200", spilled, budget)) == 2
    lonely = {**rows[name], "occupancy": {"programs": 1, "warps": 1}}
    assert "1 warps are resident" in aot.check(name, "H200", lonely, budget)[0]
    assert aot.check("no such kernel", "H200", rows[name], budget)
    # Settings other than the default have their own budget.
    assert aot.check(name, "H200", rows[name], budget, "variants")


LAUNCHES = """
import torch
from vfmtok_fast.kernels import deformable_sample, nearest_code
from vfmtok_fast.kernels.compiling import compile_only

with compile_only(90) as launches:
    nearest_code.nearest_code(torch.ones(1, 4), torch.ones(1, 4))
    for dtype, deterministic in ((torch.float32, True), (torch.bfloat16, False)):
        sizes = (1, 1, 1, 1), (1, 1, 1, 2), (1, 1, 1, 1, 1, 2), (1, 1, 1, 1)
        value, *rest = (torch.ones(size, dtype=dtype, requires_grad=True) for size in sizes)
        out = deformable_sample.deformable_sample(value, ((1, 1),), *rest, deterministic)
        torch.autograd.grad(out, [value, *rest], out)
print(*sorted({launch.kernel for launch in launches}))
"""


@pytest.mark.slow
def test_launches_of_ones_compile(tmp_path):
    """Triton's own launcher makes every 1 a constant, which changes types."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-P", "-c", LAUNCHES],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    names = ("nearest_code", "deformable_sample")
    sources = [p for name in names for p in (ROOT / "kernels" / name).glob("*.py")]
    wanted = [launched_kernels(path.read_text(encoding="utf-8")) for path in sources]
    assert set(result.stdout.split()) == set.union(*wanted)


WAITING = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   PREEXIT ;
.L_x_0:
        /*0020*/                   CCTL.E.PF2 [R2] ;
        /*0030*/               @P0 BRA `(.L_x_0) ;
        /*0040*/                   ACQBULK ;
.L_x_1:
        /*0050*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0060*/                   STG.E desc[UR4][R2.64], R4 ;
        /*0070*/                   EXIT ;
"""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("CCTL.E.PF2 [R2]", "CCTL.E.PF2 [R2]", None),
        ("CCTL.E.PF2 [R2]", "LDG.E R4, desc[UR4][R2.64]", "LDG.E R4"),
        ("CCTL.E.PF2 [R2]", "LDG.E.EF.128 R4, desc[UR4][R2.64]", None),
        ("CCTL.E.PF2 [R2]", "LDG.E.128 R4, desc[UR4][R2.64]", "LDG.E.128"),
        ("CCTL.E.PF2 [R2]", "@P1 LDGSTS.E [R1], desc[UR4][R2.64]", "LDGSTS.E"),
        ("CCTL.E.PF2 [R2]", "STG.E desc[UR4][R2.64], R4", "STG.E"),
        ("CCTL.E.PF2 [R2]", "LDS R4, [R1]", None),
        ("CCTL.E.PF2 [R2]", "ATOMS.OR R4, [R1], R5", None),
        ("CCTL.E.PF2 [R2]", "UBLKCP [R1], [R2], R4", "UBLKCP"),
        ("CCTL.E.PF2 [R2]", "CCTL.IVALL", "CCTL.IVALL"),
        ("PREEXIT", "@P2 EXIT", "@P2 EXIT"),
        ("BRA `(.L_x_0)", "BRA `(.L_x_1)", "BRA `(.L_x_1)"),
        ("ACQBULK", "@P0 ACQBULK", "@P0 ACQBULK"),
        ("ACQBULK", "NOP", "0 waits"),
        ("EXIT", "ACQBULK", "2 waits"),
    ],
)
def test_what_a_kernel_does_before_it_has_waited_is_found(aot, old: str, new: str, said):
    assert old in WAITING
    found = aot.early_accesses(WAITING.replace(old, new))
    assert found == [] if said is None else len(found) == 1 and said in found[0]
    row = {"early_accesses": found, "spill_bytes": 0, "matrix_in_kernel": 0}
    row["occupancy"] = {"programs": 1, "warps": 4}
    budget = {"triton": aot.triton.__version__, "H200": {"kernels": {"kernel": {}}}}
    assert len(aot.check("kernel", "H200", row, budget)) == len(found)


@pytest.mark.slow
def test_every_kernel_of_a_step_is_looked_at_for_that(compiled):
    _, out = compiled
    kernels = json.loads((out / "h200.json").read_text())["kernels"]
    seen = {name.split()[0] for name, row in kernels.items() if "early_accesses" in row}
    step = {f"decode_step.{kernel}" for kernel in ("_vector", "_matrix", "_append")}
    step |= {"decode_step._rms_norm", "decode_step._modulated", "decode_attention._decode"}
    step |= {"sample_token._sample_token", "sample_token._best_share"}
    assert seen == step


def test_loops_are_found_in_the_disassembly(aot):
    code = """
.L_x_0:
        /*0000*/                   FMNMX R1, R2, R3, PT ;
.L_x_1:
        /*0010*/                   HGMMA.64x128x16.F32 R24, gdesc[UR4], RZ ;
        /*0020*/              @!P0 FMNMX R1, R2, R3, PT ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
        /*0040*/                   BRA `(.L_x_0) ;
        /*0050*/                   BRA `(.L_x_9) ;
.L_x_9:
"""
    inner, outer = aot.loops(code)
    assert inner == {"HGMMA": 1, "FMNMX": 1, "BRA": 1}
    assert outer == {"HGMMA": 1, "FMNMX": 2, "BRA": 2}
