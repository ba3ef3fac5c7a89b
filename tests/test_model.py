"""The arithmetic of the static model, on loops made by hand; and the rates that it reckons with."""

from __future__ import annotations

import numpy as np
import pytest

from tvcompile.arch import SHARED, Device
from tvcompile.tuning import attention, model
from tvcompile.tuning.machine_code import Code, Loop
from tvcompile.tuning.model import Load
from tvcompile.tuning.rates import devices, rates

SM90 = rates("sm90")
# In the way of a forward of 128 rows on sm90.
PIPES = {"tensor": 2048.0, "issue": 960.0, "mufu": 1056.0, "fp32": 430.0, "alu": 436.0, "smem": 64.0}


def loop(ops: dict[str, int] | None = None, flop: int = 8 << 20, **pipes: float) -> Loop:
    return Loop(flop, {"other": 1000}, PIPES | pipes, {"HMMA": 64} | (ops or {}))


def code(*loops: Loop, **more) -> Code:
    return Code(**{"registers": 128, "spills": 0, "shared": 65536, "ctas": 1, "loads": {}, "loops": list(loops)} | more)


def load(full: list[int], partial: list[int] | None = None, **more) -> Load:
    trips = np.stack([np.array(full), np.array(partial or [0] * len(full))], 1)
    return Load(**{"trips": trips, "bytes": 0.0, "dram": 0.0, "stages": 3} | more)


def clocks(c: Code, what: Load, units: int = 132, warps: int = 4) -> float:
    """Of all but starting and ending."""
    found = model.predict(c, what, SM90, units, warps).seconds * SM90.clock * 1e9
    return found - model.start(c, what, SM90, 1, warps)


def ask(pass_: str = "fwd", work: str = "causal", arch: str = "sm90", D: int = 64, **more) -> attention.Ask:
    sizes = {"rows": 1024, "keys": 1024, "programs": 8} | more
    return attention.Ask(Device.typical(arch, rates(arch).units), pass_, "bfloat16", D, D, work, **sizes)


# Rates


@pytest.mark.parametrize("arch", SHARED)
def test_rates_agree_with_the_peak_of_the_board_and_have_sources(arch):
    row, about = devices()[arch], rates(arch)
    peak = about.products["2"] * about.units * about.clock * 1e9
    assert peak == pytest.approx(row["peak"] * 1e12, rel=0.02)
    assert row["sources"] and set(row["estimates"]) >= {"latency", "handover"}
    assert about.shared >= SHARED[arch]


# A trip


def test_one_stream_takes_turns_and_many_are_bound_by_the_busiest_pipe():
    one = model.round_of([loop()], load([1]), SM90, ctas=1, warps=4)[0]
    assert one == 2048 + 1056
    four = model.round_of([loop()], load([1]), SM90, ctas=4, warps=4)
    assert four == (2048 + 1056 + 3 * 2048, "tensor")
    # Eight warps are two streams, each with half of the work.
    assert model.round_of([loop()], load([1]), SM90, ctas=1, warps=8)[0] == (2048 + 1056) / 2 + 2048 / 2
    # The products of a warpgroup are one stream's.
    grouped = loop({"HGMMA": 8})
    assert model.round_of([grouped], load([1]), SM90, ctas=1, warps=8)[0] == 2048 + 1056


def test_waiting_is_hidden_by_other_ctas():
    waiting = loop({"MUFU": 66, "SHFL": 4})
    alone, limiter = model.round_of([waiting], load([1]), SM90, ctas=1, warps=4)
    assert alone == 2048 + 1056 + 2 * SM90.handover + 4 * SM90.exchange and limiter == "tensor"
    two = model.round_of([waiting], load([1]), SM90, ctas=2, warps=4)
    D, wait = 2048 + 1056, 2 * SM90.handover + 4 * SM90.exchange
    assert two == (pytest.approx(D + wait + 2048 / (1 + wait / (2 * D))), "tensor")
    assert two[0] < 2 * alone - 1000


def test_one_stage_waits_for_memory_in_every_trip_and_l2_bounds():
    single = model.round_of([loop()], load([1], stages=1), SM90, ctas=1, warps=4)[0]
    assert single == 2048 + 1056 + SM90.latency
    slow, limiter = model.round_of(
        [loop(tensor=100.0, mufu=90.0, issue=90.0, fp32=9.0, alu=9.0)], load([1], stages=1), SM90, 1, 4
    )
    assert slow == 100 + 90 + SM90.latency and limiter == "wait"
    from_l2 = model.round_of([loop()], load([1], bytes=32 * 5000), SM90, ctas=1, warps=4)
    assert from_l2 == (5000, "l2")


def test_specialised_warps_run_side_by_side():
    parts = [loop(mufu=0, issue=30, fp32=0, alu=3), loop({"MUFU": 64}, 0, tensor=0.0), loop({}, 0, tensor=0, mufu=16)]
    found = model.round_of(parts, load([1]), SM90, ctas=1, warps=8)[0]
    # The partition of products alone: 2048 and what its own instructions take; the exponents are beside it.
    assert found == 2048 + 64
    assert model.loops(code(loop(), partitions=parts))[0] == parts


def test_doubled_work_doubles_the_clocks():
    once, twice = (clocks(code(loop()), load([n] * 132)) for n in (64, 128))
    assert twice == pytest.approx(2 * once)
    more = clocks(code(loop()), load([64] * 264))
    assert more > 1.99 * once


def test_the_masked_loop_has_its_own_price():
    masked = Loop(8 << 20, {"other": 2000}, PIPES | {"issue": 1500.0}, {"HMMA": 64})
    both = code(loop(), masked)
    assert clocks(both, load([4] * 132, [4] * 132)) - clocks(both, load([8] * 132)) == pytest.approx(4 * (1500 - 1056))
    # A loop over fewer FLOP is a remainder, and no masked one.
    rest = Loop(1 << 20, {"other": 900}, PIPES, {"HMMA": 8})
    assert model.loops(code(loop(), masked, rest)) == ([loop()], [masked])
    with pytest.raises(ValueError, match="no loop"):
        model.loops(code())


def test_an_unrolled_loop_is_all_of_its_trips():
    whole = loop(**{pipe: 8 * n for pipe, n in PIPES.items()})
    once, all_of_it = clocks(code(loop()), load([8] * 132)), clocks(code(whole, unrolled=True), load([8] * 132))
    assert all_of_it == pytest.approx(once)


def test_waves_and_tails():
    assert model.makespan(np.array([10.0] * 8), 8) == 10
    assert model.makespan(np.array([10.0] * 9), 8) == 20
    # Long ones first end together with short ones; last, they are a tail.
    assert model.makespan(np.array([30.0, 10, 10, 10]), 2) == 30
    assert model.makespan(np.array([10.0, 10, 10, 30]), 2) == 40
    even = np.full(1000, 10.0)
    assert model.makespan(even[:500], 8) == 630
    assert model.makespan(even, 2) == pytest.approx(5000, rel=0.01)


def test_dram_bounds_the_whole():
    found = model.predict(code(loop()), load([8], dram=SM90.dram * 1e9), SM90, 132, 4)
    assert found.seconds == pytest.approx(1, rel=0.01) and found.limiter == "dram"
