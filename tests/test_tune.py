"""The command line of tuning: what is kept, what is tuned, and what it says of a wrong line."""

from __future__ import annotations

import io
import sys
import types

import pytest
import torch
from rich.console import Console

from tests.test_search import BEST, CAUSAL, InProcess, ask_of, empty_cache, in_process  # noqa: F401  fixtures
from tvcompile import tune
from tvcompile.tuning import cpu, store
from tvcompile.tuning.work import Capture


def said(*arguments, status=0):
    out = io.StringIO()
    found = tune.main(list(map(str, arguments)), Console(file=out, width=200, no_color=True))
    assert found == status, out.getvalue()
    return out.getvalue()


@pytest.fixture
def kept():
    store.keep(ask_of(), store.Entry({"kernel": "cpu.products", "BLOCK_M": 64}, "measured on a test", 1.25))


# What is kept


def test_nothing_is_listed_where_nothing_was_measured():
    assert "nothing was measured yet" in said("--list")


def test_what_was_measured_is_listed(kept):
    text = said("--list")
    assert "cpu.attention fwd" in text and "BLOCK_M=64" in text and "measured on a test" in text and "1.25" in text


def test_names_in_brackets_are_shown(kept):
    padded = ask_of().__class__(ask_of().device, "fwd", "float32", "scale=1; keep = pad[b, kv]; empty=mean")
    store.keep(padded, store.Entry({}, "measured on a test", 1.0))
    assert "pad[b, kv]" in said("--list")


def test_clear_forgets(kept):
    assert "1 configs forgotten" in said("--clear")
    assert store.find(ask_of()) is None and "nothing" in said("--list")


def test_export_and_import(kept, tmp_path):
    file = tmp_path / "configs.json"
    assert "1 configs written" in said("--export", file)
    said("--clear")
    assert "1 configs read" in said("--import", file)
    assert store.find(ask_of()).config["BLOCK_M"] == 64


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    file = tmp_path / "other.json"
    file.write_text("[]")
    assert "other.json" in said("--import", file, status=2)
    assert "missing.json" in said("--import", tmp_path / "missing.json", status=2)


# What is tuned


def test_attention_given_by_hand(in_process):  # noqa: F811
    in_process.ratios[BEST] = 1.25
    text = said("--attention", "1,4,2,300,8", "--dtype", "float32", "--spec", "keep = kv <= q")
    assert "1.25 times as fast" in text and "BLOCK_M=64" in text
    work = in_process.jobs[0][0]
    assert (work.H_kv, work.S_q, work.S_kv, work.D_v) == (2, 300, 300, 8) and work.spec.scale == pytest.approx(8**-0.5)
    assert {pass_ for _, pass_, _ in in_process.jobs} == {"fwd", "bwd"}
    assert "every pass has a measured config" in said(
        "--attention", "1,4,2,300,8", "--dtype", "float32", "--spec", "keep = kv <= q"
    )


def test_captures_and_two_lengths(in_process):  # noqa: F811
    spec = "scale=1; keep = pad[b, kv]; empty=mean"
    said("--attention", "2,4,2,30,60,8,16", "--spec", spec, "--capture", "bool:2,60", "--forward-only")
    work = in_process.jobs[0][0]
    assert (work.S_q, work.S_kv, work.D, work.D_v) == (30, 60, 8, 16) and work.dtype == "bfloat16"
    assert work.captures == (Capture("bool", (2, 60)),) and {pass_ for _, pass_, _ in in_process.jobs} == {"fwd"}


def test_experts_given_by_hand(in_process):  # noqa: F811
    said("--experts", "40,2,4,16,12")
    work, pass_, config = in_process.jobs[0]
    assert (work.T, work.K, work.E, work.H, work.F, work.H_out) == (40, 2, 4, 16, 12, 16)
    assert pass_ == "bwd" and isinstance(config, cpu.ExpertConfig)


def test_experts_without_backward_have_nothing_to_search_on_the_cpu(in_process):  # noqa: F811
    assert "nothing to search" in said("--experts", "40,2,4,16,12", "--forward-only") and in_process.jobs == []


def model_module(make):
    module = types.ModuleType("a_model_to_tune")
    module.make = make
    sys.modules[module.__name__] = module
    return f"{module.__name__}:make"


def attend(x, scale=1.0):
    return (x @ x.mT * scale).softmax(-1) @ x


@pytest.mark.parametrize("train", [False, True])
def test_the_sites_of_a_model(in_process, train):  # noqa: F811
    x = torch.randn(1, 2, 40, 8, requires_grad=train)
    text = said("--model", model_module(lambda: (attend, (x,), {"scale": 0.5})))
    assert "1 sites" in text and {pass_ for _, pass_, _ in in_process.jobs} == ({"fwd", "bwd"} if train else {"fwd"})
    assert in_process.jobs[0][0].spec.scale == 0.5


def test_a_search_that_was_broken_off_says_so(in_process):  # noqa: F811
    in_process.ratios |= {c: KeyboardInterrupt() for c in CAUSAL.ask(ask_of().device, "fwd").candidates()}
    assert "not finished" in said("--attention", "1,4,2,300,8", "--dtype", "float32", status=130)


# What is wrong


@pytest.mark.parametrize("arguments, reason", [
    ([], "say what to tune"),
    (["--attention", "1,2"], "--attention takes B,H,H_kv,S,D"),
    (["--attention", "1,3,2,64,8"], "H is a multiple of H_kv"),
    (["--attention", "1,x,2,64,8"], "positive numbers"),
    (["--attention", "1,4,2,64,8", "--spec", "keep: causal"], "is not a clause"),
    (["--attention", "1,4,2,64,8", "--spec", "keep = pad[b, kv]"], "captures pad: give --capture"),
    (["--attention", "1,4,2,64,8", "--spec", "keep = kv <= n"], "names sizes (n)"),
    (["--attention", "1,4,2,64,8", "--spec", "keep = pad[b, kv]", "--capture", "bits:1,64"], "write DTYPE:SIZES"),
    (["--experts", "8,9,4,16,16"], "K is at most E"),
    (["--experts", "8,2,4,16,16", "--spec", "act = z"], "act holds"),
    (["--model", "a_model"], "write module:function"),
    (["--model", "no_such_module:f"], "No module named"),
    (["--model", "math:no_such_function"], "no_such_function"),
])  # fmt: skip
def test_a_wrong_line_is_answered(arguments, reason):
    assert reason in " ".join(said(*arguments, status=2).split())


def test_a_function_that_gives_no_model():
    assert "has to return (model, inputs)" in said("--model", model_module(lambda: 3), status=2)


def test_a_model_without_sites_says_what_was_refused():
    def over_queries(x):
        return (x @ x.mT).softmax(-2) @ x

    text = said("--model", model_module(lambda: (over_queries, (torch.randn(1, 2, 40, 8),))), status=2)
    text = " ".join(text.split())
    assert "no attention and no experts were fused" in text and "softmax over another dim of the scores" in text


def test_the_static_model_is_asked_for_the_sites_of_a_model(monkeypatch):
    shown = []
    monkeypatch.setattr(tune.static_report, "ranked", lambda ask, console: "a ranking")
    monkeypatch.setattr(tune.static_report, "show", lambda ask, ranking, most, console: shown.append((ask, ranking)))
    model = model_module(lambda: (attend, (torch.randn(1, 2, 100, 8, requires_grad=True),)))
    said("--static", "--arch", "sm90", "sm80", "--model", model)
    assert [(a.arch, a.pass_) for a, *_ in shown] == [(a, p) for a in ("sm90", "sm80") for p in ("fwd", "dq", "dkdv")]
    assert {(a.keys, a.device.units, r) for a, r in shown} == {(100, n, "a ranking") for n in (108, 132)}
    assert "--static needs --arch" in said("--static", "--model", model, status=2)
    assert "known are sm80" in said("--static", "--arch", "sm10", "--model", model, status=2)
