"""From a contraction's own positions to (b, h, q, kv): which dim plays which part.

Every position that occurs is an *atom*. A dim that merges several (n = b*H + h) is split where a
formula asks for it (n // H, n % H). Then: positions that only V has are features; positions that K or
V have are batch and heads; positions of the scores that neither has are q, or the group of a head.
"""

from __future__ import annotations

import dataclasses
import itertools

import sympy
from torch import fx

from .. import expr as E
from ..expr import Expr
from ..spec import Operand
from .movement import Index
from .read import Reader


@dataclasses.dataclass
class Candidate:
    """A node that an operand can be read from, at which index, and the constant factor on the way."""

    node: fx.Node
    idx: Index
    factor: float
    at: int
    widened: bool = False


def candidates(r: Reader, node: fx.Node, idx: Index, at: int) -> list[Candidate]:
    """From an operand of a contraction down through movement, constant factors and widening casts."""
    found: list[Candidate] = []
    factor, widened = 1.0, False
    while True:
        found.append(Candidate(node, idx, factor, at, widened))
        here = r.position[node]
        if node.op != "call_function" or r.changed(node, at):
            return found
        moved = r.step(node, idx)
        if moved is not None:
            node, idx, at = *moved, here
            continue
        a, name = r.arguments(node), r.name(node)
        if name in ("mul", "div") and (c := _number(r, a.get("other"))) and not a.get("rounding_mode"):
            factor *= c if name == "mul" else 1 / c
            node, idx, at = a["self"], r.broadcast(a["self"], idx), here
        elif name == "neg":
            factor, node, at = -factor, a["self"], here
        elif name in ("to", "_to_copy", "type_as", "float") and _widens(a["self"], node):
            node, at, widened = a["self"], here, True
        else:
            return found


def _number(r: Reader, value) -> float | None:
    if isinstance(value, fx.Node):
        if value.op == "call_function" and r.name(value) in ("full", "scalar_tensor") and value.meta["val"].dim() == 0:
            return _number(r, E.constant(r.read(value, (), r.position[value] + 1)))
        value = value.meta.get("val")
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _widens(source: fx.Node, node: fx.Node) -> bool:
    a, b = source.meta["val"].dtype, node.meta["val"].dtype
    return a.is_floating_point and b.is_floating_point and a.itemsize <= b.itemsize


def radix(e: Expr, size: Expr, sizes: dict[Expr, Expr]) -> tuple[Expr, ...] | None:
    """The atoms that an index is the row-major product of, or None. radix(b*H + h) = (b, h)."""
    if e == 0:
        return () if size == 1 else None
    terms = []
    for term in sympy.Add.make_args(e):
        atom = next((t for t in sizes if t == term or t in sympy.Mul.make_args(term)), None)
        if atom is None:
            return None
        terms.append((sympy.expand(term / atom), atom))
    for order in _orders(terms):
        stride = sympy.Integer(1)
        for coefficient, atom in reversed(order):
            if sympy.expand(coefficient - stride) != 0:
                break
            stride = sympy.expand(stride * sizes[atom])
        else:
            if sympy.expand(stride - size) == 0:
                return tuple(atom for _, atom in order)
    return None


def _orders(terms: list) -> list[list]:
    return [list(p) for p in itertools.permutations(terms)] if len(terms) <= 4 else []


def operand(r: Reader, c: Candidate, groups: tuple[tuple[Expr, ...], ...], sizes: dict) -> Operand | None:
    """The candidate as an Operand, or None where its index is not a plain arrangement of the atoms."""
    dims = []
    for e, size in zip(c.idx, r.shape(c.node)):
        atoms = radix(e, size, sizes)
        if atoms is None:
            return None
        dims.append(atoms)
    flat = [a for d in dims for a in d]
    if len(set(flat)) != len(flat) or not set(flat) <= {a for g in groups for a in g}:
        return None
    return Operand(c.node, tuple(dims), groups, sizes)


def splits(formulas: list[Expr], ranges: dict) -> dict[Expr, Expr]:
    """{n: c} for every position n that a formula divides: n // c or n % c."""
    found: dict[Expr, Expr] = {}
    for e in formulas:
        for x in e.atoms(E.IntCall):
            if E.op_of(x) in ("//", "%"):
                n, c = E.operands(x)
                if n in ranges and c != 1 and _divides(c, ranges[n]):
                    found.setdefault(n, c)
    return found


def _divides(c: Expr, size: Expr) -> bool:
    quotient = sympy.cancel(size / c)
    return quotient.is_Integer if quotient.is_number else sympy.denom(quotient) == 1


@dataclasses.dataclass
class Roles:
    """The atoms of each part, in the order in which the op's arguments have them."""

    b: tuple[Expr, ...]
    h: tuple[Expr, ...]
    q: tuple[Expr, ...]
    dv: tuple[Expr, ...]


def _length(size: Expr) -> tuple[bool, int]:
    """Queries are many and of changing number, the heads of a group few."""
    return not size.is_Integer, int(size) if size.is_Integer else 0


def assign(out: list[Expr], in_k: set, in_v: set, in_score: set, in_mask: set, sizes: dict) -> Roles:
    """Parts of the positions `out` of the result; a position of size 1 is 0 there.

    in_k, in_v: positions that index K, V; in_score: that the scores depend on; in_mask: that they
    depend on other than through Q and K.
    """
    features = [i for i, a in enumerate(out) if a in in_v and a not in in_score and a not in in_k]
    dv = features[-1:] or [i for i, a in enumerate(out) if a == 0][-1:]
    rest = [i for i in range(len(out)) if i not in dv]
    rows = [i for i in rest if out[i] != 0 and out[i] not in in_k | in_v]
    unit = [i for i in rest if out[i] == 0]
    masked = [i for i in rows if out[i] in in_mask]
    q = sorted(masked or rows, key=lambda i: _length(sizes[out[i]]))[-1:]
    if not q or (len(rows) == 1 and not masked and unit and unit[-1] > q[0]):
        q = unit[-1:]
    outer = [i for i in rest if i not in q]
    shared = [i for i in outer if i not in rows]
    # Positions that K and V lack are the group of the head before them, or batch if none is.
    group = [i for i in outer if i in rows and i > max(shared, default=-1)]
    if len(outer) < 2:
        heads = group
    elif group and shared:
        heads = [shared[-1], *group] if shared[-1] != outer[0] else group
    else:
        heads = outer[-1:]

    def real(positions: list[int]) -> tuple[Expr, ...]:
        return tuple(out[i] for i in positions if out[i] != 0)

    return Roles(real([i for i in outer if i not in heads]), real(heads), real(q), real(dv))
