"""Weights that are zero, with no gradient, where a gate is closed: the condition under which their expert counts.

    relu(z), z.clamp(min=0)             not z < 0
    softmax(masked_fill(z, m, -inf))    the weight is not 0

Either holds where the weight is NaN, so that an expert whose weight is unknown counts as it did.
"""

from __future__ import annotations

import torch

from .. import expr as E
from ..expr import Expr
from .masking import hides
from .rows import RowReader
from .terms_of import Term

ZERO = E.number(0.0)


def with_gates(r: RowReader, term: Term) -> Term:
    """The same under the conditions that its factors imply."""
    found = [c for f in term.factors if (c := _open(r, f)) is not None and c not in term.guards]
    return term.under(guards=dict.fromkeys(found))


def _open(r: RowReader, f: Expr) -> Expr | None:
    """Where a factor may be another number than zero, if a gate says that."""
    op, args = E.op_of(f), E.operands(f)
    if op in ("mul", *E.CASTS):
        return next((c for x in args if (c := _open(r, x)) is not None), None)
    if op == "div" and (c := _open(r, args[0])) is not None:
        return E.or_(c, _not_zero(f))  # 0 / 0 counts, as NaN
    if op == "relu" or op in ("clamp_min", "max") and E.constant(args[1]) == 0:
        return E.not_(E.compare_float("lt", args[0], ZERO))
    if op in ("sigmoid", "exp", "softmax") and _is_masked(r, f):
        return _not_zero(f)
    if op == "load":
        node = r.nodes[args[0].name[1:]]
        opened = f if r.changed(node, len(r.position)) else r.read(node, args[1:], r.position[node] + 1)
        return None if opened == f else _open(r, opened)
    return None


def _not_zero(f: Expr) -> Expr:
    return E.not_(E.compare_float("eq", f, ZERO))


def _is_masked(r: RowReader, f: Expr) -> bool:
    """Are some of what a sigmoid, an exp or a softmax is of filled in with a number that hides them?"""
    node = r.nodes[E.operands(f)[0].name] if E.op_of(f) == "softmax" else None
    logits = (
        E.operands(f)[0] if node is None else r.operand(r.arguments(node)["self"], E.operands(f)[1:], r.position[node])
    )
    fills = [E.constant(x) for e in E.walk(logits) if E.op_of(e) == "where" for x in E.operands(e)[1:]]
    dtype = torch.float32 if node is None else node.meta["val"].dtype
    return any(hides(fill, dtype) for fill in fills)
