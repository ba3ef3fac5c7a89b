"""Random attention programs are refused or right: output and gradients.

1,000 programs, or TV_FUZZ_PROGRAMS, in slices that the test workers share.
"""

import os

import pytest

from tests import fuzz

PROGRAMS = int(os.environ.get("TV_FUZZ_PROGRAMS", "1000"))
SLICE = 50


@pytest.mark.parametrize("first", range(0, PROGRAMS, SLICE))
def test_programs_are_refused_or_right(first, record_property):
    tally = fuzz.run(range(first, min(first + SLICE, PROGRAMS)))
    record_property("fuzz", str(tally))
    fuzz.assert_right(tally, SLICE)


def test_a_seed_gives_one_program():
    assert str(fuzz.generate(11)) == str(fuzz.generate(11))
    assert len({fuzz.generate(seed).source for seed in range(50)}) == 50
