"""Formulas: what is written reads back, and simplifying never changes a value."""

import itertools

import pytest
from hypothesis import given, settings, strategies as st

from tvcompile import expr as E, syntax
from tvcompile.spec import AttentionSpec

B, H, Q, KV = E.B, E.H, E.Q, E.KV


def value(e, at):
    """The Python value of an integer or boolean formula at a position."""
    known = E.constant(e)
    if known is not None:
        return known
    op, args = E.op_of(e), E.operands(e)
    if e in at:
        return at[e]
    x = [value(a, at) for a in args]
    table = {
        "le": lambda a: a <= 0, "eq": lambda a: a == 0, "//": lambda a, b: a // b, "%": lambda a, b: a % b,
        "where": lambda c, a, b: a if c else b, "abs": abs, "min": min, "max": max,
    }  # fmt: skip
    if op is not None:
        return table[op](*x)
    name = type(e).__name__
    return {"Add": sum, "And": all, "Or": any, "Not": lambda y: not y[0], "Pow": lambda y: y[0] ** y[1]}.get(
        name, lambda y: _product(y)
    )(x)


def _product(values):
    result = 1
    for v in values:
        result *= v
    return result


ints = st.recursive(
    st.sampled_from([Q, KV, H]) | st.integers(-3, 9).map(E.number),
    lambda x: st.one_of(
        st.tuples(st.sampled_from(["add", "sub", "mul", "min", "max"]), x, x).map(lambda t: ("int", *t)),
        st.tuples(st.sampled_from(["//", "%"]), x, st.integers(1, 5).map(E.number)).map(lambda t: ("int", *t)),
        x.map(lambda a: ("int", "abs", a)),
    ),
    max_leaves=5,
)
comparisons = st.tuples(st.sampled_from(["le", "lt", "eq"]), ints, ints).map(lambda t: ("bool", *t))
bools = st.recursive(
    comparisons,
    lambda x: st.one_of(
        st.tuples(st.sampled_from(["and", "or"]), x, x).map(lambda t: ("bool", *t)),
        x.map(lambda a: ("bool", "not", a)),
    ),
    max_leaves=5,
)
MAKE = {"le": E.le, "lt": E.lt, "eq": E.eq, "and": E.and_, "or": E.or_, "not": E.not_}
MEAN = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "//": lambda a, b: a // b,
    "%": lambda a, b: a % b, "min": min, "max": max, "abs": abs, "le": lambda a, b: a <= b, "lt": lambda a, b: a < b,
    "eq": lambda a, b: a == b, "and": lambda a, b: a and b, "or": lambda a, b: a or b, "not": lambda a: not a,
}  # fmt: skip


def build(tree):
    if not isinstance(tree, tuple):
        return tree
    kind, op, *args = tree
    args = [build(a) for a in args]
    return MAKE[op](*args) if kind == "bool" else E.apply(op, *args)


def mean(tree, at):
    if not isinstance(tree, tuple):
        return at[tree] if tree in at else E.constant(tree)
    _, op, *args = tree
    return MEAN[op](*(mean(a, at) for a in args))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(bools)
def test_building_keeps_the_value_at_every_position(tree):
    e = build(tree)
    for q, kv, h in itertools.product(range(4), range(4), (0, 2)):
        at = {Q: q, KV: kv, H: h}
        assert value(e, at) == mean(tree, at)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(bools)
def test_the_text_of_a_formula_reads_back_as_itself(tree):
    e = build(tree)
    assert syntax.parse(syntax.text(e)) == e


@pytest.mark.parametrize(
    "written, canonical",
    [
        ("q >= kv", "kv <= q"),
        ("~(kv > q)", "kv <= q"),
        ("kv > q - 5", "q - kv < 5"),
        ("abs(q - kv) <= 5", "q - kv < 6 & kv <= q + 5"),
        ("2*q - 2*kv >= 3", "kv + 2 <= q"),
        ("kv <= q & kv <= q + 4", "kv <= q"),
        ("kv <= q & (kv > q | pad[b, kv])", "kv <= q & pad[b, kv]"),
        ("kv <= q & kv > q", "False"),
        ("where(kv <= q, 1, 0) == 1", "kv <= q"),
        ("where(kv <= q, 1.0, 0.0)*where(pad[b, kv], 1.0, 0.0) != 0", "kv <= q & pad[b, kv]"),
    ],
)
def test_equal_masks_have_one_text(written, canonical):
    assert syntax.text(syntax.parse(written)) == canonical


def test_float_operations_stay_as_written():
    text = "log(float32(abs(q - kv))/8.0)/2.772588722239781*8.0"
    assert syntax.text(syntax.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "scale=0.125",
        "scale=0.125; keep = kv <= q & q - kv < 4096 & pad[b, kv]; empty=mean",
        "scale=0.0883883476484; score = tanh(s/50.0)*50.0; keep = kv <= q",
        "scale=1; score = s + bias[min(q - kv, 7), h]; sink = sink[h]; dropout=0.1; empty=zero",
        "scale=0.25; score = s*bias[()]; keep = kv <= n0 + q",
    ],
)
def test_a_spec_reads_back_as_itself(text):
    assert str(AttentionSpec.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["scale=0.1; kep = kv <= q", "keep = kv <== q", "keep = import os", "scale=0.1; empty=maybe"]
)
def test_a_text_that_cannot_be_read_says_so(text):
    with pytest.raises(ValueError):
        AttentionSpec.parse(text)
