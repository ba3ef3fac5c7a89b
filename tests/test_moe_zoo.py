"""Mixtures of experts of `transformers`: one graph, attention and experts fused, and nothing changes but the speed.

A few classes run in every way that is one graph; the others in a way that changes with TV_TURN, at every fourth turn.
`python -m tests.moe_zoo --full` runs everything.
"""

from __future__ import annotations

import zlib

import pytest
import torch
import transformers

from tests.harness import STRICT, TURN
from tests.moe_zoo import BY_NAME, ENTRIES, FUSABLE, LOOP, cases, counts, expected
from tests.moe_zoo_run import shortfall
from tests.zoo_run import INDUCTOR, Case, measure

transformers.logging.set_verbosity_error()

CORE = ("mixtral", "gpt_oss")
# Groups of experts with shared ones; one product over all experts: in one way at every turn.
ALWAYS = ("deepseek_v3", "llama4")
THROUGH_INDUCTOR = (
    Case(BY_NAME["mixtral"], "grouped_mm", "", True, torch.float32),
    Case(BY_NAME["gpt_oss"], "grouped_mm", "", False, torch.bfloat16),
)


def of_this_turn() -> list[Case]:
    """One case per class whose turn it is; consecutive turns walk through the whole cross."""
    chosen = []
    for entry in ENTRIES:
        every = [c for c in cases(entry, full=True) if c.impl in FUSABLE]
        if entry.name in CORE:
            chosen += [c for c in every if not (c.train and c.dtype == torch.bfloat16)]
            continue
        turn, idle = divmod(zlib.crc32(entry.name.encode()) + TURN, 4)
        if every and (not idle or entry.name in ALWAYS):
            chosen.append(every[turn % len(every)])
    return chosen


def check(case: Case, options: dict, record_property) -> None:
    result = measure(case, "tv", options)
    record_property("moe_zoo", f"{case.entry.name} {counts(result.sites)}/{expected(case)}")
    assert not result.wrong(), result.wrong()
    assert not shortfall(case, result), f"{shortfall(case, result)}; {'; '.join(result.refusals)}"


@pytest.mark.parametrize("case", of_this_turn(), ids=str)
def test_attention_and_experts_are_fused_in_one_graph_and_right(case, record_property):
    check(case, STRICT, record_property)


@pytest.mark.parametrize("case", THROUGH_INDUCTOR[TURN % 2 :: 2], ids=str)
def test_the_same_through_inductor(case, record_property):
    check(case, INDUCTOR, record_property)


def test_the_entries_count_the_experts_of_their_models():
    for entry in ENTRIES:
        if entry.impls == LOOP:
            continue
        model = entry.model(entry.impls[0])
        found = [type(m).__name__ for m in model.modules() if "Experts" in type(m).__name__]
        assert len(found) == entry.moes, f"{entry.name}: {found}"


def test_the_zoo_is_broad():
    assert len({entry.cls for entry in ENTRIES}) >= 35
    assert len(BY_NAME) == len(ENTRIES)
