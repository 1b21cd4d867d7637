"""Triton's interpreter without its repeated work; the results are the same.

NumPy takes hardly any of a kernel's time in the interpreter. Most of it goes into creating types,
several per operation, into comparing them, and into searching `triton.language` at every call for
functions to replace. Here equal types are one object, and what depends on types alone is computed
once.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect

import numpy as np
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def install() -> None:
    """Patch the interpreter once, before the first launch; for Triton 3.6 to 3.8."""
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        # Otherwise sums and products of int32 are computed in int64 as well, for a debug-only
        # assertion.
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    _replace_language_once()
    _share_types()
    _compare_types_fast()
    _remember_common_types()
    _remember_numpy_types()
    _reduce_by_slices()


def _replace_language_once() -> None:
    """Replace and restore functions only at a launch; inner functions find all replaced."""
    replace, replaced, seen_from = interpreter._patch_lang, set(), {}

    def restore_all(restore) -> None:
        replaced.clear()
        restore()

    @functools.wraps(replace)
    def replace_once(fn):
        if (seen := seen_from.get(fn)) is None:
            # Functions of Triton's own library see `triton.language.core` instead.
            seen = {m.__name__ for m in fn.__globals__.values() if inspect.ismodule(m)}
            seen_from[fn] = seen = seen & {"triton.language", "triton.language.core"}
        if seen <= replaced:
            return None  # Only a launch restores, and a launch comes first.
        scope = replace(fn)
        if not replaced:
            scope.restore = functools.partial(restore_all, scope.restore)
        replaced.update(seen)
        return scope

    def replace_member(package, name, member, builder, scope) -> None:
        semantic = TritonSemantic(builder)
        # Skip the wrapper that checks for `_semantic`.
        direct = getattr(member, "__wrapped__", member)

        def call(*args, **kwargs):
            kwargs["_semantic"] = semantic
            return direct(*args, **kwargs)

        scope.set_attr(package, name, call)

    interpreter._patch_lang = replace_once
    interpreter._patch_attr = replace_member


def _share_types() -> None:
    """Keep one `block_type` per element type and shape, which caches what depends on it."""
    block, make_tensor, blocks = core.block_type, core.tensor.__init__, {}
    make_block, to_ir, with_element = block.__init__, block.to_ir, block.with_element_ty

    def key_of(element):
        element = core._unwrap_if_constexpr(element)
        return element.name, getattr(element, "address_space", None)

    def new_block(cls, element_ty, shape):
        sizes = tuple([core._unwrap_if_constexpr(size) for size in shape])
        return blocks.setdefault((*key_of(element_ty), sizes), object.__new__(cls))

    def init_block(self, element_ty, shape):
        if "kept" not in self.__dict__:
            make_block(self, element_ty, shape)  # Raises for a wrong shape, each time.
            self.kept = {}

    def init_tensor(self, handle, type):
        if (known := type.__dict__.get("of_tensors")) is None:
            make_tensor(self, handle, type)
            type.of_tensors = self.shape, self.numel, self.dtype
        else:
            self.handle, self.type = handle, type
            self.shape, self.numel, self.dtype = known

    def with_element_once(self, scalar_ty):
        key = key_of(scalar_ty)
        if key not in self.kept:
            self.kept[key] = with_element(self, scalar_ty)
        return self.kept[key]

    def to_ir_once(self, builder):
        if builder not in self.kept:
            self.kept[builder] = to_ir(self, builder)
        return self.kept[builder]

    block.__new__, block.__init__, core.tensor.__init__ = new_block, init_block, init_tensor
    block.with_element_ty, block.to_ir = with_element_once, to_ir_once


def _compare_types_fast() -> None:
    """Compare identity first, and avoid `isinstance` where the type itself has the answer."""
    dtype, unwrap = core.dtype, core._unwrap_if_constexpr
    broadcast = TritonSemantic.broadcast_impl_value
    integers = frozenset(dtype.SINT_TYPES + dtype.UINT_TYPES)
    plain = {int, float, bool, str, core.tensor, dtype, core.block_type, core.pointer_type}

    def unwrap_fast(value):
        return value if type(value) in plain else unwrap(value)

    def equal(self, other) -> bool:
        other = unwrap_fast(other)
        return self is other or (isinstance(other, dtype) and self.name == other.name)

    def broadcast_fast(self, lhs, rhs):
        return (lhs, rhs) if lhs.type is rhs.type else broadcast(self, lhs, rhs)

    core._unwrap_if_constexpr = unwrap_fast
    dtype.__eq__ = equal
    dtype.is_int = lambda self: self.name in integers
    TritonSemantic.broadcast_impl_value = broadcast_fast


def _remember_common_types() -> None:
    common, known = TritonSemantic.computation_type_impl, {}

    def common_once(self, a_ty, a_is_scalar, b_ty, b_is_scalar, div_or_mod):
        key = a_ty.name, a_is_scalar, b_ty.name, b_is_scalar, div_or_mod
        if key not in known:
            known[key] = common(self, a_ty, a_is_scalar, b_ty, b_is_scalar, div_or_mod)
        return known[key]

    TritonSemantic.computation_type_impl = common_once


def _remember_numpy_types() -> None:
    numpy_type, known = interpreter._get_np_dtype, {}

    def known_type(kind):
        name = kind.scalar.name
        if name not in known:
            known[name] = numpy_type(kind)
        return known[name]

    interpreter._get_np_dtype = known_type


def _reduce_by_slices() -> None:
    """Compute all results of a reduction with a custom function at once, each in the same order."""
    by_element = interpreter.ReduceOps.generic_reduce

    def by_slice(self, input):
        axis = self.axis
        if axis is None or input[0].handle.data.ndim < 2:
            return by_element(self, input)
        slices = [np.moveaxis(x.handle.data, axis, 0) for x in input]
        kinds = [x.dtype for x in input]
        total, *rest = [tuple(map(self.to_tensor, at, kinds)) for at in zip(*slices, strict=True)]
        for at in rest:
            total = self.combine_fn.fn(*total, *at)
            total = total if isinstance(total, tuple) else (total,)
            # Each step rounds to the input's dtype.
            total = tuple(
                self.to_tensor(x.handle.data, k) for x, k in zip(total, kinds, strict=True)
            )
        results = [x.handle.data for x in total]
        if self.keep_dims:
            results = [np.expand_dims(x, axis) for x in results]
        return list(map(self.to_tensor, results, kinds))

    interpreter.ReduceOps.generic_reduce = by_slice
