"""Experts with a capacity: each place (e, c) of an expert holds one token at most.

    rows[e, c] = sum_p dispatch[p, e, c] x[token(p)]      dispatch[p, e, c] = (ids[p] = e) (c = place(p)) (place(p) < C)

p is a token or a pair of token and choice. Where place(p) counts the pairs of e up to p (a running sum of the ids'
one-hot, less one), no two pairs of e have one place. So what a pair gets back from its place was computed from its
token alone, and the sum over p is x[t]. Second choices begin where the first ones of their expert end: place(p) +
(number of first choices of e, or of those that have a place). The dispatch is a sum of products, or rows put into a
buffer (buffers.py).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Sequence

import sympy
import torch
from torch import fx

from .. import expr as E
from ..expr import Expr, IntCall
from ..spec import Refuse
from .buffers import Way
from .counts import begins_with_zero, summed, whole
from .facts import between
from .ids import compared, distinct, in_range
from .movement import Index, rounding
from .places import digits, dim_of, exclude, flat, least, only_factors, opened, solved
from .projections import Row, is_row
from .routing import unscattered, without_rows_of
from .rows import RowReader, over as positions_of
from .signs import compared_with_zero, needed, nonnegative, positive, with_its_sign
from .terms_of import Term, coefficient, terms_of

NOT_ALONE = "a place of an expert is not proven to hold one token at most"
NOT_DISPATCHED = "the rows of an expert are no dispatched tokens"


@dataclasses.dataclass(frozen=True)
class Place:
    """Pair p of `way` goes to position `expert` = ids(p) and position `at` = running - 1 + added of the rows."""

    way: Way
    expert: Expr
    at: Expr
    ids: Expr
    running: IntCall
    added: Expr


def placed_row(r: RowReader, ways: Sequence[Way], about: fx.Node, row: Row) -> fx.Node:
    """x where the row that the result reads back is x[t]."""
    outer = dataclasses.replace(row.outer, guards=digits(r, row.outer.guards, row.outer.bound))
    places = [_place(r, way, outer, about) for way in _opened_ways(r, ways, outer)]
    _check_apart(r, places, about)
    own = [(p, pair) for p in places for pair in _own_pairs(r, p, outer, row.number)]
    if not own:
        raise Refuse("the places that are read back are not those that tokens were sent to", about)
    for place, pair in own:
        factors = place.way.term.factors
        if len(factors) == 1 and E.op_of(factors[0]) == "load":
            name, *idx = (E.substitute(x, pair, r.bounds) for x in E.operands(factors[0]))
            node = r.nodes[name.name[1:]]
            if is_row(r, node, tuple(idx), row.t, row.over, row.length):
                _check_unrounded(r, node, about, row.dtype)
                return node
    raise Refuse(NOT_DISPATCHED, about)


def _check_unrounded(r: RowReader, x: fx.Node, about: fx.Node, dtype: torch.dtype) -> None:
    """No tensor from the tokens to the experts' rows, which are of `dtype`, is coarser: formulas hold no such casts.

    What a router made integers of on the way tells where tokens go, and is no part of them.
    """
    allowed = max(rounding(x.meta["val"].dtype), rounding(dtype))
    from_x, seen, queue = set(between(r, [x], about)), {about}, [about]
    while queue:
        node = queue.pop()
        if rounding(node.meta["val"].dtype) > allowed:
            raise Refuse(f"tokens are rounded to {node.meta['val'].dtype} as they are sent", node)
        inputs = [n for n in node.all_input_nodes if n in from_x and n not in seen and _is_float(n)]
        seen.update(inputs)
        queue += inputs


def _is_float(node: fx.Node) -> bool:
    return isinstance(val := node.meta.get("val"), torch.Tensor) and val.is_floating_point()


def _opened_ways(r: RowReader, ways: Sequence[Way], outer: Term) -> list[Way]:
    """Without rows that masks chose; a condition `coefficient != 0`, or > 0, as the ways in which it is not zero."""
    found = []
    for way in ways:
        term = without_rows_of(r, way.term)
        for alternative in _not_zero(r, Way(term, way.needs)):
            guards = (*alternative.term.guards, *(g for f in alternative.needs.factors for g in needed(f)))
            guards = digits(r, guards, outer.bound)
            guards = tuple(dict.fromkeys(g for g in map(r.truth, guards) if g is not E.TRUE))
            if not exclude(*guards):
                sent = _unscattered(r, Way(dataclasses.replace(alternative.term, guards=guards), alternative.needs))
                if r.trains and _may_weigh_nothing(r, sent, outer):
                    # What a token that weighs 0 would have got is its weight's gradient.
                    raise Refuse("tokens are sent where a weight is not 0, which it may be", None)
                found.append(sent)
    return found


def _may_weigh_nothing(r: RowReader, sent: Way, outer: Term) -> bool:
    """Is what rows need not proven to be greater than 0 wherever they are sent?"""
    guards = sent.term.guards
    experts = {e: ids for g in guards for e in outer.bound if (ids := compared(g, e)) is not None}
    known = {opened(r, E.substitute(g, experts), ()) for g in guards}
    factors = (opened(r, E.substitute(x, experts), known) for x in sent.needs.factors)
    return not all(positive(r, only_factors(r, x, known)) for x in factors)


def _unscattered(r: RowReader, way: Way) -> Way:
    """What a row needs, read from what was scattered rather than from the matrix [T,E] that it was scattered into."""
    term = unscattered(r, dataclasses.replace(way.term, factors=way.needs.factors))
    sent = dataclasses.replace(way.term, bound=term.bound, guards=term.guards)
    factors = tuple(f for f in term.factors if E.constant(f) is None or E.constant(f) == 0)
    return Way(sent, dataclasses.replace(way.needs, factors=factors))


def _not_zero(r: RowReader, way: Way) -> list[Way]:
    for g in way.term.guards:
        asked = with_its_sign(r, g)
        weight = compared_with_zero(asked)
        if weight is not None:
            found = [_at_own_ids(r, f) for f in coefficient(r, weight)]
            weights = [x for f in found for x in f.factors]
            signed = E.op_of(asked) == "flt" and not all(nonnegative(r, x) for x in weights)
            if found and not signed and not any(f.links for f in found):
                rest = dataclasses.replace(way.term, guards=tuple(o for o in way.term.guards if o is not g))
                # At most one pair has a place, so that the sum of the coefficients is not zero where one is not.
                return [Way(rest.under(f.bound, f.guards), way.needs.times(Term(factors=f.factors))) for f in found]
    return [way]


def _at_own_ids(r: RowReader, term: Term, but: Expr | None = None) -> Term:
    """sum_e (ids = e) f(e) is f(ids), where ids are proven to be one of the e; `but` stays."""
    for e, g in itertools.product([b for b in term.bound if b in r.ranges and b != but], term.guards):
        ids = compared(g, e)
        if ids is not None and in_range(r, ids, r.ranges[e]):
            rest = dataclasses.replace(term, bound=tuple(b for b in term.bound if b != e)).put({e: ids}, r.bounds)
            return _at_own_ids(r, rest, but)
    return term


BY_EXPERT = ("load", "cumsum", "count", "any", "softmax", "reduce", "dot")  # whose last position may be an expert


@dataclasses.dataclass(frozen=True)
class Own:
    """At the ids that are an expert's number: a position of what is bound, or that and `number`."""

    expert: Expr
    ids: Expr
    number: Expr | None = None

    def at(self, r: RowReader, e: Expr, known: Collection[Expr] = ()) -> Expr:
        """A formula there, where what is known holds."""
        e = E.substitute(e, {self.expert: self.ids})
        if self.number is not None:
            calls = [x for x in e.atoms(*E.CALLS) if E.op_of(x) in BY_EXPERT and x.args[-1] == self.number]
            e = E.substitute(e, {x: x.func(*x.args[:-1], self.ids) for x in calls})
        return opened(r, e, known)

    def all(self, r: RowReader, guards: Sequence[Expr], more: Collection[Expr] = ()) -> set[Expr]:
        """Guards there, with what they say of each other used."""
        put = flat(_in_range_of_place(r, self.at(r, g)) for g in guards)
        first = {opened(r, g, more) for g in put} | set(more)
        return {g for g in flat(_in_range_of_place(r, opened(r, x, first)) for x in put) if g is not E.TRUE}


def _own_pairs(r: RowReader, place: Place, outer: Term, number: Expr | None) -> Iterator[dict[Expr, Expr]]:
    """The pairs p, as a value of what is bound, that were sent to the place that `outer` reads, or weigh zero."""
    outer = _at_own_ids(r, outer, but=place.expert)
    for ids in {i for g in outer.guards if (i := compared(g, place.expert)) is not None}:
        own = Own(place.expert, ids, number)
        # What weighs zero may have been sent elsewhere.
        known = own.all(r, (*outer.guards, *(g for f in outer.factors for g in needed(f))))
        sums = {x for g in known for x in g.atoms(IntCall) if E.op_of(x) in ("cumsum", "rank_of")}
        for x in sorted(sums, key=sympy.default_sort_key):
            if E.operands(x)[0] == E.operands(place.running)[0]:
                pair = _pair(r, _pair_of(r, place.running), _pair_of(r, x), place.way.term.bound, place.ids, ids)
                if pair is not None and _sent(r, place, pair, own, known, outer):
                    yield pair


def _sent(r: RowReader, place: Place, pair: dict, own: Own, known: set[Expr], outer: Term) -> bool:
    def at(e: Expr) -> Expr:
        return E.substitute(e, pair, r.bounds)

    if at(place.ids) != own.ids:
        return False
    wanted = [at(g) for g in (*place.way.term.guards, *place.way.needs.guards)]
    if not all(exclude(*known, E.not_(g)) for g in own.all(r, wanted, known)):
        return False
    have = {own.at(r, f, known) for f in outer.factors}
    return {own.at(r, at(f), known) for f in place.way.needs.factors} <= have


def _in_range_of_place(r: RowReader, g: Expr) -> Expr:
    """c = min(x, n) is c = x where c < n, and c = where(keep, x, n) is keep and c = x."""
    if E.op_of(g) != "eq":
        return g
    for c in sympy.Add.make_args(E.operands(g)[0]):
        c = c.as_coeff_Mul()[1]
        value = solved(g, c) if c in r.ranges else None
        if value is not None and E.op_of(value) in ("clamp_max", "min"):
            if E.at_most(r.ranges[c], E.operands(value)[1]):
                return E.eq(c, E.operands(value)[0])
        if value is not None and E.op_of(value) == "where":
            keep, x, beyond = E.operands(value)
            if E.at_most(r.ranges[c], beyond):
                return E.and_(keep, E.eq(c, x))
    return g


def _pair(r: RowReader, number: Expr, value: Expr, bound: tuple[Expr, ...], own: Expr, ids: Expr) -> dict | None:
    """What is bound, where number is value and the pair's own id is `ids`: an expert has one pair of each number."""
    found = _inverse(r, number, value, bound)
    choice = _choice(r, own, bound)
    if found is None and choice is not None:
        found = _inverse(r, number, value, tuple(s for s in bound if s != choice))
        return found and found | {choice: E.operands(ids)[-1]}
    return found


def _choice(r: RowReader, ids: Expr, bound: tuple[Expr, ...]) -> Expr | None:
    """k of ids[t,k] where that is bound and the ids of a token differ: which k it is says the expert."""
    name, *lead, k = E.operands(ids)
    free = k in bound and not any(E.mentions(i, k) for i in lead)
    return k if free and distinct(r, r.nodes[name.name[1:]]) else None


def _inverse(r: RowReader, number: Expr, value: Expr, bound: tuple[Expr, ...]) -> dict[Expr, Expr] | None:
    """What is bound, where number is value: number counts all values of it, each once, from 0 or another number."""
    for order in itertools.permutations(bound):
        strides = [sympy.Mul(*(r.ranges[s] for s in order[i + 1 :])) for i in range(len(order))]
        first = sympy.expand(number - sum(s * stride for s, stride in zip(order, strides)))
        if first.is_Integer:
            found = {}
            for s, stride in zip(order, strides):
                count = E.floordiv(value - first, sympy.expand(stride), r.bounds)
                found[s] = count if s == order[0] else E.mod(count, r.ranges[s], r.bounds)
            inside = all(E.within(x, r.ranges[s], r.bounds) for s, x in found.items())
            return found if inside else None
    return None


def _place(r: RowReader, way: Way, outer: Term, about: fx.Node) -> Place:
    """The proof that pairs of one expert that are sent have different places."""
    bound = way.term.bound
    for e, g in itertools.product(outer.bound, way.term.guards):
        ids = compared(g, e)
        if ids is None or not bound or way.term.links:
            continue
        known = Own(e, ids).all(r, way.term.guards)
        for c, k in itertools.product(outer.bound, known):
            place = solved(k, c)
            for x in place.atoms(IntCall) if place is not None else ():
                proof = {"cumsum": _counts, "rank_of": _ranks}.get(E.op_of(x))
                added = sympy.expand(place - x + int(E.op_of(x) == "cumsum"))
                constant = not any(E.mentions(E.substitute(added, {ids: sympy.Integer(0)}), s) for s in bound)
                if proof is not None and constant and proof(r, x, ids, bound, known):
                    return Place(way, e, c, ids, x, added)
    raise Refuse(NOT_ALONE, about)


def _pair_of(r: RowReader, x: Expr) -> Expr:
    """The number of the pair that a running sum counts last, or whose rank it is."""
    return E.operands(x)[-1] if E.op_of(x) == "rank_of" else E.operands(x)[1:][dim_of(r, x)]


def _ranks(r: RowReader, x: Expr, ids: Expr, bound: tuple[Expr, ...], known: Collection[Expr]) -> bool:
    """Is a rank among pairs of the same id, each of which is bound?"""
    name, _, pair = E.operands(x)
    rank = r.ranks[r.nodes[name.name]]
    return (
        E.substitute(rank.ids, {rank.pair: pair}, r.bounds) == ids and _pair(r, pair, pair, bound, ids, ids) is not None
    )


def _counts(r: RowReader, x: Expr, ids: Expr, bound: tuple[Expr, ...], known: Collection[Expr]) -> bool:
    """Does a running sum over all pairs grow at each pair that is sent to an expert, at the column of its id?"""
    name, *at = E.operands(x)
    d = dim_of(r, x)
    others = [j for j in range(len(at)) if j != d]
    own = [j for j in others if at[j] == ids]
    if len(own) != 1 or any(E.mentions(at[j], s) for j in others if j != own[0] for s in bound):
        return False
    if _pair(r, at[d], at[d], bound, ids, ids) is None:
        return False
    anywhere, there = (
        least(r, _hit(r, x, summed(r, r.nodes[name.name]))),
        least(r, opened(r, _hit(r, x, tuple(at)), known), known),
    )
    return anywhere is not None and anywhere >= 0 and there is not None and there >= 1


def _hit(r: RowReader, running: Expr, at: Index) -> Expr:
    """What a running sum adds at one place."""
    node = r.nodes[E.operands(running)[0].name]
    return whole(r, r.arguments(node)["self"], at, r.position[node])


def _alike(r: RowReader, x: Expr, y: Expr) -> bool:
    """Are two running sums sums of the same?"""
    d, at = dim_of(r, x), list(E.operands(x)[1:])
    if tuple(at) != tuple(E.operands(y)[1:]) or d != dim_of(r, y):
        return False
    at[d] = summed(r, r.nodes[E.operands(x)[0].name])[d]
    return _hit(r, x, tuple(at)) == _hit(r, y, tuple(at))


def _check_apart(r: RowReader, places: list[Place], about: fx.Node) -> None:
    """Places of later choices begin after all of the earlier ones, expert by expert."""
    if len({(p.expert, p.at) for p in places}) > 1:
        raise Refuse(NOT_ALONE, about)
    earlier: list[Place] = []
    for place in sorted(places, key=lambda p: 0 if p.added == 0 else len(sympy.Add.make_args(p.added))):
        counts = [x for x in sympy.Add.make_args(place.added) if x != 0]
        left = list(earlier)
        for count in counts:
            before = next((p for p in left if E.op_of(count) == "count" and _total(r, count, p, place.ids)), None)
            if before is None:
                raise Refuse(NOT_ALONE, about)
            left.remove(before)
        if left:
            raise Refuse(NOT_ALONE, about)
        earlier.append(place)


def _total(r: RowReader, count: Expr, before: Place, ids: Expr) -> bool:
    """Is a count the whole of an earlier running sum at the same expert, or of those of it that are kept?"""
    node = r.nodes[E.operands(count)[0].name]
    source, at, gone = positions_of(r, node, E.operands(count)[1:])
    running = r.nodes[E.operands(before.running)[0].name]
    if E.op_of(before.running) != "cumsum":
        return False
    d, where = dim_of(r, before.running), list(E.operands(before.running)[1:])
    where[where.index(before.ids)] = ids
    hits = r.arguments(running)["self"]
    first = sympy.expand(r.shape(hits)[d] - r.ranges.get(gone[0], sympy.Integer(1))) if len(gone) == 1 else -1
    if first != 0 and not (first == 1 and begins_with_zero(r, running)):
        return False
    where[d] = gone[0] + first
    everyone = r.read(source, at, r.position[node]) == r.read(hits, tuple(where), r.position[running])
    return everyone or _all_kept(r, whole(r, source, at, r.position[node]), before, ids, gone[0])


def _all_kept(r: RowReader, body: Expr, before: Place, ids: Expr, pair: Expr) -> bool:
    """Does a count go over the pairs that have one of the first n places, and is none sent to a place beyond?

    Their places are 0, 1, ... in the order of the running sum, so that as many places are taken as are counted.
    """
    terms, bound = terms_of(r, body), before.way.term.bound
    if len(terms) != 1 or terms[0].factors or terms[0].bound or terms[0].links or len(bound) != 1 or before.added != 0:
        return False
    own = E.substitute(before.ids, {bound[0]: pair})
    hits = [g for g in terms[0].guards if g == E.eq(own, ids)]
    kept = [g for g in terms[0].guards if g not in hits]
    if len(hits) != 1 or len(kept) != 1:
        return False
    # At the expert of the pair itself, with the running sum's own name for it.
    limit = E.substitute(E.substitute(kept[0], {hits[0]: E.TRUE}), {ids: own})
    limit = E.substitute(limit, {pair: bound[0]})
    sums = [x for x in limit.atoms(IntCall) if E.op_of(x) == "cumsum"]
    alike = [x for x in sums if _alike(r, x, before.running)]
    limit = E.substitute(limit, dict.fromkeys(alike, before.running))
    if E.op_of(limit) != "le":
        return False
    n = sympy.expand(before.running - E.operands(limit)[0])
    return n.is_Integer and E.at_most(r.ranges[before.at], n)
