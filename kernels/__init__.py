"""Triton kernels, one file or folder per op; installed as ``vfmtok_fast.kernels``.

Importing this package imports neither kernels nor Triton: `vfmtok_fast.switch` imports the module
of an op when that op is enabled.
"""

if __name__ != "vfmtok_fast.kernels":
    # The repository root is on sys.path, so this folder was imported directly and shadows Hugging
    # Face's package of the same name.
    raise ImportError(
        f"{__file__} is vfmtok_fast's kernels/ folder and cannot be imported as {__name__!r}: "
        "import vfmtok_fast.kernels (after `pip install -e .`); for Hugging Face's `kernels` "
        "package, start Python outside this folder or with `python -P`",
        name=__name__,
        path=__file__,
    )
