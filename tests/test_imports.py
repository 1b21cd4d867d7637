"""Dependencies point one way, and nothing but the kernels needs Triton."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vfmtok_fast

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "vfmtok_fast"

# The parts of the package and the parts that each may import, lowest first. A part may import only
# from lines above its own, so the table cannot contain a cycle.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "temporary": set(),
    "bars": set(),
    "lazy": set(),
    "record": set(),
    "switch": {"record"},
    "tf32": set(),
    "graphs": {"switch"},
    "decoding": set(),
    "functional": set(),
    "configs": set(),
    "reference": {"decoding", "functional"},
    "cpu": {"decoding", "functional"},
    "kernels": {"decoding", "functional"},
    "providers": set(),
    "images": set(),
    "hub": {"errors", "temporary"},
    "timing": set(),
    "ops": {"switch", "decoding", "reference", "cpu", "kernels", "providers"},
    "checks": {"ops"},
    "checkpoint": {"errors", "functional", "hub"},
    "tokenizer": {
        *("errors", "switch", "tf32", "graphs", "functional", "configs", "hub", "checks"),
        *("checkpoint", "ops"),
    },
    "generator": {
        *("errors", "switch", "tf32", "graphs", "decoding", "functional", "configs", "hub"),
        *("checks", "checkpoint", "ops"),
    },
}
BASE = set(ALLOWED)
ALLOWED["untrained"] = BASE
ALLOWED["visualize"] = BASE
ALLOWED["cache"] = BASE
ALLOWED["sample_folder"] = BASE | {"cache"}
ALLOWED["tuner"] = BASE
ALLOWED["evaluation"] = BASE | {"cache"}
ALLOWED["training"] = BASE | {"visualize", "cache", "evaluation"}
# What users import: the models, dispatch and the cache, plus the tools.
ALLOWED["__init__"] = {
    *("lazy", "switch", "images", "ops", "tokenizer", "generator", "cache"),
    *("tuner", "training", "evaluation"),
}
ALLOWED["cli"] = BASE | {
    *("untrained", "visualize", "cache", "sample_folder", "tuner", "evaluation", "training"),
    "__init__",  # its version
}
ALLOWED["__main__"] = {"cli"}

# The rooms (subpackages) of the cache; each uses only those before it.
ROOMS = ("store", "format", "sources", "make", "read", "check", "__init__")

# External packages that the lower parts may import, besides the standard library.
OUTSIDE: dict[str, set[str]] = {
    "lazy": set(),
    "record": set(),
    "switch": {"torch"},
    "tf32": {"torch"},
    "graphs": {"torch"},
    "decoding": {"torch"},
    "errors": set(),
    "temporary": set(),
    "functional": {"torch", "einops"},
    "configs": set(),
    "checks": {"torch"},
    "reference": {"torch"},
    "cpu": {"torch"},
    "kernels": {"torch", "triton"},
    "providers": {"torch", "flash_attn", "xformers"},
    "images": {"torch", "numpy", "PIL"},
    "hub": {"torch", "huggingface_hub", "safetensors"},
    "timing": {"torch"},
    "ops": {"torch"},
}
# Top-level folders of the repository: importable only by accident, if it is on sys.path.
NOT_PACKAGES = {"kernels", "benchmarks", "tests", "examples", "setup"}


def module_files() -> dict[str, Path]:
    """Return every module by its import name."""
    files = {}
    for name, folder in ((PACKAGE, ROOT / PACKAGE), (f"{PACKAGE}.kernels", ROOT / "kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            files[".".join((name, *parts))] = path
    return files


MODULES = module_files()


def imports(name: str, source: str, is_package: bool) -> list[str]:
    """Return every import of a module, at any nesting; ``from x import y`` gives ``x.y``."""
    package = name.split(".") if is_package else name.split(".")[:-1]
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            base = []
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
        else:
            continue
        found += [".".join([*base, alias.name]) for alias in node.names]
    return found


def imports_of(name: str) -> list[str]:
    path = MODULES[name]
    return imports(name, path.read_text(encoding="utf-8"), path.name == "__init__.py")


def module_of(imported: str) -> str | None:
    """Return our module that an import names, itself or through one of its attributes."""
    owner = imported.rpartition(".")[0]
    return next((name for name in (imported, owner) if name in MODULES), None)


def part_of(module: str) -> str:
    """``vfmtok_fast.ops.checks`` gives ``ops``; the package itself gives ``__init__``."""
    return (module.split(".") + ["__init__"])[1]


def room_of(module: str) -> int:
    return ROOMS.index((module.split(".") + ["__init__"])[2])


def violation(name: str, target: str) -> str | None:
    """Return why the module may not import this, or None."""
    part = part_of(name)
    top = target.split(".")[0]
    if top in NOT_PACKAGES:
        return f"{name} imports {target}: a folder of the repository, not an installed package"
    if top != PACKAGE:
        if top in sys.stdlib_module_names or part not in OUTSIDE or top in OUTSIDE[part]:
            return None
        return f"{name} imports {target}: {part} may import only {sorted(OUTSIDE[part])}"
    module = module_of(target)
    if module is None:
        return f"{name} imports {target}, which does not exist"
    # A part that does not exist yet looks like an attribute of the package, but its rule applies
    # already.
    target_part = part_of(target) if part_of(target) in ALLOWED else part_of(module)
    allowed = {part, *ALLOWED[part]}
    if target_part == part == "cache" and room_of(module) > room_of(name):
        return f"{name} imports {target}: a later room of the cache"
    if target_part in allowed:
        return None
    return f"{name} imports {target}: {part} may import only {sorted(allowed)} there"


def test_every_part_has_a_rule():
    unknown = {part_of(name) for name in MODULES} - set(ALLOWED)
    assert not unknown, f"add {sorted(unknown)} to ALLOWED, as low as it can stand"


def test_the_rules_hold_no_cycle():
    order = list(ALLOWED)
    for part, allowed in ALLOWED.items():
        assert all(order.index(other) < order.index(part) for other in allowed), part


@pytest.mark.parametrize("name", MODULES)
def test_module_imports_only_what_its_part_may(name: str):
    if part_of(name) not in ALLOWED:
        pytest.fail(f"{part_of(name)} has no rule")
    found = [violation(name, imported) for imported in imports_of(name)]
    assert not any(found), "\n".join(filter(None, found))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("vfmtok_fast.reference.nearest_code", "from ..kernels import nearest_code"),
        ("vfmtok_fast.kernels.nearest_code", "from vfmtok_fast.reference import nearest_code"),
        ("vfmtok_fast.kernels.nearest_code", "import numpy"),
        ("vfmtok_fast.cpu.nearest_code", "def f():\n    import triton"),
        ("vfmtok_fast.cpu.decode_attention", "import flash_attn"),
        ("vfmtok_fast.providers.decode_attention_xformers", "from ..cpu import linear"),
        ("vfmtok_fast.ops.nearest_code", "from .. import tokenizer"),
        ("vfmtok_fast.tokenizer.model", "from ..reference.nearest_code import nearest_code"),
        ("vfmtok_fast.tokenizer.model", "from vfmtok_fast import VFMTok"),
        ("vfmtok_fast.tokenizer.model", "import vfmtok_fast.images"),
        ("vfmtok_fast.checkpoint", "from .tokenizer import VFMTok"),
        ("vfmtok_fast.switch", "from . import ops"),
        ("vfmtok_fast.cache.format.index", "from ... import cli"),
        ("vfmtok_fast.cache.format.index", "from ..sources import Source"),
        ("vfmtok_fast.cache.make.build", "from .. import build"),
        ("vfmtok_fast.cli", "import kernels.nearest_code"),
        ("vfmtok_fast.cli", "from .no_such_module import anything"),
    ],
)
def test_a_wrong_import_is_seen(name: str, line: str):
    (imported,) = imports(name, line, is_package=False)
    assert violation(name, imported)


def test_only_the_switch_imports_by_name():
    """Imports by a string would evade the rules; the switch needs them to import late."""
    by_name = {
        part_of(name)
        for name in MODULES
        for target in imports_of(name)
        if target.split(".")[0] in {"importlib", "runpy", "pkgutil"}
        and not target.startswith(("importlib.metadata", "importlib.util", "importlib.resources"))
    }
    # The package's public names are imported on first use.
    assert by_name <= {"switch", "lazy"}


def test_every_op_is_one_name_at_the_seam_and_in_the_reference():
    ops = vfmtok_fast.status().ops
    assert ops
    missing = [f"{part}/{op}.py" for op in ops for part in ("ops", "reference")]
    missing = [name for name in missing if not (ROOT / PACKAGE / name).exists()]
    assert not missing


def test_no_module_is_called_utils():
    assert not [name for name in MODULES if name.split(".")[-1] in {"utils", "helpers", "misc"}]


def run_python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_import_leaves_triton_alone(tmp_path: Path):
    code = f"import sys, {PACKAGE}\n{PACKAGE}.status()\nprint('triton' in sys.modules)"
    result = run_python(code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["False"], (
        "something imported at the top of a module brings Triton in; torchvision does, so timm "
        "does, and so does torch._dynamo: import them where they are used"
    )


@pytest.mark.slow
def test_everything_but_the_kernels_imports_without_triton(tmp_path: Path):
    """This covers optional dependencies: a top-level import of one of them fails here."""
    late = (f"{PACKAGE}.kernels.", f"{PACKAGE}.providers.")
    names = [name for name in MODULES if not name.startswith(late)]
    lines = [f"import {name}" for name in names if not name.endswith(".__main__")]
    # The documented way to make an import fail; a finder that raises would break torch's own.
    code = "\n".join(["import sys", "sys.modules['triton'] = None", *lines, "print('done')"])
    result = run_python(code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["done"]


def test_the_kernels_folder_refuses_to_be_imported_as_kernels():
    code = "try:\n    import kernels\nexcept ImportError as error:\n    print(error)"
    result = run_python(code, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "import vfmtok_fast.kernels" in result.stdout
