"""Which config an architecture gets, and from where: rows, bounds, fallback, shared memory, the formula."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest

from tvcompile.arch import SHARED, Device, family
from tvcompile.tuning import ask, attention, choose, lookup, moe, store
from tvcompile.tuning.attention import PASSES, WIDTHS, Ask, Config

SM90 = Ask(Device.typical("sm90", 132), "fwd", "bfloat16", 128, 128, "causal", 4096, 4096)
A, B, C = ({"BLOCK_M": m, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2} for m in (16, 32, 128))


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("TVCOMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(store, "_memory", {})
    choose.cache_clear()
    yield
    choose.cache_clear()


@pytest.fixture
def table(monkeypatch):
    """Puts rows in the place of the shipped ones."""

    def forget() -> None:
        for cached in (lookup.rows, lookup._plain, lookup._filed, choose):
            cached.cache_clear()

    def put(*rows: tuple) -> None:
        made = [
            {"when": {"arch": "sm90"} | when, "config": config, "shared": sum(shared)} for when, config, *shared in rows
        ]
        monkeypatch.setattr(lookup, "_text", lambda op: json.dumps({"source": "static", "rows": made}))
        forget()

    yield put
    monkeypatch.undo()
    forget()


def blocks(ask: Ask) -> list[int]:
    """BLOCK_M of the rows that serve, in their order."""
    return [c.config.BLOCK_M for c in choose(ask) if c.source.startswith("table")]


def test_rows_serve_what_they_name_and_nothing_near(table):
    table(({"work": "causal", "width": 128}, A), ({"work": "full"}, B))
    assert blocks(SM90) == [16] and blocks(dataclasses.replace(SM90, work="full")) == [32]
    assert blocks(dataclasses.replace(SM90, work="data")) == blocks(dataclasses.replace(SM90, D=64, D_v=64)) == []
    assert blocks(dataclasses.replace(SM90, device=Device.typical("sm100", 132))) == []
    assert [c.source for c in choose(dataclasses.replace(SM90, work="data"))] == ["formula"]


def test_of_bounds_the_smallest_that_holds_comes_first(table):
    table(({}, C), ({"rows": "<=4096"}, B), ({"rows": "<=1024"}, A))
    asked = {rows: blocks(dataclasses.replace(SM90, rows=rows)) for rows in (0, 1, 1024, 1025, 4096, 4097)}
    assert asked == {0: [128], 1: [16, 32, 128], 1024: [16, 32, 128], 1025: [32, 128], 4096: [32, 128], 4097: [128]}


def test_more_than_a_bound_or_not_known(table):
    table(({"rows": ">64"}, A))
    assert {n: blocks(dataclasses.replace(SM90, rows=n)) for n in (0, 64, 65)} == {0: [16], 64: [], 65: [16]}


@pytest.mark.parametrize("N", [2048, 2816])
@pytest.mark.parametrize("rows", [0, 16, 8192])
def test_experts_are_specialized_on_sm100(rows, N):
    asked = moe.Ask(Device.typical("sm100", 148), "up", "bfloat16", rows, 64, N, 2048, 8)
    assert choose(asked)[0].config.specialize is (rows != 16)


@pytest.mark.parametrize("rows, block", [(0, 64), (1, 16), (8, 16), (9, 32), (16, 32), (17, 64), (8192, 64)])
def test_rows_where_experts_in_float32_would_spill(rows, block):
    """The formula's config of BLOCK_K 32 takes more registers there than there are."""
    asked = moe.Ask(Device.typical("sm120"), "dact", "float32", rows, 64, 1408, 2048, 8)
    config = choose(asked)[0].config
    assert (config.BLOCK_M, config.BLOCK_N, config.BLOCK_K, config.num_warps) == (block, 64, 16, 4)
    asked = moe.Ask(Device.typical("sm100"), "up", "float32", rows, 64, 2048, 2048, 8)
    config = choose(asked)[0].config
    assert (config.BLOCK_M, config.num_warps) == (block, 2 if block == 32 else 4)


def test_half_of_a_trip_is_long_enough_for_tensor_cores():
    with pytest.raises(ValueError, match="half of BLOCK_K is at least 16"):
        moe.Config(64, 64, 16, 4, 2, halved=True)


def test_one_of_several_values_and_nothing_but_these_edits(table):
    table(({"mask": ["full", "causal"], "edits": ["sink", "score"]}, A))
    served = "full", "causal", "causal+sink", "causal+score", "causal+score+sink"
    left = "data", "mask", "data+sink", "causal+dropout", "causal+dropout+sink", "causal+bias"
    assert all(blocks(dataclasses.replace(SM90, work=w)) == [16] for w in served)
    assert not any(blocks(dataclasses.replace(SM90, work=w)) for w in left)


def test_a_row_is_left_out_where_its_shared_memory_is_not_there(table):
    table(({}, A, 100 * 1024), ({}, B, 99 * 1024), ({}, C, 0))
    assert blocks(SM90) == [16, 32, 128]
    assert blocks(dataclasses.replace(SM90, device=Device("sm90", 99 * 1024, 132))) == [32, 128]


def test_the_same_config_is_named_once_by_its_best_source(table):
    formula = SM90.formula()[0]
    table(({}, dataclasses.asdict(formula)))
    assert [(c.config, c.source) for c in choose(SM90)] == [(formula, "table sm90: static")]


@pytest.mark.parametrize(
    "arch, serves",
    [
        *((a, a) for a in SHARED),
        ("sm87", "sm86"),
        ("sm88", "sm86"),
        ("sm103", "sm100"),
        ("sm110", "sm100"),
        ("sm121", "sm120"),
        ("sm130", "sm120"),
        ("gfx951", "gfx950"),
        ("gfx945", "gfx942"),
        ("sm75", None),
        ("gfx90a", None),
        ("gfx1100", None),
        ("mps", None),
    ],
)
def test_every_architecture_gets_its_own_configs_or_those_of_the_newest_before_it(arch, serves):
    assert family(arch) == serves
    for kind in (attention.Ask, moe.Ask):
        found = choose(kind(Device.typical(arch, 100), "dw" if kind is moe.Ask else "dq", "bfloat16", 128))
        assert bool(found) is (serves is not None)
        said = f" (fallback from {serves})" if serves != arch else ""
        assert all(c.source.endswith(said) and ("fallback" in c.source) is bool(said) for c in found)


def test_a_newer_architecture_with_less_shared_memory_gets_what_fits():
    # No such device is known; its limit counts, not that of the one whose rows serve.
    device = Device("sm107", 64 * 1024, 100)
    for pass_ in PASSES:
        for width in WIDTHS:
            found = choose(Ask(device, pass_, "bfloat16", width, width, "causal", 4096, 4096))
            assert found and all(c.source.endswith("(fallback from sm100)") for c in found)
            assert max(width * 2 * (c.config.BLOCK_M + 2 * c.config.BLOCK_N) for c in found) <= 64 * 1024 + 49152
    for pass_ in moe.PASSES:
        asked = moe.Ask(device, pass_, "bfloat16", 384)
        assert all(asked.fits(c.config) for c in choose(asked))


@pytest.mark.parametrize("arch", SHARED)
def test_what_the_formula_of_experts_gives_fits_by_the_bytes_of_its_tiles(arch):
    for pass_, dtype in itertools.product(moe.PASSES, ("bfloat16", "float32")):
        for rows in (0, 4, 32, 64, 1000):
            asked = moe.Ask(Device.typical(arch, 100), pass_, dtype, rows)
            assert all(asked.fits(c) for c in asked.formula())
    more = moe.Config(128, 256, 128, 8, 4)
    assert not moe.Ask(Device.typical(arch), "up", "bfloat16").fits(more)


def test_measured_table_formula_in_this_order():
    sources = [c.source for c in choose(SM90)]
    assert list(dict.fromkeys(sources)) == ["table sm90: static", "formula"]
    entry = store.Entry({**A}, "measured on NVIDIA H100, 2026-11-24")
    store._remember(store.family(SM90), {SM90.key: dataclasses.asdict(entry)})
    assert [c.source for c in choose(SM90)] == [entry.source, *sources]


def test_what_was_measured_is_taken_as_it_was():
    decode = dataclasses.replace(SM90, pass_="decode", rows=4, programs=8)
    entry = store.Entry({**A, "packed": True, "splits": 7}, "measured")
    store._remember(store.family(decode), {decode.key: dataclasses.asdict(entry)})
    assert choose(decode)[0].config.splits == 7 != choose(decode)[1].config.splits


def test_what_no_kernel_serves_has_no_choice():
    assert choose(dataclasses.replace(SM90, D=512)) == ()
    assert choose(dataclasses.replace(SM90, device=Device("sm75", 65536, 40))) == ()


def test_an_operator_without_a_table_gets_its_formula():
    @dataclasses.dataclass(frozen=True)
    class Other(ask.Ask):
        op, answer = "other", Config
        problem = ""

        def formula(self):
            return [Config(**B)]

    assert lookup.rows("other") == ()
    assert [c.source for c in choose(Other(Device.typical("sm90"), "fwd", "bfloat16"))] == ["formula"]


# What each architecture gets, forward in 16 bits of a causal mask: BLOCK_M, BLOCK_N, warps, descriptors.
FORWARD = {
    "sm80": [(128, 64, 4, False), (128, 32, 4, False), (64, 64, 4, False)],
    "sm86": [(128, 64, 4, False), (128, 128, 8, False), (64, 32, 4, False)],
    "sm89": [(128, 64, 4, False), (128, 128, 8, False), (64, 32, 4, False)],
    "sm90": [(128, 128, 4, True), (128, 128, 8, True), (128, 64, 8, True)],
    "sm100": [(128, 128, 8, True), (128, 128, 8, True), (64, 64, 8, True)],
    "sm120": [(128, 64, 4, True), (128, 128, 8, True), (64, 32, 4, True)],
    "gfx942": [(128, 32, 4, False), (128, 32, 4, False), (64, 32, 4, False)],
    "gfx950": [(128, 32, 4, False), (128, 32, 4, False), (64, 32, 4, False)],
}


@pytest.mark.parametrize("arch", SHARED)
def test_the_table_gives_each_architecture_what_was_chosen_for_it(arch):
    found = []
    for width in WIDTHS:
        c = choose(dataclasses.replace(SM90, device=Device.typical(arch, 100), D=width, D_v=width))[0].config
        found.append((c.BLOCK_M, c.BLOCK_N, c.num_warps, c.descriptors))
    assert found == FORWARD[arch]


def test_every_row_can_be_reached_and_says_what_it_takes():
    for row in lookup.rows("attention"):
        when = row.when
        assert set(when) <= {"arch", "pass_", "size", "width", "mask", "edits", "work", "rows", "keys"}, when
        mask = when["work"] if "work" in when else when.get("mask", ["causal"])[0]
        dtype = {2: "bfloat16", 4: "float32"}[when["size"]]
        device = Device.typical(when["arch"], 100)
        served = Ask(device, when["pass_"], dtype, when["width"], when["width"], mask, 16, 4096)
        assert row.serves(served), when
        assert served.fitted(Config(**row.config)) in [c.config for c in choose(served)]
