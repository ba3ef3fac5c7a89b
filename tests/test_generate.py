"""`generate()` with a static cache gives the tokens of eager, compiled by hand and by itself."""

from __future__ import annotations

import pytest
import torch
import transformers

from tests.harness import TURN
from tests.zoo import BY_NAME

transformers.logging.set_verbosity_error()

NEW_TOKENS = 12
SHAPES = ("llama", "gemma2", "gpt_oss")


def tokens(model: torch.nn.Module, batch: int, **options) -> torch.Tensor:
    """Greedy tokens after a left-padded prompt."""
    inputs = BY_NAME["llama"].inputs(batch=batch, seq=10, pad="left" if batch > 1 else "")
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, **options}
    return model.generate(**inputs, **options)


def model(name: str) -> torch.nn.Module:
    return BY_NAME[name].model().eval()


# One batch size of each at a turn.
@pytest.mark.parametrize("name, batch", [(name, 1 + (i + TURN) % 2) for i, name in enumerate(SHAPES)])
def test_compiled_forward(name, batch):
    import tvcompile

    expected = tokens(model(name), batch)
    ours = model(name)
    ours.forward = torch.compile(ours.forward, backend="tv", options={"tv.strict": True})
    with tvcompile.collect() as report:
        # generate() must not compile on top of our compiled forward.
        got = tokens(ours, batch, cache_implementation="static", disable_compile=True)
    assert torch.equal(got, expected)
    assert report.sites, [r.reason for r in report.refusals]


def test_the_path_of_generate_itself():
    """It passes `mode="reduce-overhead"` to the backend, and chooses when to compile."""
    import tvcompile

    expected = tokens(model("llama"), 2)
    config = transformers.CompileConfig(backend="tv", mode="reduce-overhead", fullgraph=False)
    config._compile_all_devices = True  # by default generate() compiles on accelerators only
    with tvcompile.collect() as report:
        got = tokens(model("llama"), 2, cache_implementation="static", compile_config=config)
    assert torch.equal(got, expected)
    assert report.graphs > 0
