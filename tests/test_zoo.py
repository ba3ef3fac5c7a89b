"""Models of `transformers`: every attention is fused, and nothing changes but the speed.

Every common class runs in a setting that changes with TV_TURN, which takes the implementations in turn; rarer ones
at every fourth turn, a few classes in half of all settings, and a few through Inductor.
`python -m tests.zoo --full` runs everything.
"""

from __future__ import annotations

import zlib

import pytest
import torch
import transformers

from tests.harness import STRICT, TURN
from tests.zoo import BY_NAME, COMMON, ENTRIES
from tests.zoo_run import INDUCTOR, Case, cases, measure

transformers.logging.set_verbosity_error()

# One of each kind of mask, edit and empty row; two turns take these through all settings.
CORE = ("mistral", "gpt_oss", "bloom", "t5", "swin")
THROUGH_INDUCTOR = (
    Case(BY_NAME["mistral"], "eager", "left", True, torch.bfloat16),
    Case(BY_NAME["gpt_oss"], "eager", "left", False, torch.float32),
    Case(BY_NAME["falcon_alibi"], "sdpa", "left", True, torch.float32),
    Case(BY_NAME["t5"], "eager", "right", True, torch.float32),
)


def of_this_turn() -> list[Case]:
    """One case per class; consecutive turns walk through the whole cross."""
    chosen = []
    for entry in ENTRIES:
        turn = zlib.crc32(entry.name.encode()) + TURN
        if entry not in COMMON:
            turn, idle = divmod(turn, 4)
            if idle:
                continue
        # Training in bfloat16 flips ReLUs and routers, by luck either way: `python -m tests.zoo --full` shows it.
        every = [c for c in cases(entry, full=True) if not (c.train and c.dtype == torch.bfloat16)]
        if entry.name in CORE:
            chosen += every[turn % 2 :: 2]
            continue
        turn, which = divmod(turn, len(entry.impls))
        mine = [case for case in every if case.impl == entry.impls[which]]
        chosen.append(mine[turn % len(mine)])
    return chosen


def check(case: Case, options: dict, record_property) -> None:
    result = measure(case, "tv", options)
    entry = case.entry
    record_property("zoo", f"{entry.name} {len(result.sites)}/{entry.fusable}")
    assert not result.wrong(), result.wrong()
    listed = "; ".join(result.refusals)
    attentions = [spec for spec in result.sites if not spec.startswith("act =")]
    assert len(attentions) == entry.fusable, f"{len(attentions)} fused; {listed}"
    assert len(result.refusals) >= entry.refused, f"{entry.refused} refusals expected; {listed}"
    assert all(result.refusals), "a refusal without a reason"


@pytest.mark.parametrize("case", of_this_turn(), ids=str)
def test_every_attention_is_fused_and_right(case, record_property):
    check(case, STRICT, record_property)


@pytest.mark.parametrize("case", THROUGH_INDUCTOR[TURN % 2 :: 2], ids=str)
def test_the_same_through_inductor(case, record_property):
    check(case, INDUCTOR, record_property)


def test_the_zoo_is_broad():
    assert len({entry.cls for entry in ENTRIES}) >= 40
    assert len(BY_NAME) == len(ENTRIES)
