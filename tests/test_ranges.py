"""The range of an integer formula holds every number that it takes, by brute force; and is as narrow as is needed."""

from __future__ import annotations

import itertools

import pytest
import sympy
from hypothesis import given, settings, strategies as st

from tvcompile import expr as E
from tvcompile.passes.ranges import interval

SIZES = {E.Q: 5, E.KV: 7}
IDS = E.load("%ids", "int", E.Q)  # -2 .. 4
HELD = (-2, 0, 4, 1, 3)


def known(e):
    if e in SIZES:
        return sympy.Integer(0), sympy.Integer(SIZES[e] - 1)
    return (sympy.Integer(min(HELD)), sympy.Integer(max(HELD))) if e == IDS else None


def of(e):
    return interval(e, known, {})


small = st.integers(-4, 8).map(E.number)


def _deeper(inner):
    compare = st.sampled_from([E.le, E.lt, E.eq, lambda a, b: E.not_(E.eq(a, b))])
    condition = st.tuples(compare, inner, inner).map(lambda t: t[0](*t[1:]))
    joined = st.tuples(st.sampled_from([E.and_, E.or_]), condition, condition).map(lambda t: t[0](*t[1:]))
    return st.one_of(
        st.tuples(st.sampled_from(["add", "sub", "min", "max", "clamp_min", "clamp_max"]), inner, inner).map(
            lambda t: E.apply(*t)
        ),
        st.tuples(st.just("mul"), inner, st.one_of(small, inner)).map(lambda t: E.apply(*t)),
        st.tuples(st.sampled_from(["//", "%"]), inner, st.integers(1, 5).map(E.number)).map(lambda t: E.apply(*t)),
        st.tuples(st.one_of(condition, joined), inner, inner).map(lambda t: E.where(*t)),
    )


formulas = st.recursive(st.one_of(st.sampled_from([E.Q, E.KV, IDS]), small), _deeper, max_leaves=8)


@settings(max_examples=400, deadline=None)
@given(formulas)
def test_every_number_is_in_the_range(e):
    low, high = of(e)
    for q, kv in itertools.product(range(SIZES[E.Q]), range(SIZES[E.KV])):
        at = E.substitute(e, {IDS: E.number(HELD[q])})
        value = E.substitute(at, {E.Q: E.number(q), E.KV: E.number(kv)})
        assert value.is_Integer, value
        assert (low is None or low <= value) and (high is None or value <= high), (e, low, high, value)


@pytest.mark.parametrize(
    "e, low, high",
    [
        (E.where(E.eq(E.Q, E.number(4)), E.number(0), E.Q), 0, 3),
        (E.where(E.eq(E.Q, E.number(0)), E.number(3), E.Q), 1, 4),
        (E.where(E.eq(E.Q, E.number(2)), E.number(0), E.Q), 0, 4),
        (E.where(E.lt(E.Q, E.number(3)), E.Q, E.number(0)), 0, 2),
        (E.where(E.lt(E.number(1), E.Q), E.Q, E.number(2)), 2, 4),
        (E.where(E.lt(IDS, E.number(0)), IDS + 5, IDS), 0, 4),
        (E.where(E.and_(E.le(E.number(0), IDS), E.lt(IDS, E.number(3))), IDS, E.number(1)), 0, 2),
        (E.where(E.or_(E.lt(IDS, E.number(0)), E.lt(E.number(3), IDS)), E.number(1), IDS), 0, 3),
        (E.apply("clamp_min", IDS, E.number(0)), 0, 4),
        (E.apply("clamp_max", E.load("%any", "int", E.Q), E.number(3)), None, 3),
        (E.apply("clamp_max", E.apply("clamp_min", E.load("%any", "int", E.Q), E.number(0)), E.number(3)), 0, 3),
        (E.where(E.le(E.Q, E.KV), E.Q, E.number(0)), 0, 4),
        (E.where(E.or_(E.le(E.Q, E.number(1)), E.eq(E.Q, E.number(3))), E.Q, E.number(2)), 0, 4),
        (E.where(E.and_(E.le(E.Q, E.number(1)), E.le(E.number(0), IDS)), E.number(2), E.Q), 0, 4),
        (E.Q * E.KV, 0, 24),
        (E.Q * IDS, -8, 16),
        (E.apply("//", E.Q - E.KV, E.number(3)), -2, 1),
    ],
)
def test_a_range_is_narrow(e, low, high):
    assert of(e) == (low if low is None else sympy.Integer(low), sympy.Integer(high))
