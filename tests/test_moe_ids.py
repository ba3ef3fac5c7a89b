"""Ids that no router of the program chose: hashed tokens, positions, numbers without an expert."""

from __future__ import annotations

import pytest
import torch

from tests import harness
from tests.moe_spellings.base import Block, H

T, COUNT = 21, 4
IDS = {
    "given": lambda tokens: tokens % 1000,
    "remainder": lambda tokens: tokens % COUNT,
    "hash": lambda tokens: (tokens * 31 + 7) % COUNT,
    "two hashes": lambda tokens: torch.stack([tokens % COUNT, (tokens + 1) % COUNT], -1),
    "positions": lambda tokens: torch.arange(len(tokens)) % COUNT,
    "more than there are experts": lambda tokens: tokens % (COUNT + 2),
}


class ByNumber(Block):
    """The weight of expert e is column e of what the router gives."""

    def __init__(self, ids, form):
        super().__init__()
        self.ids, self.form = ids, form

    def forward(self, x, tokens):
        ids, weights, out = IDS[self.ids](tokens), self.gate(x).sigmoid(), torch.zeros_like(x)
        for e in range(self.count):
            if self.form == "dense":
                hit = (ids == e).sum(-1) if ids.dim() == 2 else ids == e
                out = out + self.expert(x, e) * (weights[:, e] * hit)[:, None]
            else:
                token = torch.where(ids == e)[0]
                out = out.index_add(0, token, self.expert(x[token], e) * weights[token, e, None])
        return out


@pytest.mark.parametrize("form", ["dense", "loop"])
@pytest.mark.parametrize("ids", IDS)
def test_ids_that_are_numbers_of_tokens(ids, form):
    """An id may be no expert's: then there is no weight of that number either."""
    torch.manual_seed(0)
    inputs = torch.randn(T, H), torch.randint(0, 6, (T,))
    report = harness.run(ByNumber(ids, form), inputs, True)
    assert sum(site.spec.startswith("act =") for site in report.sites) == 1, report


class FirstWeights(Block):
    """Ids of a token may be alike: then the mask of pairs has more places than there are rows."""

    def forward(self, x, ids):
        weights, out = self.gate(x)[:, :2].sigmoid(), torch.zeros_like(x)
        for e in range(self.count):
            pairs = ids == e
            mine = pairs.any(-1)
            y = self.expert(x[mine], e)
            out[mine] += y * weights[pairs][: len(y), None]
        return out


def test_given_ids_may_be_alike():
    torch.manual_seed(0)
    inputs = torch.randn(T, H), torch.randint(0, COUNT, (T, 2))
    report = harness.run(FirstWeights(), inputs, True)
    assert not any(site.spec.startswith("act =") for site in report.sites)
