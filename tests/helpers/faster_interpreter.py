"""Triton's interpreter without what it does over and over; the results are the same.

For every call of one jitted function by another it looks through all of `triton.language` for what
to replace, though the launch has replaced it already: a third of the time of small kernels. Every
operation builds a table of NumPy's types.
"""

from __future__ import annotations

import functools
import inspect

from triton.runtime import interpreter

_replaced: set[str] = set()


def install() -> None:
    """Once, before the first launch; for Triton 3.6 to 3.8."""
    replace = interpreter._patch_lang

    @functools.wraps(replace)
    def replace_once(fn):
        # Functions of Triton's own library see `triton.language.core` instead.
        seen = {m.__name__ for m in fn.__globals__.values() if inspect.ismodule(m)}
        seen &= {"triton.language", "triton.language.core"}
        if seen <= _replaced:
            return None  # Only a launch puts back what it replaced, and a launch comes first.
        scope = replace(fn)
        if not _replaced:
            scope.restore = functools.partial(_restore, scope.restore)
        _replaced.update(seen)
        return scope

    interpreter._patch_lang = replace_once
    numpy_type, known = interpreter._get_np_dtype, {}

    def known_type(kind):
        name = kind.scalar.name
        if name not in known:
            known[name] = numpy_type(kind)
        return known[name]

    interpreter._get_np_dtype = known_type


def _restore(restore) -> None:
    _replaced.clear()
    restore()
