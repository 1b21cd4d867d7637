"""The one thing that pyproject.toml cannot express: kernels/ installs as vfmtok_fast.kernels."""

from setuptools import find_packages, setup

KERNELS = "vfmtok_fast.kernels"

setup(
    packages=[
        *find_packages(include=["vfmtok_fast", "vfmtok_fast.*"]),
        KERNELS,
        *(f"{KERNELS}.{name}" for name in find_packages("kernels")),
    ],
    package_dir={KERNELS: "kernels"},
)
