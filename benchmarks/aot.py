"""Compile every kernel without a GPU and report what the machine code says: `make aot`.

For each kernel and chip: registers, spills, shared memory and occupancy from the cubin; of a kernel
that may begin before the one ahead of it has ended, that it touches no memory before it has waited;
and of kernels with a main loop the instructions of one turn from the disassembly, and the time that
they predict at the chip's rates. Writes ``results/aot/<chip>.json``; ``--check`` compares with
``aot_budget.json``, ``--budget`` writes that file anew.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from aot_cases import CASES, Case
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HERE = Path(__file__).resolve().parent
BUDGET = HERE / "aot_budget.json"
RESULTS = HERE / "results" / "aot"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Chip:
    """Rates of one chip: NVIDIA's tuning guides and data sheets, where not said otherwise."""

    name: str
    capability: int
    multiprocessors: int
    ghz: float
    matrix_tflops: float  # dense float16 or bfloat16 with float32 sums
    shared_kib: int  # of one multiprocessor
    warps: int = 64  # resident on one multiprocessor
    registers: int = 65536


CHIPS = (
    Chip("A100", 80, 108, 1.41, 312, 164),
    # 788 TFLOP/s: measured on an H200 with a large matrix product, as is the clock's lower end.
    Chip("H200", 90, 132, 1.755, 788, 228),
    Chip("B200", 100, 148, 1.85, 2250, 228),
)
MATRIX = ("HMMA", "HGMMA", "UTCHMMA", "DMMA", "QGMMA")
# Pipes of one of a multiprocessor's four schedulers: clocks that one instruction of a warp takes.
# Comparisons, selections, integer and logic operations run on 16 lanes, float32 on 32.
HALF_RATE = re.compile(
    r"^(V?I?FMNMX3?|FMNMX3?|VIMNMX3?|IMNMX|FSETP|FSEL|ISETP|SEL|LOP3|PLOP3|SHF|LEA|IADD3|VIADD|PRMT"
    r"|IABS|FCHK|POPC|BREV|FLO)$"
)


def compile_case(case: Case, chip: Chip) -> object:
    """Compile as a launch would, for a chip that need not be there."""
    names = case.kernel.arg_names
    known = set(case.types) | set(case.constants)
    if known != set(names):
        raise SystemExit(f"{case.name}: arguments {sorted(known ^ set(names))} do not match")
    source = ASTSource(
        case.kernel,
        {name: case.types.get(name, "constexpr") for name in names},
        constexprs=case.constants,
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if str(case.types.get(name)).startswith("*") or name in case.aligned
        },
    )
    options = {"num_warps": case.warps, "num_stages": case.stages, **case.options}
    return triton.compile(source, target=GPUTarget("cuda", chip.capability, 32), options=options)


def run_tool(name: str, *args: str) -> str:
    return subprocess.run([TOOLS / name, *args], capture_output=True, text=True, check=True).stdout


def disassemble(cubin: bytes) -> tuple[dict[str, int], str]:
    """Resource usage and machine code of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = run_tool("cuobjdump", "--dump-resource-usage", file.name)
        code = run_tool("nvdisasm", "-c", file.name)
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}, code


def instructions(code: str) -> list[tuple[str, str]]:
    """(name with its modifiers, whole instruction) in the order of a disassembly."""
    found = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+((?:@!?U?P\w+\s+)?([A-Z][\w.]*).*?);", code, re.M)
    return [(name, whole) for whole, name in found]


# Names that touch memory or leave the kernel, and those of them that may stand before the wait:
# loads of arguments and prefetches into L2. A name in neither list is taken to touch registers
# only, so a chip or compiler with new names for memory needs them added here.
MEMORY = re.compile(r"^(LD|ST|ATOM|RED|CCTL|UBLK|UTMA|SUST|SULD|TEX|CALL|JMP|BRX|JMX|RET|EXIT)")
HARMLESS = re.compile(r"^(LDC|LDCU|LDC\..*|LDCU\..*|CCTL\.E\.PF2)$")


def early_accesses(code: str) -> list[str]:
    """What touches memory before a kernel has waited for the one ahead of it.

    The wait (ACQBULK) is to come once, at the top level: whatever jumps, before it, stays before
    it, so that no thread gets past it otherwise.
    """
    found = instructions(code)
    waits = [at for at, (name, _) in enumerate(found) if name == "ACQBULK"]
    if len(waits) != 1:
        return [f"{len(waits)} waits"]
    before = found[: waits[0]]
    wrong = [whole for name, whole in before if MEMORY.match(name) and not HARMLESS.match(name)]
    if found[waits[0]][1].startswith("@"):
        wrong.append(found[waits[0]][1])
    # Labels after the wait, to which nothing before it may jump.
    later = set(re.findall(r"^\s*(\.L\w+):", code[code.index("ACQBULK") :], re.M))
    wrong += [
        whole
        for name, whole in before
        if name.startswith("BRA") and set(re.findall(r"\.L\w+", whole)) & later
    ]
    return wrong


def loops(code: str) -> list[Counter[str]]:
    """Instructions by name of every backward branch's span."""
    labels: dict[str, int] = {}
    names: list[str] = []
    spans = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(names)
        elif instruction := re.match(
            r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*);", line
        ):
            name = instruction[1].split(".")[0]
            names.append(name)
            target = re.search(r"`\((\.L\w+)\)", instruction[2])
            if name == "BRA" and target and target[1] in labels:
                spans.append((labels[target[1]], len(names)))
    return [Counter(names[first:last]) for first, last in spans]


def main_loop(code: str) -> Counter[str]:
    """The shortest loop that holds at least half of the instructions of the busiest pipe."""
    found = loops(code)
    busy = [sum(n for name, n in loop.items() if HALF_RATE.match(name)) for loop in found]
    inner = [loop for loop, n in zip(found, busy, strict=True) if 3 * n >= max(busy)]
    return min(inner, key=lambda loop: loop.total())


def occupancy(case: Case, chip: Chip, registers: int, shared: int) -> dict[str, int]:
    """Programs and warps resident on one multiprocessor."""
    per_warp = -(-registers * 32 // 256) * 256
    programs = min(
        chip.warps // case.warps,
        # Each of the four schedulers has a quarter of the registers.
        4 * (chip.registers // 4 // per_warp) // case.warps,
        # The system keeps 1 KiB of each program.
        chip.shared_kib * 1024 // (shared + 1024),
        32,
    )
    return {"programs": programs, "warps": programs * case.warps}


def predict(case: Case, chip: Chip, loop: Counter[str]) -> dict[str, object]:
    """Time of the main loop if the busiest unit never waits, and if matrix and ALU take turns."""
    half = sum(n for name, n in loop.items() if HALF_RATE.match(name))
    issue = loop.total()
    turns = case.units / case.units_per_warp / (4 * chip.multiprocessors)
    alu_us = turns * max(2 * half, issue) / chip.ghz / 1e3
    matrix_us = case.units * case.matrix_flops / chip.matrix_tflops / 1e6
    per_lane = case.units_per_warp / 32
    return {
        "problem": case.problem,
        "instructions": dict(loop.most_common()),
        "matrix_instructions": sum(loop[name] for name in MATRIX),
        f"alu_per_{case.unit}": round(half / per_lane, 3),
        f"issued_per_{case.unit}": round(issue / per_lane, 3),
        "alu_us": round(alu_us, 1),
        "matrix_us": round(matrix_us, 1),
        "predicted_us_overlapped": round(max(alu_us, matrix_us), 1),
        "predicted_us_in_turns": round(alu_us + matrix_us, 1),
    }


def report(case: Case, chip: Chip) -> dict[str, object]:
    compiled = compile_case(case, chip)
    usage, code = disassemble(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    # UTCHMMA stands outside the span of its loop where a warp of its own issues it.
    row: dict[str, object] = {
        "registers": usage["REG"],
        # nvdisasm shows spills as local memory; STACK and LOCAL are its size.
        "spill_bytes": usage["STACK"] + usage["LOCAL"],
        "shared_bytes": shared,
        "occupancy": occupancy(case, chip, usage["REG"], shared),
        "matrix_in_kernel": sum(len(re.findall(rf"\b{name}\b", code)) for name in MATRIX),
    }
    if case.constants.get("OVERLAP"):
        row["early_accesses"] = early_accesses(code)
    if case.unit:
        row["main_loop"] = predict(case, chip, main_loop(code))
    return row


def budget_of(row: dict) -> dict[str, float]:
    loop = row.get("main_loop", {})
    alu = {key: value for key, value in loop.items() if key.startswith(("alu_per", "issued_per"))}
    matrix = {"matrix_at_least": 1} if loop.get("matrix_us") else {}
    return {"registers": row["registers"], "shared_bytes": row["shared_bytes"], **alu, **matrix}


def check(name: str, chip: str, row: dict, budget: dict) -> list[str]:
    """What exceeds the budget, in words."""
    allowed = budget.get(chip, {}).get(name)
    if allowed is None:
        return [f"{chip} {name}: not in {BUDGET.name}; run aot.py --budget and read the change"]
    found = {**row, **row.get("main_loop", {})}
    if budget["triton"] != triton.__version__:
        # Another compiler allocates otherwise; only the matrix unit is never given up.
        allowed = {key: limit for key, limit in allowed.items() if key == "matrix_at_least"}
    wrong = [
        f"{chip} {name}: {key} is {found[key]}, the budget {limit}"
        for key, limit in allowed.items()
        if key != "matrix_at_least" and found[key] > limit
    ]
    if row["matrix_in_kernel"] < allowed.get("matrix_at_least", 0):
        wrong.append(f"{chip} {name}: no matrix instructions")
    if early := row.get("early_accesses"):
        wrong.append(f"{chip} {name}: before it waits: {'; '.join(early)}")
    if row["spill_bytes"] and budget["triton"] == triton.__version__:
        wrong.append(f"{chip} {name}: spills {row['spill_bytes']} bytes")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--check", action="store_true", help="fail where the budget is exceeded")
    parser.add_argument("--budget", action="store_true", help="take today's numbers as the budget")
    args = parser.parse_args()
    budget = json.loads(BUDGET.read_text()) if BUDGET.exists() and not args.budget else {}
    if args.budget:
        budget["triton"] = triton.__version__
    wrong = []
    args.out.mkdir(parents=True, exist_ok=True)
    for chip in CHIPS:
        rows = {case.name: report(case, chip) for case in CASES if chip.capability in case.chips}
        for name, row in rows.items():
            loop = row.get("main_loop")
            time = f"  predicted {loop['predicted_us_overlapped']} us" if loop else ""
            print(
                f"{chip.name} {name}: {row['registers']} registers, {row['spill_bytes']} spilled, "
                f"{row['shared_bytes']} B shared, {row['occupancy']['warps']} warps{time}"
            )
            if args.budget:
                budget.setdefault(chip.name, {})[name] = budget_of(row)
            elif args.check:
                wrong += check(name, chip.name, row, budget)
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        content = {"chip": vars(chip), "versions": versions, "predicted": True, "kernels": rows}
        path = args.out / f"{chip.name.lower()}.json"
        path.write_text(json.dumps(content, indent=1) + "\n")
    if args.budget:
        BUDGET.write_text(json.dumps(budget, indent=1) + "\n")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
