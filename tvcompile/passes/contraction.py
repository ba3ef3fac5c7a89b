"""Sums of products: which element of which operand every term of a contraction reads.

matmul(x, y)[b, i, j]              = sum_r x[b, i, r] * y[b, r, j]
einsum("bqhd,bkhd->bhqk", x, y)[b, h, i, j] = sum_r x[b, i, h, r] * y[b, j, h, r]
"""

from __future__ import annotations

import dataclasses
import string

import sympy
from torch import fx

from ..expr import Expr
from ..spec import Refuse
from .atoms import is_product_sum
from .movement import Index, axis
from .read import Reader


@dataclasses.dataclass(frozen=True)
class Product:
    """The two operands of a contraction, their indices, and the summed position."""

    lhs: tuple[fx.Node, Index]
    rhs: tuple[fx.Node, Index]
    over: Expr
    length: Expr


def contraction(r: Reader, node: fx.Node, idx: Index) -> Product | None:
    """The terms of element `idx` of a contraction without what it adds, or None where the node is none that we read.

    Of an einsum that sums over several letters, `idx` begins with a position for each of `further`.
    """
    rule = CONTRACTIONS.get(r.name(node)) if node.op == "call_function" else None
    a = r.arguments(node) if rule else {}
    return rule(r, a, node, idx) if rule and a.get("out_dtype") is None else None


def added(r: Reader, node: fx.Node, idx: Index) -> Expr | None:
    """What a product has added to it: its bias, of addmm and baddbmm without their factors."""
    a = r.arguments(node)
    bias = {"linear": a.get("bias"), "addmm": a.get("self"), "baddbmm": a.get("self")}.get(r.name(node))
    return None if bias is None else r.operand(bias, idx, r.position[node])


def _matmul(r: Reader, a: dict, node: fx.Node, idx: Index) -> Product | None:
    x, y = (a["self"], a["other"] if "other" in a else a["mat2"])
    return _product(r, x, y, idx)


def _baddbmm(r: Reader, a: dict, node: fx.Node, idx: Index) -> Product | None:
    return _product(r, a["batch1"], a["batch2"], idx)


def _addmm(r: Reader, a: dict, node: fx.Node, idx: Index) -> Product | None:
    return _product(r, a["mat1"], a["mat2"], idx)


def _product(r: Reader, x: fx.Node, y: fx.Node, idx: Index) -> Product | None:
    xs, ys = r.shape(x), r.shape(y)
    if len(xs) < 2 or len(ys) < 2:
        return None
    over = r.fresh(xs[-1], "r")
    batch, row, column = idx[:-2], idx[-2], idx[-1]

    def lead(node, shape):
        return r.broadcast(node, (*batch, shape[-2], shape[-1]))[:-2]

    return Product((x, (*lead(x, xs), row, over)), (y, (*lead(y, ys), over, column)), over, xs[-1])


def _einsum(r: Reader, a: dict, node: fx.Node, idx: Index) -> Product | None:
    if (read := _letters(r, a)) is None:
        return None
    terms, out, summed = read
    if len(idx) != len(out) + len(summed) - 1:
        return None
    letter, shape = summed[-1], r.shape(a["tensors"][0])
    length = shape[terms[0].index(letter)]
    at = {**dict(zip([*summed[:-1], *out], idx)), letter: r.fresh(length, "r")}
    x, y = ((t, r.broadcast(t, tuple(at[c] for c in term))) for t, term in zip(a["tensors"], terms))
    return Product(x, y, at[letter], length)


def _letters(r: Reader, a: dict) -> tuple[list[str], str, list[str]] | None:
    """(the two terms, the result, the summed letters, which both terms have)"""
    tensors = a["tensors"]
    if len(tensors) != 2 or a.get("path") is not None:
        return None
    terms, out = letters(a["equation"], [len(r.shape(t)) for t in tensors])
    summed = [c for c in dict.fromkeys(terms[0] + terms[1]) if c not in out]
    once = all(len(set(t)) == len(t) for t in (*terms, out))
    if not once or not summed or not set(summed) <= set(terms[0]) & set(terms[1]):
        return None
    # einsum stretches a dim of 1: a sum over it is not as long as the first term says.
    lengths = [[r.shape(t)[term.index(c)] for c in summed] for t, term in zip(tensors, terms)]
    return (terms, out, summed) if lengths[0] == lengths[1] else None


def further(r: Reader, node: fx.Node) -> tuple[Expr, ...]:
    """The sizes of all summed letters of an einsum but the last: an expert's, where its features come last."""
    a = r.arguments(node)
    read = _letters(r, a) if r.name(node) == "einsum" else None
    return tuple(r.shape(a["tensors"][0])[read[0][0].index(c)] for c in read[2][:-1]) if read else ()


def letters(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """The terms and the result of an einsum equation, with the ellipsis spelled out."""
    equation = equation.replace(" ", "")
    left, arrow, out = equation.partition("->")
    terms = left.split(",")
    free = [c for c in string.ascii_letters if c not in equation]
    most = max((rank - len(t) + 3 for t, rank in zip(terms, ranks) if "..." in t), default=0)
    dots = "".join(free[:most])
    full = []
    for term, rank in zip(terms, ranks):
        hidden = rank - len(term) + 3
        full.append(term.replace("...", dots[most - hidden :] if "..." in term else ""))
    if not arrow:
        once = sorted(c for c in set(left) if c.isalpha() and left.count(c) == 1)
        out = ("..." if "..." in left else "") + "".join(once)
    return full, out.replace("...", dots)


def operands_of(r: Reader, node: fx.Node, idx: Index) -> tuple[list[tuple[fx.Node, Index]], list[Expr]]:
    """([(operand, its index)], the summed positions) of a matmul or an einsum of any number of operands."""
    if r.name(node) == "einsum":
        a = r.arguments(node)
        tensors, shapes = a["tensors"], [r.shape(t) for t in a["tensors"]]
        names, out = letters(a["equation"], [len(s) for s in shapes])
        if all(len(set(t)) == len(t) for t in (*names, out)):
            sizes = {c: n for term, shape in zip(names, shapes) for c, n in zip(term, shape) if n != 1}
            at = {c: r.fresh(sizes.get(c, sympy.Integer(1)), "k") for c in sizes}
            at |= dict(zip(out, idx))
            found = [
                (t, r.broadcast(t, tuple(at.get(c, sympy.Integer(0)) for c in term))) for t, term in zip(tensors, names)
            ]
            return found, [at[c] for c in sizes if c not in out]
    inner = contraction(r, node, idx)
    if inner is None:
        raise Refuse("a sum of products has a form that is not read", node)
    return [inner.lhs, inner.rhs], [inner.over]


def without_sum(r: Reader, node: fx.Node) -> bool:
    """Is a node an einsum that only multiplies?"""
    if r.name(node) != "einsum":
        return False
    a = r.arguments(node)
    terms, out = letters(a["equation"], [len(r.shape(t)) for t in a["tensors"]])
    return all(set(t) <= set(out) and len(set(t)) == len(t) for t in terms)


def _sum(r: Reader, a: dict, node: fx.Node, idx: Index) -> Product | None:
    """sum(x * y, dim), the contraction written by hand."""
    if not is_product_sum(r, node):
        return None
    product = a["self"]
    shape = r.shape(product)
    d = axis(a["dim"][0], len(shape))
    over = r.fresh(shape[d], "r")
    rest = idx[:d] + idx[d + 1 :] if a.get("keepdim") else idx
    full = (*rest[:d], over, *rest[d:])
    x, y = product.args[:2]
    return Product((x, r.broadcast(x, full)), (y, r.broadcast(y, full)), over, shape[d])


CONTRACTIONS = {
    "matmul": _matmul,
    "bmm": _matmul,
    "mm": _matmul,
    "baddbmm": _baddbmm,
    "addmm": _addmm,
    "einsum": _einsum,
    "sum": _sum,
}
