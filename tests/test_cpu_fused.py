"""The activations of tv::moe's backward on the CPU, compiled: where, how often, and that they are right."""

from __future__ import annotations

import warnings

import pytest
import torch

import tvcompile  # noqa: F401
from tests.test_moe_op import GRID, arguments, check_precise, run, spec_of
from tvcompile.kernels import cpu_fused, cpu_products, moe
from tvcompile.moe_spec import LAYOUTS

OP = torch.ops.tv.moe.default
ODD = {"plain": "sin(u)", "chunk": "u*1.5 + tanh(g)", "separate": "u", "interleave": "sigmoid(g)"}


def op(*args):
    return OP(*args, True)[0]


@pytest.fixture
def compiled(monkeypatch):
    """What is compiled in a test, however few the activations are: (spec, the function or None), ..."""
    found = []
    inner = cpu_fused._compiled.__wrapped__

    def note(spec, dtype, compute):
        if (spec, dtype) not in [key for key, _ in found]:
            found.append(((spec, dtype), inner(spec, dtype, compute)))
        return next(run for key, run in found if key == (spec, dtype))

    monkeypatch.setattr(cpu_fused, "LARGE", 0)
    monkeypatch.setattr(cpu_fused, "_compiled", note)
    return found


@pytest.mark.parametrize("layout, stacked, bias, weigh", GRID[::5])
def test_in_a_compiled_graph_gradients_are_as_precise_as_eager(layout, stacked, bias, weigh, compiled):
    """One kernel for batches of one row and of many; here the private interface of Inductor is seen to be there."""
    torch._dynamo.reset()
    call, dtype = torch.compile(op), (torch.bfloat16, torch.float32)[stacked]
    spec = spec_of(layout, weigh).replace("clamp_max(u, 1.0)", "tanh(u)")
    check_precise([arguments(layout, stacked, bias, dtype, 200)], spec, dtype, call)
    few = arguments(layout, stacked, bias, dtype, 3)
    torch.testing.assert_close(*(run(f, few, spec, dtype) for f in (call, op)))
    assert len(compiled) == 1 and all(run is not None for _, run in compiled)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_formulas_that_leave_a_part_out(layout, compiled):
    torch._dynamo.reset()
    spec = f"act = {ODD[layout]}" + f"; layout={layout}" * (layout != "plain")
    check_precise([arguments(layout, dtype=torch.float32, tokens=40)], spec, torch.float32, torch.compile(op))
    assert len(compiled) == 1 and all(run is not None for _, run in compiled)


def test_nothing_is_compiled_for_few_activations_or_in_eager(monkeypatch):
    monkeypatch.setattr(cpu_fused, "_compiled", pytest.fail)
    args = arguments(dtype=torch.float32, tokens=64)
    run(torch.compile(op), args, spec_of())
    monkeypatch.setattr(cpu_fused, "LARGE", 0)
    run(op, args, spec_of())


def test_where_inductor_fails_it_runs_operation_by_operation_and_says_so_once(monkeypatch):
    def broken(*_):
        raise RuntimeError("no compiler")

    cpu_fused._compiled.cache_clear()
    monkeypatch.setattr(torch._inductor, "standalone_compile", broken)
    monkeypatch.setattr(cpu_fused, "LARGE", 0)
    args, call = arguments(dtype=torch.float32, tokens=64), torch.compile(op)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        check_precise([args], spec_of(), torch.float32, call)
        check_precise([args], spec_of(), torch.float32, call)
    cpu_fused._compiled.cache_clear()
    ours = [str(w.message) for w in said if "tvcompile" in str(w.message)]
    assert len(ours) == 1 and "operation by operation: RuntimeError: no compiler" in ours[0]


def test_what_is_measured_while_a_graph_is_traced_is_measured_outside_of_it(monkeypatch):
    """The first question may come from AOTAutograd; memory that is held for products must be no tensor of its own."""
    monkeypatch.setattr(cpu_products, "HELD", cpu_products.Held())
    cpu_products.float32_is_faster.cache_clear()
    moe.choose.cache_clear()
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):  # or nothing is traced
        run(torch.compile(op), arguments(dtype=torch.bfloat16, tokens=64), spec_of())
    assert type(cpu_products.HELD.memory) is torch.Tensor
    check_precise([arguments(dtype=torch.float16, tokens=200)], spec_of(), torch.float16)
