"""The static model: the work of each Ask, the cache, what is left out, and what a report says."""

from __future__ import annotations

import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console

from tests.test_model import ask, code, loop
from tvcompile.arch import SHARED, Device
from tvcompile.tuning import (
    amd_code,
    attention,
    lookup,
    model,
    moe,
    static,
    static_report,
    tables_file,
    workers,
    workload,
)
from tvcompile.tuning.machine_code import Code
from tvcompile.tuning.rates import rates

# The work of an Ask


def test_trips_of_a_causal_mask():
    c = attention.Config(128, 64, 4, 2)
    trips = workload.load_of(ask(rows=512, keys=512, programs=3), c).trips
    # Rows 384..511 see six blocks of 64 whole and two in part; late rows begin first.
    assert trips[:4].tolist() == [[6, 2], [4, 2], [2, 2], [0, 2]] and len(trips) == 4 * 3
    columns = workload.load_of(ask("dkdv", rows=512, keys=512, programs=1), attention.Config(64, 128, 4, 2)).trips
    assert columns.tolist() == [[6, 2], [4, 2], [2, 2], [0, 2]]
    full = workload.load_of(ask(work="full", rows=512, keys=500, programs=1), c).trips
    assert full.tolist() == [[7, 1]] * 4
    grouped = workload.load_of(ask(rows=2048, keys=512, programs=1), c).trips
    assert len(grouped) == 16
    assert workload.load_of(ask("dkdv", rows=2048, keys=512, programs=1), c).trips.sum() == 4 * trips[:4].sum()


def test_splits_share_the_keys_and_are_added_up():
    base = attention.Config(16, 64, 4, 2, packed=True)
    a = ask("decode", "full", rows=4, keys=1000, programs=2)
    whole, shared = (workload.load_of(a, dataclasses.replace(base, splits=n)) for n in (1, 4))
    assert whole.trips.tolist() == [[15, 1]] * 2 and whole.extra == 0
    assert shared.trips.tolist() == [[4, 0], [4, 0], [4, 0], [3, 1]] * 2 and shared.extra > 0


def test_tokens_of_experts_are_drawn_alike():
    n = workload.tokens(4096 * 6, 64)
    assert n.sum() == 4096 * 6 and len(set(n.tolist())) > 10
    assert (workload.tokens.__wrapped__(4096 * 6, 64) == n).all()
    a = moe.Ask(Device.typical("sm90", 132), "up", "bfloat16", 384, 64, 2816, 2048, 6)
    c = moe.Config(128, 256, 64, 8, 3)
    programs = sum(-(-int(k) // 128) for k in n) * 11
    assert workload.load_of(a, c).trips.tolist() == [[32, 0]] * programs
    outer = workload.load_of(dataclasses.replace(a, pass_="dw"), c).trips
    assert len(outer) == 64 * 16 * 11 and outer[0, 0] == -(-int(n[0]) // 64)


@pytest.mark.parametrize("work", ["full", "causal+score+sink", "mask+dropout", "data+mean", "causal+bias"])
def test_a_class_of_work_has_a_spec_of_that_class(work):
    from tvcompile.spec import AttentionSpec

    assert attention.work_of(AttentionSpec.parse(workload.spec_of(work))) == work


@pytest.mark.parametrize("arch", SHARED)
def test_candidates_hold_the_formula_and_can_fit(arch):
    device = Device.typical(arch, 100)
    found = [attention.Ask(device, p, "bfloat16", D, D) for p in attention.PASSES for D in attention.WIDTHS]
    found += [moe.Ask(device, p, "bfloat16", rows, 64, 2816, 2048, 6) for p in moe.PASSES for rows in (6, 384)]
    for a in found:
        configs = a.candidates()
        assert set(a.formula()) <= set(configs) and len(set(configs)) == len(configs)
        assert 8 <= len(configs) <= 200, (a.pass_, len(configs))
        able = arch in ("sm90", "sm100") or arch == "sm120" and a.op == "attention"
        assert able or not any(c.descriptors for c in configs)
        assert arch == "sm100" or not any(c.specialize for c in configs)


# Compiled code: cached, failing, left out


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """A cache of its own, and calls in place of compilers: config -> Code, or the reason why there is none."""
    monkeypatch.setenv("TVCOMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(static, "sources", lambda: "as-tested")
    calls: list = []

    def each(function, jobs, limit, count=0):
        for i, job in enumerate(jobs):
            calls.append(job)
            made = each.makes(job.config)
            if isinstance(made, Code):
                static._keep(job, made)
            yield i, workers.Outcome(None, made) if isinstance(made, str) else workers.Outcome(made)

    each.makes = lambda config: code(loop())
    monkeypatch.setattr(workers, "each", each)
    each.calls = calls
    return each


def test_a_second_ranking_compiles_nothing(compiler):
    a = ask()
    seen: list = []
    first = static.rank(a, a.candidates(), lambda *n: seen.append(n))
    assert first.compiled == len(compiler.calls) == len(a.candidates()) > 10
    assert seen[0] == (0, first.compiled) and seen[-1] == (first.compiled, first.compiled)
    again = static.rank(dataclasses.replace(a, rows=4096, keys=4096), a.candidates())
    assert again.compiled == 0 and len(compiler.calls) == first.compiled
    assert static.predict(a, first[0][0]) == first[0][1] and len(compiler.calls) == first.compiled
    # Other work is another kernel; so are other sources.
    assert static.known(static.Job.of(ask(work="full"), first[0][0])) is None
    static.sources = lambda: "changed"
    assert static.known(static.Job.of(a, first[0][0])) is None


def test_a_broken_file_of_the_cache_is_compiled_again(compiler):
    a = ask()
    config = a.formula()[0]
    static.rank(a, [config])
    (file,) = static.folder().glob("*.json")
    file.write_text(file.read_text()[:-20])
    assert static.rank(a, [config]).compiled == 1 and static.rank(a, [config]).compiled == 0


def test_what_spills_hangs_or_does_not_fit_is_left_out_and_counted(compiler):
    tiles = [attention.Config(m, 64, 4, 2) for m in (16, 32, 64, 128)] + [attention.Config(128, 128, 4, 2)]
    fates = [code(loop(), spills=9), "more than 60 s", code(loop(), ctas=0), code(loop()), code(loop(), shared=1 << 20)]
    compiler.makes = dict(zip(tiles, fates)).__getitem__
    found = static.rank(ask(), tiles)
    assert [c for c, _ in found] == [tiles[3]]
    assert found.left == {"spills": 1, "more than 60 s": 1, "does not fit": 2}
    with pytest.raises(ValueError, match="more than 60 s"):
        static.predict(ask(), tiles[1])


def test_a_hang_and_a_crash_cost_one_call_each():
    calls = ["1 / 0", "import time; time.sleep(15)", "import os; os._exit(3)", "print(2)"]
    found = dict(workers.each(exec, calls, limit=2.0, count=1))
    assert found[0].failure == "ZeroDivisionError: division by zero"
    assert found[1].failure == "more than 2 s" and found[2].failure == "crashed with exit code 3"
    assert found[3] == workers.Outcome(None)


# Tables and reports


def test_a_row_has_to_beat_the_formula_by_three_percent(compiler, tmp_path):
    a = ask()
    formula, best = a.formula()[0], attention.Config(128, 128, 8, 2, descriptors=True)
    for gain, stands in ((1.02, False), (1.04, True)):
        found = {formula: gain, best: 1.0}
        ranking = static.Ranking([(c, _seconds(s)) for c, s in sorted(found.items(), key=lambda x: x[1])], {}, 0)
        row = tables_file.row_of(a, ranking)
        assert (row is not None) == stands
    assert row["when"] == {"arch": "sm90", "pass_": "fwd", "size": 2, "width": 64, "work": "causal"}
    assert attention.Config(**row["config"]) == best and row["shared"] == 7
    # A formula that is not ranked, as it spills, is no rival; nothing ranked is no row.
    assert tables_file.row_of(a, static.Ranking([(best, _seconds(1.0))], {"spills": 1}, 0)) is not None
    assert tables_file.row_of(a, static.Ranking([], {}, 0)) is None
    path = tmp_path / "table.json"
    general = {"when": {"arch": "sm90", "pass_": "fwd"}, "config": {"BLOCK_M": 64}}
    path.write_text(json.dumps({"source": "static", "rows": [general]}))
    tables_file.write(path, [row])
    tables_file.write(path, [row | {"shared": 8}])
    # What says less comes later, or nothing after it would ever serve.
    tables_file.write(path, [general])
    table = json.loads(path.read_text())
    assert table["rows"] == [row | {"shared": 8}, general] and table["source"] == "static"
    tables_file.write(path, [], [row["when"]])
    assert json.loads(path.read_text())["rows"] == [general]


def _seconds(s: float) -> model.Prediction:
    return model.Prediction(s, "tensor", 0, 7, 128, 1, 0.5)


def _line(a: attention.Ask, config: attention.Config, seconds: float) -> dict:
    fields = {k: v for k, v in dataclasses.asdict(a).items() if k != "device"}
    given = {"op": a.op, "arch": a.device.arch, "units": a.device.units} | fields
    return {"ask": given, "config": dataclasses.asdict(config), "seconds": seconds}


def test_validation_tells_how_well_ranks_agree_and_what_the_first_choice_loses():
    a, b = ask(), ask(work="full")
    tiles = [attention.Config(m, 64, 4, 2) for m in (16, 32, 64, 128)]
    results = [_line(a, c, s) for c, s in zip(tiles, (1.0, 2.0, 3.0, 4.0))]
    results += [_line(b, c, s) for c, s in zip(tiles, (4.0, 3.0, 2.0, 1.0))]
    model_of = lambda asked, configs: static.Ranking([(c, _seconds(c.BLOCK_M)) for c in configs], {}, 0)
    good, bad = static_report.agreements(results, model_of)
    assert (good.ask, good.configs, good.spearman, good.lost) == (a, 4, 1.0, 0.0)
    assert (bad.spearman, bad.lost) == (-1.0, 3.0)
    some = lambda asked, configs: static.Ranking([(configs[1], _seconds(1.0))], {"spills": 3}, 0)
    lost = static_report.agreements(results, some)[0]
    assert lost.left == 3 and lost.lost == 1.0 and np.isnan(lost.spearman)
    ties = static_report.spearman(np.array([1.0, 1.0, 2.0, 3.0]), np.array([5.0, 6.0, 7.0, 8.0]))
    assert ties == pytest.approx(0.9487, abs=1e-4)


def run(*arguments: str) -> tuple[int, str]:
    import argparse

    parser = argparse.ArgumentParser()
    static_report.add_arguments(parser)
    text = io.StringIO()
    status = static_report.run(parser.parse_args(list(arguments)), Console(file=text, width=150))
    return status, text.getvalue()


def test_the_command_ranks_writes_and_validates(compiler, tmp_path):
    compiler.makes = lambda c: code(loop(), ctas=2 if c.BLOCK_M == 128 else 1, spills=5 * (c.num_stages == 3))
    path, results = tmp_path / "rows.json", tmp_path / "results.json"
    status, text = run("--static", "--arch", "sm90", "--D", "64", "--S", "1024", "--write", str(path))
    assert status == 0 and "not a measurement" in text and "left out: 24 spills" in text and "formula" in text
    (row,) = json.loads(path.read_text())["rows"]
    assert lookup.Row(row["when"], row["config"], "static").serves(ask()) and row["config"]["BLOCK_M"] == 128
    tiles = [attention.Config(m, 64, 4, 2) for m in (32, 64, 128)]
    long = ask(rows=4096, keys=4096, programs=32)
    results.write_text(json.dumps([_line(long, c, 1 / c.BLOCK_M) for c in tiles]))
    status, text = run("--validate", str(results))
    assert status == 0 and "1.00" in text and "median loss 0.0%" in text
    results.write_text('[{"config": {}}]')
    assert run("--validate", str(results))[0] == 2
    assert run("--static", "--arch", "sm71")[0] == run("--static", "--arch", "sm90", "--pass", "up")[0] == 2


# Assembly


AMD = """
attention_fwd:
\ts_load_dwordx2 s[0:1], s[4:5], 0x0
\tglobal_load_dwordx4 v[0:3], v[4:5], off
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\tds_read_b128 v[8:11], v12
\tv_mfma_f32_32x32x8_bf16 v[80:95], v[64:65], v[96:97], 0
\ts_cbranch_scc1 .LBB0_3
; %bb.2:                                ;   in Loop: Header=BB0_1 Depth=1
\tv_add_f32_e32 v1, v2, v3
\tv_exp_f32_e32 v1, v1
\ts_branch .LBB0_1
.LBB0_3:
\ts_endpgm
.Lfunc_end0:
"""


def test_the_loop_of_amd_assembly_is_found_and_priced():
    (found,), outside, loads = amd_code.parse(AMD, rates("gfx942"), 4)
    assert found.flop == 4 * 2 * 32 * 32 * 8 and outside == 3 and loads == {"global_load_dwordx4": 1}
    # 32 x 32 x 8 takes one of four SIMDs 32 clocks; 16 bytes for 64 lanes; exp2 takes four times an addition.
    assert found.clocks["tensor"] == 32 and found.clocks["smem"] == 4 * 64 * 16 / 128
    assert found.clocks["alu"] == 4 * 1 + 4 * 4 and found.clocks["issue"] == 4 * 6 / 4
    straight, outside, _ = amd_code.parse(AMD.replace("s_branch .LBB0_1", "s_branch .LBB0_3"), rates("gfx942"), 4)
    assert straight[0].flop == found.flop and outside == 0
    assert amd_code.resident(rates("gfx942"), 128, 32768, 4) == 2
    assert amd_code.resident(rates("gfx942"), 512, 16384, 4) == 1
    assert amd_code.resident(rates("gfx942"), 300, 16384, 8) == 0


# The compilers themselves


def test_a_real_ranking(monkeypatch, tmp_path):
    pytest.importorskip("triton", reason="no Triton beside this PyTorch")
    monkeypatch.setenv("TVCOMPILE_CACHE_DIR", str(tmp_path))
    a = ask(arch="sm90", D=64)
    configs = [attention.Config(128, 64, 4, 2), attention.Config(64, 16, 4, 2), attention.Config(64, 64, 4, 2)]
    amd, tile = ask(arch="gfx942", D=64), attention.Config(64, 32, 4, 1)
    jobs = [static.Job.of(x, c) for x, c in [*((a, c) for c in configs), (amd, tile)]]
    assert not [o.failure for _, o in workers.each(static.compiled, jobs, static.LIMIT) if o.failure]
    found = static.rank(a, configs)
    assert not found.compiled and not found.left and len(found) == 3
    # Blocks of 16 keys bring less to a product than they cost.
    assert found[-1][0].BLOCK_N == 16 and found[-1][1].seconds > 1.3 * found[0][1].seconds
    assert all(p.registers > 40 and p.ctas >= 1 and 0.01 < p.efficiency < 1 for _, p in found)
    other = static.predict(amd, tile)
    assert other.spills == 0 and other.shared <= 65536 and other.seconds > 0


def test_what_the_benchmark_times_is_what_validation_reads():
    pytest.importorskip("triton", reason="no Triton beside this PyTorch")
    import torch

    if torch.cuda.is_available():
        pytest.skip("on a GPU `python -m benchmarks.configs` itself times")
    from benchmarks import configs

    small = ask(arch="sm90", D=16, rows=32, keys=32, programs=1)
    small = dataclasses.replace(small, dtype="float32")
    tiles = [attention.Config(16, n, 4, 1) for n in (16, 32)]
    lines = json.loads(json.dumps(list(configs.timed(small, tiles, "cpu"))))
    assert [static_report.ask_of(x["ask"]) for x in lines] == [small] * 2
    assert [attention.Config(**x["config"]) for x in lines] == tiles and all(x["seconds"] > 0 for x in lines)
