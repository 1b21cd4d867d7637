"""Dispatch: which implementation each op uses, and a record of what every call used.

Each op has one *reference* (always available) and may have faster implementations:

- ``kernels/<op>.py``: Triton, for CUDA tensors (and CPU tensors under TRITON_INTERPRET=1);
- ``providers/<op>_<library>.py``: a function of another package, for CUDA tensors. It is considered
  after Triton, where that package is installed and works (its ``trial`` finds out, see
  `providers.trial`). Where the package is not installed, no warning mentions it;
- ``cpu/<op>.py``: plain torch, where it beats the reference without Triton.

An implementation module holds a function named like the op, which takes the reference's arguments.
It may also hold ``unsupported_reason`` with the same arguments, which returns None or the reason
why the implementation cannot take the call. A kernel module may hold ``tuning_key`` too, which says
which calls a measurement on this card applies to. Where a table of measurements
(``kernels/tuning.py``) says that the reference is faster, an enabled call takes the reference:
enabling never slows a call down, and `status` says why. This does not count as a fallback.
No implementation is imported before `enable`, `forecast` or `kernel` asks for it, so importing the
package never imports Triton.

The policy is one global of the process, which each op reads at each call. Nothing is patched.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch.autograd import forward_ad

from .record import COMPILED, Record
from .record import FallbackWarning as FallbackWarning

# Importing another package may raise these if it was built for another torch or lacks a library.
LIBRARY_ERRORS = (OSError, RuntimeError, NameError, AttributeError, TypeError)


class FallbackError(RuntimeError):
    """Under ``enable(strict=True)``, an enabled op had no fast implementation for a call."""


@dataclass(frozen=True)
class Policy:
    """What is enabled: ``ops`` by name, and whether falling back is an error."""

    ops: frozenset[str] = frozenset()
    strict: bool = False


_OFF = Policy()
# torch.compile guards this global: changing it recompiles once, and the result is correct.
_active: Policy = _OFF
_layers: list[Handle] = []
_registry: dict[str, Op] = {}
record = Record()
_generation = 0
_lock = threading.RLock()


class Handle:
    """One `enable` call. ``close()``, or leaving the ``with`` block, undoes only this one."""

    def __init__(self, policy: Policy):
        self.policy = policy

    def close(self) -> None:
        """Undo this `enable` and restore what was enabled before it. Safe to call twice."""
        with _lock:
            if self in _layers:
                _layers.remove(self)
                _activate()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "open" if self in _layers else "closed"
        return f"<vfmtok_fast.enable {sorted(self.policy.ops)} strict={self.policy.strict} {state}>"


def _ops() -> dict[str, Op]:
    """Return all ops, which register themselves when they are imported."""
    importlib.import_module(f"{__package__}.ops")
    return _registry


def _known(who: str, name: str) -> Op:
    if name not in _ops():
        raise ValueError(f"{who}: unknown op {name!r}; the ops are {sorted(_registry)}")
    return _registry[name]


def names_of(who: str, ops: str | Iterable[str] | None) -> frozenset[str]:
    """Return the names that a user gave, one or several; None means all ops."""
    if ops is not None and not isinstance(ops, Iterable):
        raise TypeError(f"{who}: ops must be names of ops, got {ops!r}")
    known = frozenset(_ops())
    names = known if ops is None else frozenset([ops] if isinstance(ops, str) else ops)
    if unknown := names - known:
        raise ValueError(f"{who}: unknown op {sorted(unknown)}; the ops are {sorted(known)}")
    return names


def enable(ops: str | Iterable[str] | None = None, *, strict: bool = False) -> Handle:
    """Let ops use their fast implementations, immediately and in the whole process.

    This changes speed and memory, never a dtype or the distribution that samples follow; results
    differ only by rounding. Calls nest, and the innermost open one alone decides. The outermost
    one starts the record of calls in `status` anew.

    Args:
        ops: names of the ops to enable, or one name; None enables all of them.
        strict: raise `FallbackError` where an enabled op would fall back, instead of warning once.

    Returns:
        A handle; ``with vfmtok_fast.enable(): ...`` undoes it at the end, also after an exception.

    Raises:
        ValueError: an op name that does not exist. TypeError: not names, or not a bool.
    """
    if not isinstance(strict, bool):
        raise TypeError(f"enable: strict must be True or False, got {strict!r}")
    names = names_of("enable", ops)
    for name in names:
        _registry[name].load()
    handle = Handle(Policy(names, strict))
    with _lock:
        if not _layers:
            record.begin_anew()
        _layers.append(handle)
        _activate()
    return handle


def disable() -> None:
    """Turn every fast implementation off, however many `enable` calls are open."""
    with _lock:
        _layers.clear()
        _activate()


def policy() -> Policy:
    """Return what is enabled now."""
    return _active


def generation() -> int:
    """Return a number that changes with kernel settings, which graphs bake in with the policy."""
    return _generation


def new_generation() -> None:
    """Announce that kernel settings have changed, so that graphs are captured anew."""
    global _generation
    _generation += 1


def _activate() -> None:
    global _active
    _active = _layers[-1].policy if _layers else _OFF


@dataclass
class Implementation:
    """A fast implementation of an op, imported on demand; ``library``: its optional package."""

    name: str
    path: str
    library: str = ""
    note: str = ""
    module: ModuleType | None = field(default=None, repr=False)
    tuning: ModuleType | None = field(default=None, repr=False)
    broken: bool = False

    def load(self) -> None:
        # If the import failed once, it would fail again, and may take seconds to do so.
        if self.module is not None or self.broken:
            return
        if not self.installed:
            self.note = f"{self.library} is not installed"
            return
        try:
            self.module = importlib.import_module(self.path)
            self.note = ""
            if hasattr(self.module, "tuning_key"):
                self.tuning = importlib.import_module(f"{self.path.rpartition('.')[0]}.tuning")
        except ImportError as error:
            if error.name in (self.path, self.path.rpartition(".")[0]):
                # A missing CPU implementation means that none is needed beside the reference.
                if self.name != "cpu":
                    self.note = f"this version has no {self.name} implementation of it"
            else:
                self._could_not(error)
        except LIBRARY_ERRORS as error:
            if not self.library:
                raise
            self._could_not(error)

    def _could_not(self, error: Exception) -> None:
        self.broken = bool(self.library)
        why = " ".join(str(error).split())
        self.note = f"its {self.name} implementation could not be imported ({why})"

    @property
    def failures(self) -> tuple[str, ...]:
        """What the trials of the package have found not to work so far."""
        trial = getattr(self.module, "trial", None)
        return () if trial is None else tuple(f"{self.name}: {why}" for why in trial.failures())

    def trouble(self, device: str) -> str | None:
        """Why the package does not work on ``device``, or None; runs the trial if necessary."""
        trial = getattr(self.module, "trial", None)
        return None if trial is None else trial.reason_on(device)

    def serves(self, device: str) -> bool:
        """Whether this is meant for ``device``; where it is not, skipping it is no fallback."""
        if self.name == "cpu":
            return True
        if self.library:
            return device == "cuda"
        return device == "cuda" or (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")

    @property
    def installed(self) -> bool:
        """Whether the package that this needs is installed; this check does not import it."""
        return not self.library or importlib.util.find_spec(self.library) is not None

    @property
    def exists(self) -> bool:
        if self.module is not None:
            return True
        if not self.installed:
            return False
        # Check the package first: find_spec raises for a module of a missing package.
        package = self.path.rpartition(".")[0]
        return all(importlib.util.find_spec(path) is not None for path in (package, self.path))


@dataclass(eq=False)
class Op:
    """Chooses among the implementations of a public op; call it with validated arguments.

    ``libraries``: import names of packages that have a module in providers/ for this op.
    ``reference_for``: a device on which nothing known is faster than the reference, so that using
    the reference is no fallback.
    """

    name: str
    reference: Callable
    libraries: tuple[str, ...] = ()
    reference_for: str | None = None

    def __post_init__(self) -> None:
        provider = f"vfmtok_fast.providers.{self.name}"
        self.candidates = (
            Implementation("triton", f"vfmtok_fast.kernels.{self.name}"),
            *(Implementation(name, f"{provider}_{name}", name) for name in self.libraries),
            Implementation("cpu", f"vfmtok_fast.cpu.{self.name}"),
        )
        # The candidates by device type. On a CPU, reading the environment and asking each
        # candidate at every call would be noticeable.
        self._found: dict[str, tuple[Implementation, ...]] = {}
        _registry[self.name] = self

    def load(self) -> None:
        for candidate in self.candidates:
            candidate.load()
        # Filled here and not in a call: torch.compile guards it, so filling it in a call would
        # compile twice.
        self._found = {
            device: tuple(c for c in self.candidates if c.serves(device))
            for device in ("cpu", "cuda")
        }

    def _serving(self, device: str) -> tuple[Implementation, ...]:
        # For any other device there is only plain torch, the last candidate.
        return self._found.get(device, self.candidates[-1:])

    def forecast(self, device: str) -> str:
        """Describe what an enabled call on ``device`` ("cuda" or "cpu") would use, and why."""
        serving = self._serving(device)
        reasons = [c.note for c in serving if c.module is None and c.note]
        troubles = {c.name: c.trouble(device) for c in serving if c.module is not None}
        reasons += [f"{name}: {why}" for name, why in troubles.items() if why]
        if names := [name for name, why in troubles.items() if why is None]:
            return "; ".join([f"{', else '.join(names)}, where it can take the call", *reasons])
        if device == self.reference_for and not reasons:
            return "reference, which nothing known is faster than"
        reasons = reasons or [f"this version has no fast implementation of it for {device} tensors"]
        return "; ".join(["reference", *reasons])

    def __call__(self, *args, **kwargs):
        policy = _active  # Read once: another thread may change it meanwhile.
        if self.name not in policy.ops:
            function, name, reasons, slower = self.reference, "reference", (), None
        else:
            function, name, reasons, slower = self._choose(args, kwargs)
        if reasons and policy.strict:
            raise FallbackError(
                f"{self.name}: {'; '.join(reasons)} (strict=True forbids the fallback to {name}; "
                "call enable(strict=False), or leave this op out of enable(ops=...))"
            )
        # torch.compile traces this: count the call once, when the trace is made, as a constant.
        (_record_trace if torch.compiler.is_compiling() else record.call)(
            self.name, name, reasons, slower
        )
        return function(*args, **kwargs)

    def _choose(
        self, args: tuple, kwargs: dict
    ) -> tuple[Callable, str, tuple[str, ...], str | None]:
        """Return the function, its name, why others were skipped, and why the reference is best."""
        if not torch.compiler.is_compiling() and _transformed():
            why = "under torch.func and forward-mode derivatives only the reference is right"
            return self.reference, "reference", (why,), None
        device = args[0].device.type
        reasons = []
        served = False
        for candidate in self._serving(device):
            if candidate.module is None:
                # Only `status` mentions that an optional package is missing.
                if candidate.note and not candidate.library:
                    served = True
                    reasons.append(candidate.note)
                continue
            served = True
            refuse = getattr(candidate.module, "unsupported_reason", None)
            reason = refuse(*args, **kwargs) if refuse is not None else None
            if reason is None:
                tuning = candidate.tuning
                # Checked first. Where no table prefers the reference, which is nearly everywhere,
                # torch.compile then need not know sizes as numbers.
                if tuning is not None and tuning.has_faster_reference(self.name, args[0].device):
                    kind, size = candidate.module.tuning_key(*args, **kwargs)
                    slower = tuning.faster_reference(self.name, args[0].device, kind, int(size))
                    if slower is not None:
                        return self.reference, "reference", tuple(reasons), slower
                return getattr(candidate.module, self.name), candidate.name, tuple(reasons), None
            reasons.append(f"{candidate.name}: {reason}")
        if not served and device != self.reference_for:
            reasons.append(f"this version has no fast implementation of it for {device} tensors")
        best = None if reasons else f"nothing known is faster for {device} tensors"
        return self.reference, "reference", tuple(reasons), best


def _record_trace(
    op: str, implementation: str, reasons: tuple[str, ...], slower: str | None
) -> None:
    record.call(op, implementation + COMPILED, reasons, slower)


# What torch.compiler.assume_constant_result does; calling it would import Triton.
_record_trace._dynamo_marked_constant = True


def _transformed() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is active.

    The registration of a kernel as a torch op does not support these: a tangent would be lost
    silently.
    """
    stack = torch._C._functorch.peek_interpreter_stack()
    return stack is not None or forward_ad._current_level >= 0


@dataclass(frozen=True)
class OpStatus:
    """What one op would use, and what it has used since the outermost `enable` or `record.clear`.

    ``slower``: how often the reference was used because it is the fastest, either by a table of
    measurements or because nothing faster is known. This does not count as a fallback.
    """

    enabled: bool
    implementations: tuple[str, ...]
    notes: tuple[str, ...]
    calls: dict[str, int]
    fallbacks: dict[str, int]
    slower: dict[str, int]


@dataclass(frozen=True)
class Status:
    """A snapshot of the policy and of the record of calls; print it to read it.

    ``tables`` names, for each GPU, the measurements that kernels take their settings from, and the
    tables that were found but do not count, with the reason. ``replays`` counts replays of CUDA
    graphs: an op call counts when a graph is captured, not when it is replayed.
    """

    enabled: bool
    strict: bool
    ops: dict[str, OpStatus]
    tables: tuple[str, ...]
    replays: dict[str, int]

    def __str__(self) -> str:
        head = "disabled: every op takes its reference"
        if self.enabled:
            head = "enabled" + (", strict" if self.strict else "")
        lines = [f"vfmtok_fast {head}"]
        for name, op in self.ops.items():
            calls = ", ".join(f"{count} {took}" for took, count in sorted(op.calls.items()))
            lines.append(
                f"  {name}: {'on' if op.enabled else 'off'}; has {', '.join(op.implementations)}"
                f"; calls: {calls or 'none'}"
            )
            lines += [f"    {note}" for note in op.notes]
            lines += [f"    fell back {n}x: {reason}" for reason, n in op.fallbacks.items()]
            lines += [f"    took its reference {n}x: {why}" for why, n in op.slower.items()]
        lines += [f"  CUDA graph of {what}: replayed {n}x" for what, n in self.replays.items()]
        lines += [f"  {table}" for table in self.tables]
        return "\n".join(lines)


def status() -> Status:
    """Return what is enabled, and what each op has, used and could not use, and why."""
    policy, taken = _active, record.copy()
    ops = {}
    for name, op in _ops().items():
        there = [c.name for c in op.candidates if c.exists]
        notes = [c.note for c in op.candidates if c.note and (c.exists or c.library)]
        notes += [failure for c in op.candidates for failure in c.failures]
        if "triton" not in there:
            notes.append(
                "no Triton kernel in this version yet, so enable() cannot speed it up on a GPU"
            )
        ops[name] = OpStatus(
            name in policy.ops, ("reference", *there), tuple(notes), *taken.of(name)
        )
    return Status(bool(policy.ops), policy.strict, ops, tables(), dict(taken.replays))


def tables() -> tuple[str, ...]:
    """Say, for each GPU, where enabled kernels get their settings; empty before `enable`."""
    tuning = sys.modules.get(f"{__package__}.kernels.tuning")
    if tuning is None:
        return ()
    return tuple(
        f"cuda:{i} settings: {line}"
        for i in range(torch.cuda.device_count())
        for line in tuning.describe(torch.device("cuda", i))
    )


def forecast(op: str, device: str) -> str:
    """Describe what a call of ``op`` would use on ``device`` ("cuda" or "cpu") if enabled."""
    if device not in ("cuda", "cpu"):
        raise ValueError(f"forecast: device must be 'cuda' or 'cpu', got {device!r}")
    found = _known("forecast", op)
    found.load()
    return found.forecast(device)


def reference(op: str) -> Callable:
    """Return the reference of ``op``, whatever is enabled; it takes validated arguments."""
    return _known("reference", op).reference


def kernel(op: str) -> ModuleType:
    """Return the module of an op's Triton kernels; ImportError if it cannot be imported."""
    candidate = _known("kernel", op).candidates[0]
    candidate.load()
    if candidate.module is None:
        raise ImportError(f"{op}: {candidate.note}")
    return candidate.module
