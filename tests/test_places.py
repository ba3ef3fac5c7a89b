"""Which conditions on numbers of places exclude each other."""

import pytest
import sympy

from tvcompile import expr as E
from tvcompile.passes.places import exclude

A, B = E.index("a"), E.index("b")
APART = {
    "two numbers": (E.eq(A, sympy.Integer(1)), E.eq(A, sympy.Integer(2))),
    "of two signs": (E.eq(A, B + 3), E.eq(A, B - 3)),
    "turned": (E.eq(A - B, sympy.Integer(3)), E.eq(B - A, sympy.Integer(3))),
    "a bound": (E.lt(A, sympy.Integer(3)), E.not_(E.lt(A, sympy.Integer(3)))),
}
TOGETHER = {
    "one number": (E.eq(A, sympy.Integer(1)), E.eq(B, sympy.Integer(2))),
    "the same, turned": (E.eq(A - B, sympy.Integer(3)), E.eq(B - A, sympy.Integer(-3))),
    "of two formulas": (E.eq(A, B), E.eq(A, sympy.Integer(2))),
    "twice one": (E.eq(2 * A, sympy.Integer(4)), E.eq(A, sympy.Integer(2))),
}


@pytest.mark.parametrize("name", APART)
def test_no_number_fulfils_both(name):
    assert exclude(*APART[name]) and exclude(*reversed(APART[name]))


@pytest.mark.parametrize("name", TOGETHER)
def test_some_number_fulfils_both(name):
    assert not exclude(*TOGETHER[name]) and not exclude(*reversed(TOGETHER[name]))
