"""Triton's interpreter without what costs it two thirds of its time and changes nothing.

It replaces the language's functions anew at every call of a device function, and computes by six operations whether
integers overflow, which it then asserts only in debug mode. What another version of Triton has no place for stays as
it is there: this is only speed.
"""

from __future__ import annotations

import numpy as np
from triton.language import core, semantic
from triton.runtime import interpreter


def faster() -> None:
    if hasattr(interpreter, "_LangPatchScope"):
        replace(interpreter, "_patch_lang", once_a_launch)
    replace(interpreter, "_get_np_dtype", once_a_type)
    replace(semantic.TritonSemantic, "binary_op_sanitize_overflow_impl", where_it_counts)


def replace(owner, name, made) -> None:
    own = getattr(owner, name, None)
    if own is not None and own.__module__ != __name__:
        setattr(owner, name, made(own))


def once_a_launch(patch):
    """`_patch_lang`, which a launch calls, and each call of a device function under it: the first does it all."""
    under_way = False

    def once(fn):
        nonlocal under_way
        if under_way:
            return None
        scope, under_way = patch(Everything), True
        restore = scope.restore

        def restored() -> None:
            nonlocal under_way
            under_way = False
            restore()

        scope.restore = restored
        return scope

    return once


class Everything:
    """As a function that sees all that is replaced."""

    __globals__ = {"tl": interpreter.tl, "core": core}


def once_a_type(dtype_of):
    found: dict[str, np.dtype] = {}

    def once(kind):
        name = kind.scalar.name
        if name not in found:
            found[name] = dtype_of(kind.scalar)
        return found[name]

    return once


def where_it_counts(check):
    def checked(self, *args) -> None:
        if self.builder.options.debug:
            check(self, *args)

    return checked
