"""The words of a Spec: positions become b, h, q, kv; sizes S_q, S_kv, n0; captured tensors pad, ids, bias."""

from __future__ import annotations

import dataclasses
import functools

import sympy
import torch
from sympy.core.symbol import Str
from torch import fx

from .. import expr as E
from ..expr import Expr
from ..spec import Operand
from .movement import unravel
from .read import Reader
from .roles import Roles

S_Q, S_KV = E.index("S_q"), E.index("S_kv")


@dataclasses.dataclass
class Roster:
    """Captured tensors and sizes under their names in the text."""

    nodes: dict[str, fx.Node]
    unit_dims: dict[str, tuple[int, ...]]
    sizes: dict[str, Expr]
    loads: dict[str, str]
    symbols: dict[Expr, Expr]

    def rename(self, e: Expr) -> Expr:
        def go(x: Expr) -> Expr:
            if x in self.symbols:
                return self.symbols[x]
            if not x.args:
                return x
            args = tuple(a if isinstance(a, Str) else go(a) for a in E.operands(x))
            if E.op_of(x) == "load":
                name = self.loads[args[0].name]
                dropped = self.unit_dims[name]
                kept = [i for d, i in enumerate(args[1:]) if d not in dropped]
                return x.func("load", Str(name), *kept)
            return E.rebuild(x, args)

        return go(e)


class Names:
    """The substitution from the positions of one anchor to the names of a Spec."""

    def __init__(self, r: Reader, roles: Roles, kv: Expr, operands: tuple[Operand, ...]):
        self.r = r
        _, k, _, out = operands
        self.table: dict[Expr, Expr] = {}
        self.lengths: dict[Expr, Expr] = {}
        for symbol, atoms in ((E.B, roles.b), (E.H, roles.h), (E.Q, roles.q), (E.KV, (kv,) if kv != 0 else ())):
            sizes = [r.ranges[a] for a in atoms]
            whole = functools.reduce(lambda x, y: x * y, sizes, sympy.Integer(1))
            r.ranges[symbol] = self.lengths[symbol] = sympy.expand(whole)
            parts = unravel(symbol, sizes, lambda e: (None, None)) if len(atoms) > 1 else [symbol]
            self.table |= dict(zip(atoms, parts))
        r._bounds.clear()

    def rename(self, e: Expr) -> Expr:
        renamed = E.substitute(e, self.table, self.r.bounds)
        return self.r.truth(renamed)

    def may_be_empty(self, keep: Expr) -> bool:
        """False where some kv is proven to be kept in every row."""
        last = self.lengths[E.KV] - 1
        guesses = {sympy.Integer(0), E.Q, last}
        for call in keep.atoms(E.BoolCall):
            if E.op_of(call) in ("le", "eq") and (e := E.operands(call)[0]).coeff(E.KV) in (1, -1):
                guesses.add(sympy.expand(E.KV - e / e.coeff(E.KV)))
        for kv in guesses:
            low, high = self.r.bounds(kv)
            if kv.has(E.KV) or low is None or not (E.at_most(0, low) and E.at_most(high, last)):
                continue
            if self.r.truth(E.substitute(keep, {E.KV: kv}, self.r.bounds)) is E.TRUE:
                return False
        return True

    def capture(self, formulas: tuple[Expr, ...]) -> Roster:
        """Give every captured tensor and size of the formulas a name by its role."""
        roster = Roster({}, {}, {}, {}, {})
        taken: dict[str, int] = {}
        for e in formulas:
            for load in sorted(E.loads(e), key=lambda x: self.r.position[self._node(x)]):
                full = E.operands(load)[0].name
                if full in roster.loads:
                    continue
                stem = role_of(load, e is formulas[2] if len(formulas) > 2 else False)
                taken[stem] = taken.get(stem, -1) + 1
                name = stem + (str(taken[stem]) if taken[stem] else "")
                node = self._node(load)
                roster.loads[full], roster.nodes[name] = name, node
                dims = self.r.shape(node) if isinstance(node.meta["val"], torch.Tensor) else ()
                roster.unit_dims[name] = tuple(d for d, n in enumerate(dims) if n == 1)
        free = {x for e in formulas for x in e.free_symbols} - {E.B, E.H, E.Q, E.KV, E.S}
        known = {self.lengths[E.KV]: S_KV, self.lengths[E.Q]: S_Q}
        for x in sorted(free, key=str):
            symbol = known.get(x) or E.index(f"n{len(roster.sizes)}")
            roster.symbols[x] = symbol
            if symbol not in (S_Q, S_KV):
                roster.sizes[symbol.name] = x
        return roster

    def _node(self, load: Expr) -> fx.Node:
        return self.r.nodes[E.operands(load)[0].name[1:]]


def role_of(load: Expr, in_sink: bool) -> str:
    """pad, mask, ids, slope, sink or bias: what a captured tensor is for, by its dtype and index."""
    idx = [x for x in E.operands(load)[1:] if x != 0]
    if E.kind(load) == "bool":
        return "mask" if E.mentions(load, E.Q) else "pad"
    if E.kind(load) == "int":
        return "ids"
    if in_sink:
        return "sink"
    return "slope" if idx == [E.H] else "bias"
