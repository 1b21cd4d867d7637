"""Compile every kernel without a GPU and report what the machine code shows: `make aot`.

The compiled launches are those of the calls in `aot_calls`. The ops' own code makes them for a chip
that need not be present. For each kernel and chip the report has registers, spills, shared memory
and occupancy from the cubin. For a kernel that may start before the previous one has ended, it
checks that the kernel touches no memory before it has waited. For kernels with a main loop, it has
the instructions of one iteration from the disassembly and the time that they predict at the chip's
rates. Writes ``results/aot/<chip>.json``. ``--check`` compares with ``aot_budget.json``,
``--budget`` rewrites that file, and ``--variants`` covers every setting that `tune` may choose.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from aot_calls import CALLS, LOOPS, Loop

from vfmtok_fast.kernels.compiling import Launch
from vfmtok_fast.tuner.calls import Call
from vfmtok_fast.tuner.compile import asked_spaces, compile_in_processes, launches, spaces

HERE = Path(__file__).resolve().parent
BUDGET = HERE / "aot_budget.json"
RESULTS = HERE / "results" / "aot"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Chip:
    """Rates of one chip, from NVIDIA's tuning guides and data sheets unless stated otherwise."""

    name: str
    capability: int
    multiprocessors: int
    ghz: float
    matrix_tflops: float  # dense float16 or bfloat16 with float32 sums
    shared_kib: int  # per multiprocessor
    warps: int = 64  # resident on one multiprocessor
    registers: int = 65536


CHIPS = (
    Chip("A100", 80, 108, 1.41, 312, 164),
    # 788 TFLOP/s: measured on an H200 with a large matrix product, as is the lower end of the
    # clock.
    Chip("H200", 90, 132, 1.755, 788, 228),
    Chip("B200", 100, 148, 1.85, 2250, 228),
)
MATRIX = ("HMMA", "HGMMA", "UTCHMMA", "DMMA", "QGMMA")
# Instructions that take two clocks per warp on the pipes of one of a multiprocessor's four
# schedulers: comparisons, selections, integer and logic operations run on 16 lanes, float32 on 32.
HALF_RATE = re.compile(
    r"^(V?I?FMNMX3?|FMNMX3?|VIMNMX3?|IMNMX|FSETP|FSEL|ISETP|SEL|LOP3|PLOP3|SHF|LEA|IADD3|VIADD|PRMT"
    r"|IABS|FCHK|POPC|BREV|FLO)$"
)


def named(call: Call, found: list[Launch]) -> dict[str, Launch]:
    """Name launches by op, kernel and call; further launches of a kernel in a call are numbered."""
    names: dict[str, Launch] = {}
    for launch in found:
        name = f"{call.op}.{launch.kernel} {call.what} {call.dtype}"
        same = sum(other.split(" #")[0] == name for other in names)
        names[f"{name} #{same + 1}" if same else name] = launch
    return names


def run_tool(name: str, *args: str) -> str:
    return subprocess.run([TOOLS / name, *args], capture_output=True, text=True, check=True).stdout


@functools.cache
def disassemble(cubin: bytes) -> tuple[dict[str, int], str]:
    """Return the resource usage and the machine code of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = run_tool("cuobjdump", "--dump-resource-usage", file.name)
        code = run_tool("nvdisasm", "-c", file.name)
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}, code


def instructions(code: str) -> list[tuple[str, str]]:
    """Return (name with its modifiers, whole instruction) in the order of a disassembly."""
    found = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+((?:@!?U?P\w+\s+)?([A-Z][\w.]*).*?);", code, re.M)
    return [(name, whole) for whole, name in found]


# Names that touch memory or leave the kernel, and those of them that are allowed before the wait:
# loads of arguments, accesses to shared memory, prefetches into L2, and loads with the evict-first
# hint, which read weights that no kernel of a step writes. A name in neither list is assumed to
# touch registers only, so new memory instructions of a chip or compiler must be added here.
MEMORY = re.compile(r"^(LD|ST|ATOM|RED|CCTL|UBLK|UTMA|SUST|SULD|TEX|CALL|JMP|BRX|JMX|RET|EXIT)")
HARMLESS = re.compile(r"^((LDC|LDCU|LDSM?|STSM?|ATOMS)(\..*)?|CCTL\.E\.PF2|LDG\.E\.EF(\..*)?)$")


def early_accesses(code: str) -> list[str]:
    """Instructions that touch memory before a kernel has waited for the previous one.

    The wait (ACQBULK) must occur once, at the top level: every jump before it must stay before it,
    so that no thread can bypass it.
    """
    found = instructions(code)
    waits = [at for at, (name, _) in enumerate(found) if name == "ACQBULK"]
    if len(waits) != 1:
        return [f"{len(waits)} waits"]
    before = found[: waits[0]]
    wrong = [whole for name, whole in before if MEMORY.match(name) and not HARMLESS.match(name)]
    if found[waits[0]][1].startswith("@"):
        wrong.append(found[waits[0]][1])
    # Labels after the wait; nothing before it may jump to them.
    later = set(re.findall(r"^\s*(\.L\w+):", code[code.index("ACQBULK") :], re.M))
    wrong += [
        whole
        for name, whole in before
        if name.startswith("BRA") and set(re.findall(r"\.L\w+", whole)) & later
    ]
    return wrong


def loops(code: str, forever: bool = True) -> list[Counter[str]]:
    """Count the instructions by name in the span of every backward branch.

    ``forever`` includes the branch to itself that follows a kernel's end.
    """
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
    if not forever:
        spans = [(first, last) for first, last in spans if last - first > 1]
    return [Counter(names[first:last]) for first, last in spans]


def main_loop(code: str) -> Counter[str]:
    """The shortest loop that multiplies matrices.

    Without such a loop, the shortest with a third of the busiest loop's half-rate instructions.
    """
    found = loops(code)
    if multiplying := [loop for loop in found if any(loop[name] for name in MATRIX)]:
        return min(multiplying, key=lambda loop: loop.total())
    busy = [sum(n for name, n in loop.items() if HALF_RATE.match(name)) for loop in found]
    inner = [loop for loop, n in zip(found, busy, strict=True) if 3 * n >= max(busy)]
    return min(inner, key=lambda loop: loop.total())


def occupancy(warps: int, chip: Chip, registers: int, shared: int) -> dict[str, int]:
    """Number of programs and warps resident on one multiprocessor."""
    per_warp = -(-registers * 32 // 256) * 256
    programs = min(
        chip.warps // warps,
        # Each of the four schedulers has a quarter of the registers.
        4 * (chip.registers // 4 // per_warp) // warps,
        # The system reserves 1 KiB per program.
        chip.shared_kib * 1024 // (shared + 1024),
        32,
    )
    return {"programs": programs, "warps": programs * warps}


def predict(
    call: Call, loop: Loop, constants: dict, warps: int, chip: Chip, turn: Counter[str]
) -> dict[str, object]:
    """Time of the main loop if the busiest unit never waits, and if matrix and ALU take turns."""
    per_warp = loop.per_turn(constants) / warps
    units, flops = loop.units(call.sizes), loop.flops(constants)
    half = sum(n for name, n in turn.items() if HALF_RATE.match(name))
    issue = turn.total()
    turns = units / per_warp / (4 * chip.multiprocessors)
    alu_us = turns * max(2 * half, issue) / chip.ghz / 1e3
    matrix_us = units * flops / chip.matrix_tflops / 1e6
    per_lane = per_warp / 32
    return {
        "problem": str(call),
        "instructions": dict(turn.most_common()),
        "matrix_instructions": sum(turn[name] for name in MATRIX),
        f"alu_per_{loop.unit}": round(half / per_lane, 3),
        f"issued_per_{loop.unit}": round(issue / per_lane, 3),
        "alu_us": round(alu_us, 1),
        "matrix_us": round(matrix_us, 1),
        "predicted_us_overlapped": round(max(alu_us, matrix_us), 1),
        "predicted_us_in_turns": round(alu_us + matrix_us, 1),
    }


def constants_of(launch: Launch) -> dict[str, object]:
    """Compile-time arguments of a launch by name."""
    source = launch.compiled.src
    names = source.fn.arg_names
    return {names[path[0]]: value for path, value in source.constants.items() if len(path) == 1}


def resources(launch: Launch, chip: Chip) -> tuple[dict[str, object], str]:
    """Return the resources that a launch takes of a multiprocessor, and its machine code."""
    usage, code = disassemble(launch.compiled.asm["cubin"])
    metadata = launch.compiled.metadata
    row: dict[str, object] = {
        "registers": usage["REG"],
        # Spills are in local memory; STACK and LOCAL are its size.
        "spill_bytes": usage["STACK"] + usage["LOCAL"],
        "shared_bytes": metadata.shared,
        "occupancy": occupancy(metadata.num_warps, chip, usage["REG"], metadata.shared),
    }
    return row, code


def report(call: Call, launch: Launch, chip: Chip) -> dict[str, object]:
    """Return everything that the budget and the report record about one launch."""
    row, code = resources(launch, chip)
    # UTCHMMA is outside the span of its loop if a separate warp issues it.
    row["matrix_in_kernel"] = sum(len(re.findall(rf"\b{name}\b", code)) for name in MATRIX)
    constants = constants_of(launch)
    if constants.get("OVERLAP"):
        row["early_accesses"] = early_accesses(code)
    loop = LOOPS.get(launch.kernel)
    if loop is not None and loop.rolled(constants):
        warps = launch.compiled.metadata.num_warps
        row["main_loop"] = predict(call, loop, constants, warps, chip, main_loop(code))
    elif not loops(code, forever=False):
        row["straight"] = straight(launch, chip, code)
    return row


def straight(launch: Launch, chip: Chip, code: str) -> dict[str, float]:
    """Instructions of a kernel without a loop, and the time to issue them if no warp ever waits."""
    issued = sum(name != "NOP" for name, _ in instructions(code))
    warps = launch.programs * launch.compiled.metadata.num_warps
    us = warps * issued / (4 * chip.multiprocessors * chip.ghz * 1e3)
    return {"instructions": issued, "issue_us": round(us, 2)}


def variants(chip: Chip) -> dict[str, dict[str, object]]:
    """Resources of every setting of every space: the worst of the kernels that it changes."""
    # The first call that uses a space in a dtype represents all such calls.
    first: dict[tuple[str, str], Call] = {}
    for call in CALLS:
        for name in asked_spaces(call, chip.capability):
            first.setdefault((name, call.dtype), call)
    jobs = [
        (call, name, setting._asdict())
        for (name, _), call in first.items()
        for setting in spaces(call.op)[name].candidates()
    ]
    failed = {}
    for job, problem in compile_in_processes(jobs, chip.capability, os.cpu_count()):
        if problem:
            failed[variant_name(*job)] = problem
    if failed:
        sys.exit("\n".join(f"{chip.name} {name}: {why}" for name, why in failed.items()))
    usual = {call: {run.compiled.hash for run in launches(call, chip.capability)}
             for call in first.values()}  # fmt: skip
    rows = {}
    for call, name, values in jobs:
        space = spaces(call.op)[name]
        with space.using(space.setting(values)):
            changed = [
                run
                for run in launches(call, chip.capability)
                if run.compiled.hash not in usual[call]
            ]
        if changed:
            found = [resources(run, chip)[0] for run in changed]
            rows[variant_name(call, name, values)] = {
                **{key: max(row[key] for row in found)
                   for key in ("registers", "spill_bytes", "shared_bytes")},
                "occupancy": min((row["occupancy"] for row in found), key=lambda o: o["warps"]),
            }  # fmt: skip
    return rows


def variant_name(call: Call, name: str, values: dict[str, object]) -> str:
    return f"{name} {call.dtype}: {' '.join(f'{k}={v}' for k, v in values.items())}"


def budget_of(row: dict) -> dict[str, float]:
    loop = row.get("main_loop", {})
    alu = {key: value for key, value in loop.items() if key.startswith(("alu_per", "issued_per"))}
    matrix = {"matrix_at_least": 1} if row.get("matrix_in_kernel") else {}
    # Known spills: a register or two that the assembler gave up to keep more warps resident.
    spills = {"spill_bytes": row["spill_bytes"]} if row["spill_bytes"] else {}
    return {
        "registers": row["registers"],
        "shared_bytes": row["shared_bytes"],
        "warps_at_least": row["occupancy"]["warps"],
        **spills,
        **alu,
        **matrix,
    }


def check(name: str, chip: str, row: dict, budget: dict, part: str = "kernels") -> list[str]:
    """Describe what exceeds the budget."""
    allowed = budget.get(chip, {}).get(part, {}).get(name)
    if allowed is None:
        return [f"{chip} {name}: not in {BUDGET.name}; run aot.py --budget and read the change"]
    found = {**row, **row.get("main_loop", {})}
    if budget["triton"] != triton.__version__:
        # Another compiler allocates differently; only the use of the matrix unit is still required.
        allowed = {key: limit for key, limit in allowed.items() if key == "matrix_at_least"}
    wrong = [
        f"{chip} {name}: {key} is {found[key]}, the budget {limit}"
        for key, limit in allowed.items()
        if not key.endswith("_at_least") and found[key] > limit
    ]
    if row.get("matrix_in_kernel", 1) < allowed.get("matrix_at_least", 0):
        wrong.append(f"{chip} {name}: no matrix instructions")
    if (warps := row["occupancy"]["warps"]) < allowed.get("warps_at_least", 0):
        least = allowed["warps_at_least"]
        wrong.append(f"{chip} {name}: {warps} warps are resident, the budget is {least}")
    if early := row.get("early_accesses"):
        wrong.append(f"{chip} {name}: before it waits: {'; '.join(early)}")
    new = row["spill_bytes"] and "spill_bytes" not in allowed
    if new and budget["triton"] == triton.__version__:
        wrong.append(f"{chip} {name}: spills {row['spill_bytes']} bytes")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--check", action="store_true", help="fail where the budget is exceeded")
    parser.add_argument("--budget", action="store_true", help="take today's numbers as the budget")
    parser.add_argument(
        "--variants", action="store_true", help="every setting of every space too (minutes)"
    )
    parser.add_argument(
        "--chip", choices=[chip.name.lower() for chip in CHIPS], help="only this one, of three"
    )
    args = parser.parse_args()
    if args.budget and args.chip:
        parser.error("--budget is of all chips")
    before = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    budget: dict = {"triton": triton.__version__} if args.budget else before
    wrong = []
    args.out.mkdir(parents=True, exist_ok=True)
    for chip in CHIPS:
        if args.chip not in (None, chip.name.lower()):
            continue
        kernels: dict[str, dict] = {}
        for call in CALLS:
            for name, launch in named(call, launches(call, chip.capability)).items():
                kernels[name] = report(call, launch, chip)
        every = variants(chip) if args.variants else {}
        for part, rows in (("kernels", kernels), ("variants", every)):
            for name, row in rows.items():
                show(chip, name, row)
                if args.budget:
                    budget.setdefault(chip.name, {}).setdefault(part, {})[name] = budget_of(row)
                elif args.check:
                    wrong += check(name, chip.name, row, budget, part)
        if args.budget and not args.variants:
            budget[chip.name]["variants"] = before.get(chip.name, {}).get("variants", {})
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        content = {"chip": vars(chip), "versions": versions, "predicted": True, "kernels": kernels}
        path = args.out / f"{chip.name.lower()}.json"
        path.write_text(json.dumps(content, indent=1) + "\n")
    if args.budget:
        BUDGET.write_text(json.dumps(budget, indent=1) + "\n")
    if wrong:
        sys.exit("\n".join(wrong))


def show(chip: Chip, name: str, row: dict) -> None:
    loop = row.get("main_loop")
    time = f"  predicted {loop['predicted_us_overlapped']} us" if loop else ""
    if plain := row.get("straight"):
        time = f"  issues for {plain['issue_us']} us"
    print(
        f"{chip.name} {name}: {row['registers']} registers, {row['spill_bytes']} spilled, "
        f"{row['shared_bytes']} B shared, {row['occupancy']['warps']} warps{time}"
    )


if __name__ == "__main__":
    main()
