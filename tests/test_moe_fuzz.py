"""Random mixtures of experts are refused or right: output and gradients.

200 programs, or TV_MOE_FUZZ_PROGRAMS, in slices that the test workers share.
"""

import os

import pytest

from tests import fuzz, moe_fuzz

PROGRAMS = int(os.environ.get("TV_MOE_FUZZ_PROGRAMS", "200"))
SLICE = 25


@pytest.mark.parametrize("first", range(0, PROGRAMS, SLICE))
def test_programs_are_refused_or_right(first, record_property):
    tally = moe_fuzz.run(range(first, min(first + SLICE, PROGRAMS)))
    record_property("fuzz", str(tally))
    fuzz.assert_right(tally, SLICE)


def test_a_seed_gives_one_program():
    assert str(moe_fuzz.generate(11)) == str(moe_fuzz.generate(11))
    assert len({moe_fuzz.generate(seed).source for seed in range(50)}) == 50


def test_every_near_miss_applies():
    """Some of them apply to one program in thousands."""
    missing = set(moe_fuzz.misses.NEAR_MISSES)
    for seed in range(10000):
        missing.discard(moe_fuzz.generate(seed).near_miss)
        if not missing:
            return
    assert not missing
