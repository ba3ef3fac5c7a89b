"""From a term of a sum over rows to: token t, and for each k the expert ids[t,k], a weight, and whether it counts.

    sum_r (nth(m,1,r) = t) w[nth(m,1,r), nth(m,0,r)] * y[r]     m[k,t] = (ids[t,k] = 3)
    ->  sum_k  where ids[t,k] = 3:  w[t,k] * y(t,k)

Rows go: those chosen by a mask become all positions under the mask, those of a permutation are numbered by what they
were, and a link to the token is solved for one of the positions. Then the experts' own number is compared with the ids.
"""

from __future__ import annotations

import dataclasses

import sympy
import torch
from sympy.core.symbol import Str
from torch import fx

from .. import expr as E
from ..expr import Expr, IntCall
from ..spec import Refuse
from .chosen import Token, any_of, numbered, of_any
from .ids import compared, once, scattered, source_of_scatter
from .masking import hides
from .places import digits, exclude, solved
from .rows import RowReader
from .signs import compared_with_zero, positive
from .terms_of import Term


def without_rows(r: RowReader, term: Term, token: Token, at: int) -> Term:
    """The same sum over positions (t, k) instead of rows."""
    term = _unmasked(r, term, at)
    term = _joined(r, term)
    term = _unsorted(r, term)
    for _ in term.links:
        term = _solved(r, term, token)
    term = term.put({}, r.bounds)
    term = _pinned(_in_digits(r, term), r)
    term = _pinned(dataclasses.replace(term, guards=digits(r, term.guards, term.bound)), r)
    guards: list[Expr] = []
    for g in term.guards:
        g = r.truth(g)
        if g is E.FALSE:
            raise Refuse("a condition on the rows of an expert never holds", None)
        guards += g.args if isinstance(g, sympy.And) else [g]
    guards = _settled(r, [g for g in guards if g is not E.TRUE])
    return of_any(r, unscattered(r, dataclasses.replace(term, guards=tuple(guards))))


def _settled(r: RowReader, guards: list[Expr]) -> list[Expr]:
    """An id that is n is no other number; one of E places that is none of E - 1 is the one that is left."""
    negated = {g: n for g in guards if isinstance(g, sympy.Not) and (n := numbered(g.args[0])) is not None}
    for load in dict.fromkeys(load for load, _ in negated.values()):
        others = {g: n for g, (x, n) in negated.items() if x == load}
        low, high = r.bounds(load)
        count = high + 1 if low == 0 else None
        left = set(range(int(count))) - set(others.values()) if count is not None and count.is_Integer else set()
        known = [n for g in guards if (found := numbered(g)) is not None and found[0] == load for n in found[1:]]
        if len(set(known)) == 1 and known[0] not in others.values():
            guards = [g for g in guards if g not in others]
        elif not known and len(left) == 1:
            guards = [E.eq(load, sympy.Integer(left.pop())), *(g for g in guards if g not in others)]
    return guards


def possible(r: RowReader, term: Term) -> bool:
    """May a term count: do its conditions not exclude each other?"""
    return not exclude(*map(r.truth, term.guards))


def _in_digits(r: RowReader, term: Term) -> Term:
    """A summed position of which n // C and n % C are read is e*C + c."""
    for call in (*_calls(term, "//"), *_calls(term, "%")):
        n, c = E.operands(call)
        if n in term.bound and c.is_Integer and sympy.cancel(r.ranges[n] / c).is_Integer:
            high, low = r.fresh(sympy.cancel(r.ranges[n] / c), "n"), r.fresh(c, "n")
            return _in_digits(r, _bind(term, n, high * c + low, [high, low], r))
    return term


def without_rows_of(r: RowReader, term: Term) -> Term:
    """Rows that go into places: those that a mask chose are every place of the mask, under the mask."""
    return _unsorted(r, _unmasked(r, term, len(r.position)))


def _calls(term: Term, op: str) -> list[Expr]:
    found = {x for e in term.formulas() for x in E.walk(e) if E.op_of(x) == op}
    return sorted(found, key=sympy.default_sort_key)


def _unmasked(r: RowReader, term: Term, at: int) -> Term:
    """Rows chosen by a mask: every place of the mask, where it holds; of its first n rows those with fewer before."""
    while calls := _calls(term, "nth"):
        name, _, row = E.operands(calls[0])
        if row not in term.bound:
            raise Refuse("rows that a mask chose are read at computed numbers", r.nodes[name.name])
        masks = list(dict.fromkeys(r.nodes[E.operands(c)[0].name] for c in calls if E.operands(c)[2] == row))
        mask = max(masks, key=lambda m: len(r.shape(m)))
        count, first = r.first_of(r.ranges[row])
        if r.chosen_by(count) not in masks or not all(m is mask or _is_any(r, m, mask) for m in masks):
            raise Refuse("not all of the rows that a mask chose are used", r.nodes[name.name])
        places = tuple(r.fresh(n, "m") for n in r.shape(mask))
        table = {
            IntCall("nth", Str(m.name), sympy.Integer(c), row): x
            for m in masks
            for c, x in zip(range(m.meta["val"].dim()), places)
        }
        holds = r.truth(E.as_bool(r.read(mask, places, at)))
        term = dataclasses.replace(term.put(table, r.bounds), known=(*term.known, *table.items()))
        bound = tuple(b for b in term.bound if b != row) + tuple(x for x in places if x != 0)
        guards = [holds] if first is None else [holds, E.lt(IntCall("earlier", Str(mask.name), *places), first)]
        term = dataclasses.replace(term, bound=bound, guards=(*term.guards, *guards))
    return term


def _is_any(r: RowReader, some: fx.Node, mask: fx.Node) -> bool:
    """Does some[t] say whether mask[t, k] holds for any k, and for one at most?

    Then the n-th place of the mask is the n-th of `some`, with its k.
    """
    if len(r.shape(some)) != 1 or len(r.shape(mask)) != 2:
        return False
    t = r.fresh(r.shape(some)[0], "t")
    held, over_k = any_of(r, r.truth(E.as_bool(r.read(some, (t,), r.position[some]))))
    if held is None or len(over_k) != 1 or not once(r, (r.nth(mask, 0, t),)):
        return False
    return held == r.truth(E.as_bool(r.read(mask, (t, over_k[0]), r.position[some])))


def _joined(r: RowReader, term: Term) -> Term:
    """Two summed positions that a link makes one."""
    for link in term.links:
        left, right = link
        if left in term.bound and right in term.bound and r.ranges[left] == r.ranges[right]:
            rest = tuple(x for x in term.links if x is not link)
            return _joined(r, _bind(dataclasses.replace(term, links=rest), left, right, [], r))
    return term


def _unsorted(r: RowReader, term: Term) -> Term:
    """Rows in sorted order: numbered as they were before the sort."""
    for call in _calls(term, "perm"):
        name, row = E.operands(call)
        if row not in term.bound:
            continue
        if r.ranges[row] != r.shape(r.arguments(r.nodes[name.name])["self"])[0]:
            raise Refuse("not all of the sorted rows are used", r.nodes[name.name])
        number = r.fresh(r.ranges[row], "n")
        bound = tuple(number if b == row else b for b in term.bound)
        term = dataclasses.replace(term, bound=tuple(b for b in bound if b != 0))
        term = term.put({row: IntCall("inv", name, number)}, r.bounds)
    return term


def _solved(r: RowReader, term: Term, token: Token) -> Term:
    """One link less: rows that are added to token t are those whose token is t."""
    (left, right), *rest = term.links
    term = dataclasses.replace(term, links=tuple(rest))
    if sympy.expand(left - right) == 0:
        return term
    if left in term.bound:
        if not E.within(right, r.ranges[left], r.bounds):
            raise Refuse("rows are added to tokens of another number than theirs", None)
        return _bind(term, left, right, [], r)
    op = E.op_of(left)
    inner, c = E.operands(left) if op in ("//", "%") else (None, None)
    if inner in term.bound:
        if op == "//" and sympy.expand(token.size * c - r.ranges[inner]) == 0:
            k = r.fresh(c, "k")
            return _bind(term, inner, sympy.expand(right * c + k), [k], r)
        if op == "%" and sympy.expand(token.size - c) == 0:
            k = r.fresh(sympy.cancel(r.ranges[inner] / c), "k")
            return _bind(term, inner, sympy.expand(k * c + right), [k], r)
    raise Refuse("the rows added to a token are not proven to be the token's own", None)


def _pinned(term: Term, r: RowReader) -> Term:
    """A summed position that a guard pins to a number is that number."""
    for g in term.guards:
        if E.op_of(g) == "eq":
            number, rest = E.operands(g)[0].as_coeff_Add()
            sign, symbol = rest.as_coeff_Mul()
            if symbol in term.bound and abs(sign) == 1:
                return _pinned(_bind(term, symbol, -number * sign, [], r), r)
            for symbol in term.bound:
                value = solved(g, symbol)
                if value is not None and value.free_symbols <= set(term.bound) and not value.atoms(*E.CALLS):
                    if E.within(value, r.ranges[symbol], r.bounds):
                        return _pinned(_bind(term, symbol, value, [], r), r)
    return term


def _bind(term: Term, symbol: Expr, value: Expr, new: list[Expr], r: RowReader) -> Term:
    bound = tuple(b for b in term.bound if b != symbol) + tuple(x for x in new if x != 0)
    return dataclasses.replace(term, bound=bound).put({symbol: value}, r.bounds)


# Routing matrices [T, E] in which a scatter set K places per row


def unscattered(r: RowReader, term: Term) -> Term:
    """w[t, e] that is zero but where a scatter set it: sum_k where ids[t,k] = e, the value that was set."""
    for i, e in enumerate((*term.factors, *term.guards)):
        is_guard = i >= len(term.factors)
        for load in [x for x in E.walk(e) if E.op_of(x) in ("load", "softmax")]:
            if E.op_of(load.args[-1]) == "load":
                continue
            source = source_of_scatter(r, load)
            if source is None or not vanishes(r, E.where(e, E.number(1.0), E.number(0.0)) if is_guard else e, load):
                continue
            ids, values, k, set_at = source
            expert = load.args[-1]
            chosen = r.read(ids, (*set_at, k), r.position[ids] + 1)
            held = [
                b for b in term.bound if any(compared(g, expert) == E.substitute(chosen, {k: b}) for g in term.guards)
            ]
            if held:
                # The ids of a token are distinct: the one place that is set at this expert is known already.
                values, chosen, k = E.substitute(values, {k: held[0]}), E.substitute(chosen, {k: held[0]}), held[0]
            # A softmax has no value of its own per place that was set: it is read at the id.
            value = values if E.op_of(load) == "load" else load.func(*load.args[:-1], chosen)
            new = E.substitute(e, {load: value})
            factors = tuple(new if f is e and not is_guard else f for f in term.factors)
            guards = tuple(g for g in term.guards if not (is_guard and g is e))
            left = r.truth(E.as_bool(new)) if is_guard else E.TRUE
            if left is not E.TRUE and not positive(r, compared_with_zero(left)):
                guards = (*guards, left)
            bound = term.bound if k == 0 or k in term.bound else (*term.bound, k)
            known = held or E.eq(chosen, expert) in guards
            guards = guards if known else (*guards, E.eq(chosen, expert))
            term = dataclasses.replace(term, factors=factors, guards=guards, bound=bound)
            return unscattered(r, term)
    return term


def vanishes(r: RowReader, e: Expr, load: Expr) -> bool:
    """Is the formula zero wherever the scatter of this load set nothing, whatever others set?"""
    base = base_of(r, e, load)
    if base is not None:
        return base == 0
    op, args = E.op_of(e), E.operands(e)
    if op == "mul" or e.is_Mul:
        return any(vanishes(r, a, load) for a in args)
    if op in ("div", "neg", *E.CASTS):
        return vanishes(r, args[0], load)
    if op == "where":
        c, a, b = args
        known = _decided(r, c, load)
        if known is not None:
            return vanishes(r, a if known else b, load)
        return vanishes(r, a, load) and vanishes(r, b, load)
    if op in ("sigmoid", "exp"):
        return hides(base_of(r, args[0], load), dtype_of(r, load))
    if op == "softmax" and e == load:
        inner = r.read(r.arguments(r.nodes[args[0].name])["self"], args[1:], r.position[r.nodes[args[0].name]])
        (source,) = (x for x in E.walk(inner) if E.op_of(x) == "load" and scattered(r, x))
        return hides(base_of(r, inner, source), dtype_of(r, source))
    return E.constant(e) == 0


def dtype_of(r: RowReader, load: Expr) -> torch.dtype:
    return r.nodes[E.operands(load)[0].name[1:]].meta["val"].dtype


def base_of(r: RowReader, e: Expr, load: Expr) -> float | None:
    """What a formula of one load of a scattered tensor gives where nothing was set."""
    while E.op_of(e) in E.CASTS:
        (e,) = E.operands(e)
    if e == load and (held := scattered(r, e)):
        node, a = held
        at = tuple(r.fresh(n, "z") for n in r.shape(a["self"]))
        return E.constant(r.read(a["self"], at, r.position[node]))
    if E.op_of(e) == "where":
        c, a, b = E.operands(e)
        known = _decided(r, c, load)
        return None if known is None else E.constant(a if known else b)
    return None


def _decided(r: RowReader, c: Expr, load: Expr) -> bool | None:
    """A condition where a scatter set nothing, if that decides it."""
    table = {}
    for x in E.loads(c):
        base = base_of(r, x, load)
        if base is not None:
            table[x] = E.TRUE if E.kind(x) == "bool" and base else E.FALSE if E.kind(x) == "bool" else E.number(base)
            if E.kind(x) == "int":
                table[x] = sympy.Integer(int(base))
    value = E.substitute(c, table) if table else c
    return {E.TRUE: True, E.FALSE: False}.get(value)
