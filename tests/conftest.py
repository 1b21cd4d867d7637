"""What all tests share: golden cases, a clean switch, and the `gpu` mark."""

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
    # A shell ignores SIGINT for what it runs in the background, and children inherit that; the
    # tests of Ctrl-C need Python's own handling.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Torch looks at it once, at a process's first product; tests of deterministic mode need it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if os.environ.get("TRITON_INTERPRET") == "1":
        import faster_interpreter

        faster_interpreter.install()
    if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
        # Processes that share the cores must not each start a thread per core; nor their children.
        threads = max(1, (os.cpu_count() or 1) // int(workers))
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Processes take files in this order: the longest first, lest one of them start when the
        # others are done. Else pytest-xdist goes by number of tests, and the interpreter is one.
        rank: dict[Path, int] = {}
        for item in items:
            interpreted = "run_in_interpreter" in getattr(item, "fixturenames", ())
            own = 0 if interpreted else 1 if item.get_closest_marker("slow") else 2
            rank[item.path] = min(own, rank.get(item.path, 2))
        items.sort(key=lambda item: rank[item.path])


@pytest.fixture(autouse=True)
def clean_switch() -> Iterator[None]:
    """Start and end every test with nothing enabled, and no calls or fallbacks recorded."""
    switch.disable()
    switch.record.clear()
    yield
    switch.disable()
    switch.record.clear()


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, torch.Tensor]]:
    """``golden(case)``: what the authors' code gave, by the names of the golden README."""
    return lambda case: load_file(GOLDEN / f"{case}.safetensors")


@pytest.fixture(scope="session")
def official_weights() -> Callable[[str], dict[str, torch.Tensor]]:
    """``official_weights(case)``: the case's weights under the authors' names, float32."""
    recipe_tensor = runpy.run_path(str(GOLDEN / "recipe.py"))["recipe_tensor"]

    def make(case: str) -> dict[str, torch.Tensor]:
        shapes = json.loads((GOLDEN / f"{case}.keys.json").read_text())
        return {key: torch.from_numpy(recipe_tensor(key, s)) for key, s in shapes.items()}

    return make


@pytest.fixture(scope="session")
def check_law() -> Callable[..., None]:
    """``check_law(codes, probabilities)``: codes drawn with fixed seeds follow that law.

    By Pearson's chi-square. The seeds are fixed, so a run never fails by chance; a right sampler
    would fail here with one seed in 10^5, so hardly with the one that was written down.
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
            # No freedom is left: chi-square of one cell would divide by zero.
            assert counts[kept].item() == len(codes)
            return
        # Sums of the two may differ by rounding, which scipy does not forgive.
        expected = probabilities[kept] / probabilities[kept].sum() * len(codes)
        observed = counts[kept]
        # Pearson's approximation wants 5 a cell: rarer codes share one, with one common code so
        # that it has them.
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
    """A CPU nearest_code that answers -7, and no other fast implementation of any op."""

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
    """``run_in_interpreter(__file__, "-k", "name")`` runs tests of kernels in a child pytest.

    The interpreter must be chosen before Triton is imported. float32 and float16 are right in it;
    bfloat16 products are not (triton#11584).
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
