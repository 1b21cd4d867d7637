"""Shared by all tests: golden cases, a clean dispatch state, and the `gpu` mark."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vfmtok_fast import switch

GOLDEN = Path(__file__).parent / "data" / "golden"


def pytest_configure(config: pytest.Config) -> None:
    # A shell makes background jobs ignore SIGINT, and their children inherit that. The Ctrl-C tests
    # need Python's own handler.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Torch reads it once, at a process's first matrix product. Deterministic mode needs it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if os.environ.get("TRITON_INTERPRET") == "1":
        import faster_interpreter

        faster_interpreter.install()
    if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
        # Processes that share the cores must not each start one thread per core, nor may their
        # children.
        threads = max(1, (os.cpu_count() or 1) // int(workers))
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Worker processes take files in this order. The longest come first, so that none of them
        # starts when the others are done. By default pytest-xdist sorts files by number of tests,
        # but a whole run in the interpreter is one test.
        rank: dict[Path, int] = {}
        for item in items:
            interpreted = "run_in_interpreter" in getattr(item, "fixturenames", ())
            own = 0 if interpreted else 1 if item.get_closest_marker("slow") else 2
            rank[item.path] = min(own, rank.get(item.path, 2))
        items.sort(key=lambda item: rank[item.path])


@pytest.fixture(autouse=True)
def clean_switch() -> Iterator[None]:
    """Start and end every test with no op enabled and no calls or fallbacks recorded."""
    switch.disable()
    switch.record.clear()
    yield
    switch.disable()
    switch.record.clear()


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, torch.Tensor]]:
    """``golden(case)``: outputs of the authors' code, under the names in the golden README."""
    return lambda case: load_file(GOLDEN / f"{case}.safetensors")


@pytest.fixture(scope="session")
def official_weights() -> Callable[[str], dict[str, torch.Tensor]]:
    """``official_weights(case)``: the case's float32 weights under the authors' names."""
    recipe_tensor = runpy.run_path(str(GOLDEN / "recipe.py"))["recipe_tensor"]

    def make(case: str) -> dict[str, torch.Tensor]:
        shapes = json.loads((GOLDEN / f"{case}.keys.json").read_text())
        return {key: torch.from_numpy(recipe_tensor(key, s)) for key, s in shapes.items()}

    return make


@pytest.fixture(scope="session")
def check_law() -> Callable[..., None]:
    """``check_law(codes, probabilities)``: check that codes drawn with fixed seeds follow that law.

    It uses Pearson's chi-square test. The seeds are fixed, so a run never fails by chance. A
    correct sampler would fail with one seed in 10^5, so the seed that was written down is very
    unlikely to fail.
    """
    from scipy import stats

    def check(codes: Tensor, probabilities: Tensor | np.ndarray, p_value: float = 1e-5) -> None:
        probabilities = np.asarray(probabilities, dtype=np.float64)
        assert codes.numel() > 0, "no code was drawn"
        counts = np.bincount(codes.numpy(), minlength=len(probabilities))
        assert len(counts) == len(probabilities), "a code that does not exist was drawn"
        kept = probabilities > 0
        assert counts[~kept].sum() == 0, "a code that the filters drop was drawn"
        if kept.sum() == 1:
            # No degree of freedom is left: a chi-square test of one cell would divide by zero.
            assert counts[kept].item() == len(codes)
            return
        # The two totals may differ by rounding, which scipy rejects.
        expected = probabilities[kept] / probabilities[kept].sum() * len(codes)
        observed = counts[kept]
        # Pearson's approximation needs an expected count of 5 per cell. Rarer codes share one cell,
        # together with one common code that brings it to 5.
        rare = expected < 5
        if rare.any():
            rare[np.argmin(np.where(rare, np.inf, expected))] = True
            expected = np.append(expected[~rare], expected[rare].sum())
            observed = np.append(observed[~rare], observed[rare].sum())
        assert len(expected) > 1, "too few draws for this law: all cells had to be merged"
        assert stats.chisquare(observed, expected).pvalue > p_value

    return check


@pytest.fixture
def fake_op(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A CPU nearest_code that always returns -7; no other op has a fast implementation."""

    def nearest_code(z, codebook, *, k=1, normalize=True, return_score=False):
        return torch.full((z.shape[0],), -7)

    module = types.ModuleType("fake")
    module.nearest_code = nearest_code
    for op in switch._registry.values():
        for candidate in op.candidates:
            there = op.name == "nearest_code" and candidate.name == "cpu"
            monkeypatch.setattr(candidate, "load", lambda: None)
            monkeypatch.setattr(candidate, "module", module if there else None)
            monkeypatch.setattr(candidate, "note", "")
    monkeypatch.setattr(
        switch.Implementation, "exists", property(lambda self: self.module is not None)
    )
    return module


@pytest.fixture
def run_in_interpreter() -> Callable[..., None]:
    """``run_in_interpreter(__file__, "-k", "name")`` runs kernel tests in a child pytest.

    The interpreter must be selected before Triton is imported. It computes float32 and float16
    correctly, but not bfloat16 products (triton#11584).
    """

    def run(file: str, *arguments: str) -> None:
        command = [sys.executable, "-P", "-m", "pytest", "--import-mode=importlib", "-q", file]
        result = subprocess.run(
            [*command, "-p", "no:cacheprovider", *arguments],
            cwd=Path(file).parents[2],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            timeout=1200,
        )
        assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
        assert " passed" in result.stdout

    return run
