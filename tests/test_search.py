"""The search for configs: what may win, what is skipped, what a broken-off search keeps, and when it is asked."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import pickle
import warnings

import pytest
import torch
from rich.console import Console

import tvcompile
from tvcompile import sites
from tvcompile.arch import Device
from tvcompile.kernels import KERNELS, attention, cpu as products, moe
from tvcompile.kernels.problem import Need
from tvcompile.moe_spec import MoESpec
from tvcompile.spec import AttentionSpec
from tvcompile.tuning import choose, cpu, search, store
from tvcompile.tuning.trial import Unfit
from tvcompile.tuning.work import Attention, Capture, Experts
from tvcompile.tuning.workers import Outcome

CPU = torch.device("cpu")
CAUSAL = Attention(AttentionSpec.parse("scale=0.3; keep = kv <= q"), "float32", 1, 4, 2, 300, 300, 8, 8)
DOCUMENTS = "pad[b, kv] & seq[b, q] == seq[b, kv]"
PADDED = Attention(
    AttentionSpec.parse(f"scale=1; score = s + bias[h, kv - q + 69]; keep = {DOCUMENTS}; empty=mean"),
    "float32", 2, 4, 2, 70, 70, 8, 8,
    (Capture("float32", (4, 139), True), Capture("bool", (2, 70)), Capture("int64", (2, 70))),
)  # fmt: skip
CHUNK = "act = g*sigmoid(g)*u; layout=chunk"
MIXTURE = Experts(MoESpec.parse(CHUNK), "float32", 40, 2, 4, 16, 12, 10, biases=(True, True))
LISTED = Experts(
    MoESpec.parse(CHUNK.replace("chunk", "separate")), "float32", 40, 2, 4, 16, 12, 10, False, (True, True)
)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TVCOMPILE_CACHE_DIR", str(tmp_path))
    store.clear()
    yield
    store.clear()


def ask_of(work=CAUSAL, pass_="fwd"):
    return work.ask(Device.of(CPU), pass_)


class Clock:
    """Seconds that pass only when something runs."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Times:
    """A ratio for each config; every timing takes a second of the clock."""

    def __init__(self, clock, ratios, again=None, otherwise=0.5):
        self.clock, self.ratios, self.again, self.otherwise = clock, ratios, again or {}, otherwise
        self.timed = []

    def __call__(self, config, rounds):
        self.clock.now += 1
        self.timed.append(config)
        value = self.ratios.get(config, self.otherwise)
        value = self.again.get(config, value) if rounds == search.AGAIN else value
        if isinstance(value, Exception) or value is KeyboardInterrupt:
            raise value
        return value


def found(ratios, effort="quick", again=None, journal=None, budget=None, otherwise=0.5):
    clock = Clock()
    times = Times(clock, ratios, again, otherwise)
    return search.search(ask_of(), effort, times, clock, journal, budget=budget), times


BEST, SECOND = cpu.Config("cpu.products", 64), cpu.Config("cpu.flash", 128)


# What wins


def test_the_fastest_wins():
    result, times = found({BEST: 1.4, SECOND: 1.2})
    assert (result.config, result.ratio) == (BEST, 1.4) and result.complete
    others = [c for c in ask_of().candidates() if c != cpu.Config()]
    assert times.timed == [*others, BEST]


@pytest.mark.parametrize("ratio", [0.9, 1.0, 1.02])
def test_the_default_stays_where_nothing_is_faster(ratio):
    result, _ = found({BEST: ratio})
    assert (result.config, result.ratio) == (cpu.Config(), 1.0)


def test_what_was_only_lucky_gives_way_to_the_next():
    result, _ = found({BEST: 1.4, SECOND: 1.2}, again={BEST: 0.99})
    assert (result.config, result.ratio) == (SECOND, 1.2)


def test_candidates_that_fail_are_skipped_and_counted():
    result, _ = found(
        {BEST: Unfit("not done after 1 s"), SECOND: Unfit("crashed"), cpu.Config("cpu.flash"): Unfit("crashed")}
    )
    assert result.config == cpu.Config() and result.skipped == {"crashed": 2, "not done after 1 s": 1}
    assert "2 skipped: crashed" in result.text


def test_full_goes_on_to_neighbours_until_nothing_improves():
    further = cpu.Config("cpu.products", 512)
    beyond = dataclasses.replace(further, scores=1 << 20)
    assert not {further, beyond} & set(ask_of().candidates())
    ratios = {cpu.Config("cpu.products", 256): 1.2, further: 1.3, beyond: 1.5}
    assert found(ratios, "quick")[0].config == cpu.Config("cpu.products", 256)
    result, times = found(ratios, "full")
    assert (result.config, result.ratio) == (beyond, 1.5)
    assert len(times.timed) == len(set(times.timed)) + 1, "nothing but the winner is timed twice"


def test_full_is_repeatable():
    ratios = {cpu.Config("cpu.products", 256): 1.2}
    assert found(ratios, "full")[1].timed == found(ratios, "full")[1].timed


def test_a_budget_ends_the_search():
    result, times = found({}, budget=3.0)
    assert len(times.timed) == 4 and result.complete, "the first is free"


def test_neighbours_are_configs_that_differ_in_one_field():
    known = ask_of().candidates()
    for near in search.neighbours(BEST, ask_of(), known):
        changed = [f.name for f in dataclasses.fields(near) if getattr(near, f.name) != getattr(BEST, f.name)]
        assert len(changed) == 1
    steps = {c.BLOCK_M for c in search.neighbours(BEST, ask_of(), known)}
    assert steps == {32, 64, 128}


# What was broken off


def test_a_search_that_was_broken_off_keeps_the_best_and_goes_on_there(tmp_path):
    file = tmp_path / "search.jsonl"
    order = [c for c in ask_of().candidates() if c != cpu.Config()]
    result, first = found({order[1]: 1.3, order[3]: KeyboardInterrupt}, journal=search.Journal(file))
    assert (result.config, result.ratio, result.complete) == (order[1], 1.3, False)
    result, second = found({order[1]: 1.3, order[4]: 1.5}, journal=search.Journal(file))
    assert result.config == order[4] and result.complete
    assert second.timed == [*order[3:], order[4]]


def test_a_line_that_was_cut_off_is_timed_again(tmp_path):
    file = tmp_path / "search.jsonl"
    found({}, journal=search.Journal(file))
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:2]) + lines[2][:10])
    assert len(search.Journal(file).lines) == 2


class InProcess:
    """A Worker without a process."""

    ratios: dict = {}
    jobs: list = []

    def __init__(self, function):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def call(self, asked, limit):
        job, config, _ = asked
        self.jobs.append((job.work, job.pass_, config))
        value = self.ratios.get(config, 0.5)
        if isinstance(value, BaseException):
            raise value
        return Outcome(value)


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(InProcess, "jobs", [])
    monkeypatch.setattr(InProcess, "ratios", {})
    monkeypatch.setattr(search, "Worker", InProcess)
    return InProcess


def test_what_was_found_is_kept_and_not_searched_again(in_process):
    in_process.ratios[BEST] = 1.25
    assert [s.found.ratio for s in search.tune([CAUSAL], CPU, "quick")] == [1.25, 1.25]
    for ask in CAUSAL.asks(Device.of(CPU)):
        best = choose(ask)[0]
        assert best.config == BEST and best.source.startswith("measured on ") and "1.25" in best.source
    assert search.tune([CAUSAL], CPU, "quick") == []


def test_that_nothing_is_faster_is_kept_too(in_process):
    search.tune([CAUSAL], CPU, "quick")
    assert store.find(ask_of()).ratio == 1.0 and "nothing is faster" in store.find(ask_of()).source
    assert search.pending([CAUSAL], Device.of(CPU)) == []


@pytest.mark.parametrize("load", [0.1, 40.0])
def test_a_busy_machine_is_warned_of(in_process, monkeypatch, load):
    monkeypatch.setattr(search.os, "getloadavg", lambda: (load, 0.0, 0.0))
    console = Console(record=True, width=200, file=io.StringIO())
    search.tune([CAUSAL], CPU, "quick", console)
    assert ("the machine is busy (load 40.0 on" in console.export_text()) == (load > 1)


def test_after_ctrl_c_the_next_search_goes_on(in_process):
    in_process.ratios[cpu.Config("cpu.flash", 256)] = KeyboardInterrupt()
    sites_ = search.tune([CAUSAL], CPU, "quick")
    assert [s.found.complete for s in sites_] == [False], "the search of the next pass is not begun"
    before = len(in_process.jobs)
    in_process.ratios.clear()
    assert [s.found.complete for s in search.tune([CAUSAL], CPU, "quick")] == [True, True]
    forward = [c for _, pass_, c in in_process.jobs[before:] if pass_ == "fwd"]
    assert forward[0] == cpu.Config("cpu.flash", 256)


def test_a_process_without_the_turn_searches_nothing(in_process, monkeypatch):
    monkeypatch.setattr(store, "turn", lambda name, wait: contextlib.nullcontext(False))
    assert search.tune([CAUSAL], CPU, "quick") == [] and in_process.jobs == []


def test_what_another_process_found_while_this_one_waited_is_not_searched(in_process, monkeypatch):
    @contextlib.contextmanager
    def turn(name, wait):
        for ask in CAUSAL.asks(Device.of(CPU)):
            store.keep(ask, store.Entry(dataclasses.asdict(BEST), "measured on another", 2.0))
        yield True

    monkeypatch.setattr(store, "turn", turn)
    assert search.tune([CAUSAL], CPU, "quick") == [] and in_process.jobs == []


# While a graph is compiled


def test_a_model_is_tuned_while_it_is_compiled():
    """With a process of its own, as users have it."""
    x = torch.randn(1, 2, 24, 8)

    def attend(x):
        return (x @ x.mT * 8**-0.5).softmax(-1) @ x

    with tvcompile.collect() as report:
        options = {"tv.tune": "quick", "tv.strict": True, "tv.codegen": "none"}
        got = torch.compile(attend, backend="tv", options=options)(x)
    torch.testing.assert_close(got, attend(x))
    assert "measured on" in report.sites[0].configs and "measured on" in str(report)
    ((work, device),) = report.works
    assert store.find(work.ask(Device.of(device), "fwd")).ratio >= 1.0


def attend(q, k, v):
    return (q @ k.mT * 0.3).softmax(-1) @ v


def compiled(fn, args, dynamic=None, **options):
    torch._dynamo.reset()
    given = {"tv.tune": "quick", "tv.codegen": "none"} | {f"tv.{k}": v for k, v in options.items()}
    call = torch.compile(fn, backend="tv", options=given, dynamic=dynamic)
    with tvcompile.collect() as report:
        call(*args)
    return call, report


@pytest.mark.parametrize("train", [False, True])
def test_a_compiled_call_searches_nothing_and_gets_what_was_found(in_process, monkeypatch, train):
    in_process.ratios[BEST] = 1.25
    args = [torch.randn(1, 2, 100, 8, requires_grad=train) for _ in range(3)]
    call, report = compiled(attend, args)
    assert {pass_ for _, pass_, _ in in_process.jobs} == ({"fwd", "bwd"} if train else {"fwd"})
    jobs, configs = len(in_process.jobs), []
    monkeypatch.setattr(products, "tiles", lambda p: [configs.append(p.config), tiles(p)][1])
    got = call(*args)
    torch.testing.assert_close(got, attend(*args))
    if train:
        got.sum().backward()
    assert len(in_process.jobs) == jobs and set(configs) == {BEST}
    compiled(attend, args)
    assert len(in_process.jobs) == jobs, "the second compilation finds what the first one kept"
    assert report.sites[0].configs.count("1.25 times") == 1 + train


tiles = products.tiles


def test_a_mixture_is_tuned(in_process, monkeypatch):
    best = cpu.ExpertConfig(1 << 17, 1 << 15)
    in_process.ratios[best] = 1.25
    search.tune([MIXTURE], CPU, "quick")
    seen = []
    kernel = moe.choose(moe.ExpertNeed(MIXTURE.spec, torch.float32))
    spy = dataclasses.replace(kernel, backward=lambda p, *rest: [seen.append(p.config), kernel.backward(p, *rest)][1])
    monkeypatch.setattr(moe, "choose", lambda need: spy)
    x, *rest = MIXTURE.inputs(CPU)
    torch.ops.tv.moe(x.requires_grad_(), *rest, True)[0].sum().backward()
    assert seen == [best]


def test_sizes_that_may_change_are_tuned_as_they_are_now(in_process):
    args = [torch.randn(1, 2, 50, 8) for _ in range(3)]
    compiled(attend, args, dynamic=True)
    assert {work.S_kv for work, *_ in in_process.jobs} == {50}


def test_sizes_that_are_not_known_are_left_out_with_a_warning(in_process):
    with pytest.warns(UserWarning, match="not tuned: the size of S_kv is not known"):
        sites.tune([(dataclasses.replace(CAUSAL, S_kv=0), CPU)], "quick")
    assert in_process.jobs == []


def test_a_search_that_fails_does_not_fail_the_compilation(in_process):
    in_process.ratios |= {c: RuntimeError("no process") for c in ask_of().candidates()}
    args = [torch.randn(1, 2, 100, 8) for _ in range(3)]
    with pytest.warns(UserWarning, match="search for configs failed .RuntimeError: no process"):
        call, report = compiled(attend, args)
    assert len(report.sites) == 1 and not report.records[0].failed
    with pytest.raises(Exception, match="no process"):
        compiled(attend, args, strict=True)


def test_without_tune_nothing_is_searched(in_process):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(attend, [torch.randn(1, 2, 100, 8) for _ in range(3)], tune="none")
    assert in_process.jobs == []


def test_the_environment_sets_the_effort(monkeypatch):
    monkeypatch.setenv("TVCOMPILE_TUNE", "quick")
    assert tvcompile.backend.Options.parse(None)[0].tune == "quick"
    monkeypatch.setenv("TVCOMPILE_TUNE", "hard")
    with pytest.raises(ValueError, match="tv.tune must be one of 'none', 'quick', 'full'"):
        tvcompile.backend.Options.parse(None)


# Problems


@pytest.mark.parametrize("work", [CAUSAL, PADDED, MIXTURE, LISTED], ids=["causal", "padded", "stacked", "listed"])
def test_a_problem_goes_to_another_process(work):
    assert pickle.loads(pickle.dumps(work)) == work


@pytest.mark.parametrize("bias", [False, True])
def test_the_problem_of_a_site_is_that_of_its_call(bias, in_process, monkeypatch):
    """Searched under one key, found under the same; a learned bias wants its gradient."""
    slope = torch.randn(4, 60, 60, requires_grad=bias)

    def biased(q, k, v, slope):
        return (q @ k.mT * 0.3 + slope).softmax(-1) @ v

    args = [torch.randn(2, 4, 60, 8, requires_grad=True) for _ in range(3)] + [slope]
    asked = []
    monkeypatch.setattr(attention.tuning, "choose", lambda ask: [asked.append(ask.key), choose(ask)][1])
    call, report = compiled(biased, args, tune="none")
    call(*args).sum().backward()
    ((work, device),) = report.works
    assert {a.key for a in work.asks(Device.of(device))} == set(asked)
    assert all("dcaptures" in key for key in asked if " bwd " in key) == bias


@pytest.mark.parametrize("dtype, wanted, scores, prefer, serves", [
    ("float32", None, 1 << 25, "cpu.flash", True),
    ("float32", None, 1 << 10, "cpu.products", False),
    ("float32", (), 1 << 25, "cpu.flash", True),
    ("bfloat16", None, 1 << 25, "cpu.flash", True),
    ("bfloat16", None, 1 << 10, "cpu.products", True),
    ("bfloat16", (), 1 << 25, "cpu.flash", False),
    ("bfloat16", (), 1 << 10, "cpu.products", True),
])  # fmt: skip
def test_a_measurement_chooses_the_kernel_where_lse_allows_it(dtype, wanted, scores, prefer, serves):
    """In 16 bits forward by products and backward by flash do not go together, so neither is led there."""
    flash = next(k for k in KERNELS if k.name == "cpu.flash")
    spec = AttentionSpec.parse("scale=1; keep = kv <= q & q - kv < 64")
    assert (flash.supports(Need(spec, getattr(torch, dtype), wanted, scores, prefer=prefer)) is None) == serves
