"""Every rule of the readers looks at every argument of its operation, or the argument can't change the formula.

What a rule looks at is read from its code: the names that occur in it as strings.
"""

import types
from collections.abc import Iterator

import pytest
import torch

from tvcompile.passes import contraction, movement, pointwise, rows
from tvcompile.passes.atoms import ATOM_RULES

# The node's own value has the shape and the dtype; the rest says where and how it lies in memory.
RESULT = {"dtype", "layout", "device", "pin_memory", "memory_format", "non_blocking", "copy", "implicit", "stable"}
RESULT |= {"size", "shape", "sizes", "end", "output_size"}
# What the shape of the result says as well.
SHAPES = {
    "repeat": {"repeats"},
    "tile": {"dims"},
    "unflatten": {"dim"},
    "flatten": {"start_dim", "end_dim"},
    **dict.fromkeys(("view_as", "reshape_as", "expand_as", "to", "type_as"), {"other"}),
    **dict.fromkeys(("full_like", "new_full", "fill", "zeros_like", "new_zeros", "zero"), {"self"}),
    **dict.fromkeys(("ones_like", "new_ones"), {"self"}),
    "eye": {"n", "m"},
    # Of weights, which hold no infinities.
    "nan_to_num": {"posinf", "neginf"},
    # Read by `added`, which everyone who opens a product asks; factors are checked where there are atoms of them.
    **dict.fromkeys(("addmm", "baddbmm"), {"self", "beta", "alpha"}),
    "one_hot": {"num_classes"},
}
# Looked at elsewhere: by `contraction` for all of its rules, of lists alone, or under another name.
CHECKED = {
    **dict.fromkeys(("bmm", "mm", "addmm"), {"out_dtype"}),
    "baddbmm": {"batch1", "batch2", "out_dtype"},
    "argsort": {"dim"},
    "scatter": {"dim", "value"},
    "einsum": {"path", "a"},
    "swapaxes": {"axis0", "axis1"},
}
# Atoms and leaves stand for their node, whatever its arguments are.
WHOLE = {rule for name, rule in ATOM_RULES.items() if name not in ("exp", "dropout", "feature_dropout", "baddbmm")}
WHOLE |= {rows._atom, rows._leaf, rows._dropout, rows._product, rows._any, rows._sum, rows._cumsum}
TABLES = {
    "pointwise": pointwise.POINTWISE,
    "movement": movement.MOVEMENT,
    "contraction": contraction.CONTRACTIONS,
    "rows": rows.ROWS,
}


def named(constants: tuple) -> Iterator[str]:
    for c in constants:
        yield from [c] if isinstance(c, str) else named(c) if isinstance(c, tuple) else ()


def strings(function: types.FunctionType, seen: set[int]) -> Iterator[str]:
    """The strings in the code of a function, and of those that it holds, or calls in its module."""
    if id(function) in seen:
        return
    seen.add(id(function))
    codes = [function.__code__]
    for code in codes:
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
        yield from named(code.co_consts)
    given = [cell.cell_contents for cell in function.__closure__ or ()]
    own = [function.__globals__.get(name) for code in codes for name in code.co_names]
    for x in (*given, *own):
        if isinstance(x, str):
            yield x
        if isinstance(x, types.FunctionType) and (x in given or x.__module__ == function.__module__):
            yield from strings(x, seen)


def overloads() -> Iterator:
    """(table, operation, overload) of everything that takes a tensor or makes one."""
    for table, rules in TABLES.items():
        for name, rule in rules.items():
            packet = getattr(torch.ops.aten, name, None)
            for overload in packet.overloads() if packet is not None and rule not in WHOLE else ():
                schema = getattr(packet, overload)._schema
                by_name = "name" in overload.lower() or any("Dimname" in str(a.type) for a in schema.arguments)
                makes = any("Tensor" in str(x.type) for x in schema.returns) and not by_name
                if makes and not any(a.is_out for a in schema.arguments):
                    yield pytest.param(rule, name, schema, id=f"{table}-{name}.{overload}")


CASES = list(overloads())


@pytest.mark.parametrize("rule, name, schema", CASES)
def test_no_argument_is_ignored(rule, name, schema):
    seen = set(strings(rule, set()))
    known = RESULT | SHAPES.get(name, set()) | CHECKED.get(name, set())
    if name == "view":
        known = known - {"dtype"}  # reads the bits as another type
    ignored = [a.name for a in schema.arguments if a.name not in seen | known]
    assert not ignored, f"{schema} does not look at {ignored}"


def test_the_rules_that_are_looked_at_are_many():
    assert len(CASES) > 200


def test_contraction_looks_at_what_its_rules_leave_to_it():
    assert "out_dtype" in set(strings(contraction.contraction, set()))
