"""Wheel and editable installs hold the whole package, also beside Hugging Face's `kernels`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import vfmtok_fast

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Everything that a build may read.
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "vfmtok_fast", "kernels")

WHERE = """
import importlib.metadata, json, kernels, vfmtok_fast, vfmtok_fast.kernels
print(json.dumps({
    "package": vfmtok_fast.__file__,
    "kernels": vfmtok_fast.kernels.__file__,
    "hub kernels": kernels.__file__,
    "version": importlib.metadata.version("vfmtok-fast"),
}))
"""

# Hugging Face's `kernels` hooks into every setuptools build of an environment that holds it, under
# this entry point. The build must find that package's own module and not our folder of the same
# name.
HUB_KERNELS_ENTRY_POINTS = """[egg_info.writers]
kernels.lock = kernels.locking:write_egg_lockfile
"""
HUB_KERNELS_LOCKING = """from pathlib import Path

def write_egg_lockfile(cmd, basename, filename):
    Path(__file__).with_name("called").touch()
"""


def run(*command: str | Path, cwd: Path) -> str:
    # A PYTHONPATH to the checkout would hide what was installed.
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    kept = [path for path in paths if path and Path(path).resolve() != ROOT]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(kept)}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def pip(python: Path, *arguments: str | Path, cwd: Path) -> None:
    """Run this environment's pip on another one, without network and with local files only."""
    command = (sys.executable, "-P", "-m", "pip", "--python", python, *arguments)
    run(*command, "--no-build-isolation", "--no-deps", "--no-index", cwd=cwd)


class Environment:
    """A new virtual environment that falls back to this one's packages, because torch is large."""

    def __init__(self, folder: Path):
        venv.create(folder, with_pip=False, symlinks=True)
        self.folder = folder.resolve()
        self.python = self.folder / "bin" / "python"
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        self.site = Path(run(self.python, "-c", code, cwd=folder).strip())
        # Lines of a .pth file add folders without running the .pth files in them, so an editable
        # install of ours there has no effect here.
        borrowed = [p for p in sys.path if Path(p).name in {"site-packages", "dist-packages"}]
        (self.site / "borrowed.pth").write_text("\n".join(borrowed) + "\n", encoding="utf-8")

    def add_hub_kernels(self) -> None:
        """Stand in for Hugging Face's `kernels`: an import package and its setuptools hook."""
        package, info = self.site / "kernels", self.site / "kernels-0.0.0.dist-info"
        package.mkdir()
        (package / "__init__.py").write_text("", encoding="utf-8")
        (package / "locking.py").write_text(HUB_KERNELS_LOCKING, encoding="utf-8")
        info.mkdir()
        metadata = "Metadata-Version: 2.1\nName: kernels\nVersion: 0.0.0\n"
        (info / "METADATA").write_text(metadata, encoding="utf-8")
        (info / "entry_points.txt").write_text(HUB_KERNELS_ENTRY_POINTS, encoding="utf-8")

    def hub_kernels_was_called(self) -> bool:
        return (self.site / "kernels" / "called").exists()

    def where(self, cwd: Path) -> dict[str, str]:
        return json.loads(run(self.python, "-c", WHERE, cwd=cwd))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the sources, because a build leaves folders beside what it builds."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


def build_wheel(python: Path, source: Path, elsewhere: Path) -> Path:
    pip(python, "wheel", source, "--wheel-dir", elsewhere / "wheels", cwd=elsewhere)
    (wheel,) = (elsewhere / "wheels").glob("*.whl")
    return wheel


def modules_in(folder: Path, prefix: str) -> set[str]:
    return {f"{prefix}/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*.py")}


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(source: Path, elsewhere: Path):
    wheel = build_wheel(Path(sys.executable), source, elsewhere)
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        info = {name.split("/", 1)[1]: name for name in archive.namelist() if ".dist-info/" in name}
        metadata = archive.read(info["METADATA"]).decode()
        entry_points = archive.read(info["entry_points.txt"]).decode()
    expected = modules_in(source / "vfmtok_fast", "vfmtok_fast")
    tables = {
        f"vfmtok_fast/kernels/tuned/{p.name}" for p in (source / "kernels/tuned").glob("*.json")
    }
    assert "vfmtok_fast/kernels/tuned/nvidia-h200.json" in tables
    models = source / "vfmtok_fast" / "pretrained"
    tables |= {p.relative_to(source).as_posix() for p in models.rglob("*") if p.is_file()}
    assert "vfmtok_fast/pretrained/emoji/tokenizer/model.safetensors" in tables
    # A folder of modules without an __init__.py would be missing from the wheel.
    expected |= tables | {"vfmtok_fast/py.typed"}
    assert names == expected | modules_in(source / "kernels", "vfmtok_fast/kernels")
    assert f"\nVersion: {vfmtok_fast.__version__}\n" in metadata
    assert "\nRequires-Dist: triton" not in metadata
    assert "licenses/LICENSE" in info
    assert "vfmtok-fast = vfmtok_fast.cli:main" in entry_points


@pytest.mark.slow
def test_wheel_install_beside_hub_kernels(source: Path, elsewhere: Path, tmp_path: Path):
    environment = Environment(tmp_path / "fresh")
    environment.add_hub_kernels()
    wheel = build_wheel(environment.python, source, elsewhere)
    assert environment.hub_kernels_was_called()
    pip(environment.python, "install", wheel, cwd=elsewhere)
    assert environment.where(cwd=elsewhere) == {
        "package": str(environment.site / "vfmtok_fast" / "__init__.py"),
        "kernels": str(environment.site / "vfmtok_fast" / "kernels" / "__init__.py"),
        "hub kernels": str(environment.site / "kernels" / "__init__.py"),
        "version": vfmtok_fast.__version__,
    }
    script = run(environment.folder / "bin" / "vfmtok-fast", "--help", cwd=elsewhere)
    assert script.startswith("usage: vfmtok-fast")


@pytest.mark.slow
def test_editable_install_beside_hub_kernels(source: Path, elsewhere: Path, tmp_path: Path):
    environment = Environment(tmp_path / "fresh")
    environment.add_hub_kernels()
    pip(environment.python, "install", "--editable", source, cwd=elsewhere)
    assert environment.hub_kernels_was_called()
    assert environment.where(cwd=elsewhere) == {
        "package": str(source / "vfmtok_fast" / "__init__.py"),
        "kernels": str(source / "kernels" / "__init__.py"),
        "hub kernels": str(environment.site / "kernels" / "__init__.py"),
        "version": vfmtok_fast.__version__,
    }


def test_every_direct_dependency_has_a_pin_that_it_allows():
    extras = PROJECT["optional-dependencies"]
    asked = [*PROJECT["dependencies"], *extras["test"], *extras["bench"], *extras["dev"]]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {}
    for requirement in (Requirement(line) for line in lines if line and not line.startswith("#")):
        (pin,) = requirement.specifier
        assert pin.operator == "==", requirement
        pins[canonicalize_name(requirement.name)] = pin.version
    for requirement in map(Requirement, asked):
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} has no pin in constraints.txt"
        assert requirement.specifier.contains(pins[name]), f"{requirement}, but pinned {pins[name]}"
