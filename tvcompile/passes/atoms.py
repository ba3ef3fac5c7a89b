"""Operations that no formula of single elements gives: they stay whole, as atoms that `lift_attention` opens.

    dot(node, *index)   softmax(node, *index)   reduce(node, *index)   dropout(node, p, x)

The rules have the form of `pointwise.py`; exp undoes a log_softmax, so that it is a softmax again.
"""

from __future__ import annotations

import torch
from torch import fx

from .. import expr as E

ATOMS = ("dot", "softmax", "reduce", "dropout")


def _softmax(r, a, n, idx):
    return r.atom("softmax", n, idx)


def _safe_softmax(r, a, n, idx):
    """Zeros where everything is -inf, as scaled_dot_product_attention decomposes."""
    return E.apply("nan_to_zero", r.atom("softmax", n, idx))


def _log_softmax(r, a, n, idx):
    return E.apply("log", r.atom("softmax", n, idx))


def _exp(r, a, n, idx):
    x = r.operand(a["self"], idx, r.position[n])
    return E.operands(x)[0] if E.op_of(x) == "log" and E.op_of(E.operands(x)[0]) == "softmax" else E.apply("exp", x)


def _reduce(r, a, n, idx):
    if isinstance(a.get("other"), fx.Node):
        return E.apply(r.name(n), *(r.operand(a[x], idx, r.position[n]) for x in ("self", "other")))
    return r.atom("reduce", n, idx) if n.meta["val"].dtype.is_floating_point else None


def _sum(r, a, n, idx):
    return (
        r.atom("dot" if is_product_sum(r, n) else "reduce", n, idx) if n.meta["val"].dtype.is_floating_point else None
    )


def is_product_sum(r, n: fx.Node) -> bool:
    """sum(x * y, one dim): a contraction written by hand."""
    a = r.arguments(n)
    dims, source = a.get("dim"), a["self"]
    is_mul = isinstance(source, fx.Node) and r.name(source) == "mul" and len(source.users) == 1
    if not (is_mul and dims is not None and len(dims) == 1):
        return False
    return (
        all(
            isinstance(x, fx.Node) and isinstance(x.meta["val"], torch.Tensor) and x.meta["val"].dim() > 1
            for x in source.args[:2]
        )
        and source.args[0] is not source.args[1]
    )


def _item(r, a, n, idx):
    """getitem of max(dim): a reduction."""
    whole, k = n.args
    return r.atom("reduce", n, idx) if r.name(whole) in ("max", "min") and k == 0 else None


def _dot(r, a, n, idx):
    return r.atom("dot", n, idx) if n.meta["val"].dtype.is_floating_point else None


def _baddbmm(r, a, n, idx):
    here = r.position[n]
    added = E.apply("mul", r.operand(a["self"], idx, here), r.scalar(a.get("beta", 1)))
    product = E.apply("mul", r.atom("dot", n, idx), r.scalar(a.get("alpha", 1)))
    return product if E.constant(r.scalar(a.get("beta", 1))) == 0 else E.apply("add", product, added)


def _dropout(r, a, n, idx):
    x = r.operand(a["input" if "input" in a else "self"], idx, r.position[n])
    if not a.get("train", True) or a["p"] == 0:
        return x
    if r.name(n) == "feature_dropout":
        return None  # drops whole channels
    return E.FloatCall("dropout", E.Str(n.name), r.scalar(a["p"]), x)


ATOM_RULES = {
    "exp": _exp,
    **dict.fromkeys(("softmax", "_softmax", "special_softmax"), _softmax),
    "_safe_softmax": _safe_softmax,
    **dict.fromkeys(("log_softmax", "_log_softmax", "special_log_softmax"), _log_softmax),
    **dict.fromkeys(("amax", "amin", "max", "min", "logsumexp", "mean"), _reduce),
    "sum": _sum,
    "getitem": _item,
    **dict.fromkeys(("matmul", "bmm", "mm", "einsum"), _dot),
    "baddbmm": _baddbmm,
    **dict.fromkeys(("dropout", "native_dropout", "feature_dropout"), _dropout),
}
