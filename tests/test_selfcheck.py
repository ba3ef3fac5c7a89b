"""Kernels are trusted on a GPU only after they were right there once."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

pytest.importorskip("triton", reason="no Triton beside this PyTorch")

from tvcompile.arch import Device
from tvcompile.kernels import flash, moe_triton, selfcheck
from tvcompile.kernels.experts import ExpertNeed
from tvcompile.moe_spec import MoESpec
from tvcompile.tuning import Choice, moe
from tvcompile.tuning.attention import PASSES, Config

CPU = torch.device("cpu")
SMALL = Config(64, 64, 4, 2)
PACKED = Config(16, 64, 4, 2, packed=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is used only where there is no GPU")
@pytest.mark.parametrize("pass_", PASSES)
def test_a_right_kernel_passes(pass_):
    config = PACKED if pass_ == "decode" else SMALL
    assert selfcheck.check(config, pass_, torch.float32, (16, 8), CPU) == ""


@pytest.mark.parametrize("pass_", ["fwd", "decode"])
def test_a_wrong_kernel_is_told(pass_, monkeypatch):
    def wrong(p, config):
        out, lse = p.results()
        return out.zero_(), lse.zero_()

    monkeypatch.setattr(flash, "forward", wrong)
    reason = selfcheck.check(PACKED if pass_ == "decode" else SMALL, pass_, torch.float32, (16, 16), CPU)
    assert "relative error" in reason


def test_a_kernel_that_raises_is_told(monkeypatch):
    def broken(p, config):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(flash, "forward", broken)
    assert "out of resource" in selfcheck.check(SMALL, "fwd", torch.float32, (16, 16), CPU)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A GPU on which only configs with 32 rows are right; the checks that ran."""
    ran = []

    def check(config, pass_, dtype, widths, device):
        ran.append(config)
        return "" if config.BLOCK_M == 32 else "relative error 1.0"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(selfcheck, "check", check)
    monkeypatch.setattr(selfcheck, "_machine", lambda: "gpu")
    monkeypatch.setenv("TVCOMPILE_CACHE_DIR", str(tmp_path))
    selfcheck._verdict.cache_clear()
    yield ran
    selfcheck._verdict.cache_clear()


CHOICES = (Choice(Config(64, 64, 4, 2), "table"), Choice(Config(32, 64, 4, 2, splits=5), "formula"))


def ask(choices=CHOICES):
    return selfcheck.working(choices, "fwd", torch.bfloat16, (64, 64))


def test_a_failure_takes_the_next_config_and_warns_once(machine, tmp_path):
    with pytest.warns(UserWarning, match="failed its check on this GPU"):
        assert ask() == CHOICES[1:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ask() == CHOICES[1:]
    assert len(machine) == 2
    assert len(json.loads((tmp_path / "selfcheck-gpu.json").read_text())["rows"]) == 2


def test_a_verdict_is_kept_for_the_next_process(machine):
    with pytest.warns(UserWarning):
        ask()
    selfcheck._verdict.cache_clear()
    assert ask() == CHOICES[1:] and len(machine) == 2


def test_nothing_is_left_where_all_fail(machine):
    with pytest.warns(UserWarning):
        assert ask(CHOICES[:1]) == ()


def test_it_can_be_switched_off(machine):
    with selfcheck.only_if(False):
        assert ask() == CHOICES
    assert machine == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is used only where there is no GPU")
@pytest.mark.parametrize("layout, listed", [("chunk", False), ("separate", True)])
def test_right_kernels_of_experts_pass(layout, listed):
    configs = (moe.Config(32, 32, 32, 4, 2),) * len(moe.PASSES)
    assert selfcheck.check_experts(configs, layout, listed, torch.float32, CPU, T=40) == ""


def test_wrong_kernels_of_experts_are_told(monkeypatch):
    right = moe_triton.forward

    def wrong(p, save, config):
        out, hidden = right(p, save, config)
        return out * 1.1, hidden

    monkeypatch.setattr(moe_triton, "forward", wrong)
    configs = (moe.Config(32, 32, 32, 4, 2),) * len(moe.PASSES)
    assert "relative error" in selfcheck.check_experts(configs, "plain", False, torch.float32, CPU, T=40)


def test_experts_take_plain_configs_where_the_best_fail(monkeypatch):
    monkeypatch.setattr(selfcheck, "experts_right", lambda configs, *how: not configs[0].descriptors)
    need = ExpertNeed(MoESpec(), torch.bfloat16, device=Device.typical("sm90"))
    assert not moe_triton.working(need)("up").descriptors
    monkeypatch.setattr(selfcheck, "experts_right", lambda *how: False)
    assert moe_triton.supports(need) == "its check failed on this GPU"
