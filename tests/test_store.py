"""What was measured is kept: by many processes at once, through corrupt and stale files, for the ranks of a group."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch

from tests.harness import STRICT
from tvcompile.arch import Device
from tvcompile.tuning import choose, lookup, store
from tvcompile.tuning.attention import Ask
from tvcompile.tuning.kept import SCHEMA, Kept
from tvcompile.tuning.moe import Ask as MoeAsk
from tvcompile.tuning.store import Entry

ROOT = Path(__file__).resolve().parent.parent
SM90 = Ask(Device.typical("sm90", 132), "fwd", "bfloat16", 128, 128, "causal", 4096, 4096)
SMALL = Entry(
    {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}, "measured on NVIDIA H100, 2026-11-24", 1.2
)


def forget():
    store._memory.clear()
    store._seen.clear()
    choose.cache_clear()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TVCOMPILE_CACHE_DIR", str(tmp_path / "cache"))
    forget()
    yield tmp_path / "cache"
    forget()


def file_of(ask=SM90) -> Path:
    return store.folder() / f"{store.family(ask)}.json"


def test_what_is_kept_is_the_first_choice_at_once_and_in_the_next_process(cache):
    before = choose(SM90)
    assert "measured" not in before[0].source
    store.keep(SM90, SMALL)
    assert choose(SM90)[0].source == SMALL.source and choose(SM90)[0].config.BLOCK_N == 32
    assert choose(SM90)[1:] == before
    forget()
    assert choose(SM90) == before
    store.load()
    assert store.find(SM90) == SMALL and choose(SM90)[0].source == SMALL.source
    assert file_of().parent == cache / "tuning"


@pytest.mark.parametrize(
    "other",
    [
        {"pass_": "dq"},
        {"dtype": "float16"},
        {"D": 64},
        {"work": "full"},
        {"rows": 4097},
        {"keys": 2048},
        {"device": Device("sm90", 1024, 132)},
        {"device": Device("sm90", SM90.device.shared, 64)},
        {"device": Device.typical("sm100", 132)},
    ],
    ids=str,
)
def test_a_measurement_serves_its_own_key_only(other):
    store.keep(SM90, SMALL)
    assert store.find(dataclasses.replace(SM90, rows=4000)) == SMALL
    assert store.find(dataclasses.replace(SM90, **other)) is None


def test_programs_are_a_part_of_the_key_only_where_kv_is_split():
    decode = dataclasses.replace(SM90, pass_="decode", rows=4, programs=8)
    for ask, alike in ((SM90, True), (decode, False)):
        assert (ask.key == dataclasses.replace(ask, programs=100).key) is alike


def test_other_operators_and_sources_are_other_files(monkeypatch):
    moe = MoeAsk(SM90.device, "up", "bfloat16", 384)
    assert store.family(SM90).startswith("attention-sm90-") and store.family(moe).startswith("moe-sm90-")
    assert len({name.split("-")[2] for name in map(store.family, (SM90, moe))}) == 2
    for ask in (SM90, moe):
        files = [f for pattern in ask.sources for f in store.PACKAGE.glob(pattern)]
        assert len(files) >= len(ask.sources), ask.sources


def test_what_other_kernels_or_versions_gave_is_stale(monkeypatch):
    store.keep(SM90, SMALL)
    stale = file_of()
    for name, value in (("source_hash", lambda patterns: "0123456789ab"), ("_minor", lambda *names: "9.9")):
        with monkeypatch.context() as patch:
            patch.setattr(store, name, value)
            store._family.cache_clear()
            assert file_of() != stale and store.find(SM90) is None
    store._family.cache_clear()
    assert store.find(SM90) == SMALL


def test_the_source_hash_is_of_what_files_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "PACKAGE", tmp_path)
    hashes = []
    for text in ("a = 1", "a = 2"):
        (tmp_path / "kernel.py").write_text(text)
        store.source_hash.cache_clear()
        hashes.append(store.source_hash(("*.py",)))
    store.source_hash.cache_clear()
    assert hashes[0] != hashes[1]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 0, "rows": {}}', f'{{"schema": {SCHEMA}, "rows": 3}}'])
def test_a_corrupt_file_is_named_once_and_written_anew(text):
    file = file_of()
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.warns(UserWarning, match=file.name):
        store.load()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.load()
        assert store.find(SM90) is None
        store.keep(SM90, SMALL)
    forget()
    store.load()
    assert store.find(SM90) == SMALL


def test_rows_of_another_form_are_left_out():
    good = {"config": dict(SMALL.config), "source": "x", "ratio": 1.0}
    Kept(file_of()).update({SM90.key: good, "a": 3, "b": {**good, "more": 1}})
    Kept(file_of(MoeAsk(SM90.device, "up", "bfloat16"))).update(
        {MoeAsk(SM90.device, "up", "bfloat16").key: {**good, "config": {"BLOCK": 3}}}
    )
    store.load()
    assert len(store._memory[store.family(SM90)]) == 1
    # A config of unknown fields is no answer.
    assert all("measured" not in c.source for c in choose(MoeAsk(SM90.device, "up", "bfloat16")))


def test_a_file_is_bounded_and_the_oldest_go():
    kept = Kept(store.folder() / "x.json", most=3)
    for i in range(4):
        kept.update({str(i): i})
    kept.update({"1": 10})
    assert list(kept.rows().items()) == [("2", 2), ("3", 3), ("1", 10)]


def test_of_many_stale_files_the_oldest_go(monkeypatch):
    monkeypatch.setattr(store, "MOST_FILES", 3)
    store.keep(SM90, SMALL)
    for i in range(5):
        Kept(store.folder() / f"attention-sm90-{i}-triton2.0.json").update({})
    moe = MoeAsk(SM90.device, "up", "bfloat16", 384)
    store.keep(moe, SMALL)
    left = {f.stem for f in store.folder().glob("*.json")}
    assert left == {store.family(SM90), store.family(moe), "attention-sm90-4-triton2.0"}


def test_a_folder_that_cannot_be_written_is_said_and_memory_serves(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TVCOMPILE_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="could not be written"):
        store.keep(SM90, SMALL)
    assert choose(SM90)[0].source == SMALL.source
    with store.turn("x") as mine:
        assert mine


def test_what_fails_to_be_written_leaves_the_file_as_it_was():
    kept = Kept(store.folder() / "x.json")
    kept.update({"a": 1})
    with pytest.raises(TypeError):
        kept.update({"b": object()})
    assert kept.rows() == {"a": 1} and [f.suffix for f in sorted(store.folder().iterdir())] == [".json", ".lock"]


def test_export_import_and_clear(tmp_path):
    store.keep(SM90, SMALL)
    assert store.export(tmp_path / "all.json") == 1
    assert store.clear() == 1 and store.find(SM90) is None and store.entries() == {}
    assert not file_of().exists() and store.clear() == 0
    assert store.import_(tmp_path / "all.json") == 1 and store.find(SM90) == SMALL and file_of().exists()
    for text in ("{", '{"schema": 1, "rows": {"x": {"k": {"config": {}}}}}', '{"schema": 1, "rows": {"../x": {}}}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match="bad.json"):
            store.import_(tmp_path / "bad.json")


def test_a_graph_that_is_cached_is_of_one_state():
    from tvcompile.backend import Sharing

    before = Sharing(None).uuid()
    store.keep(SM90, SMALL)
    after = Sharing(None).uuid()
    store.keep(SM90, SMALL)
    assert before != after == Sharing(None).uuid()


def test_what_is_kept_is_read_when_a_graph_is_compiled():
    store.keep(SM90, SMALL)
    forget()
    with torch.no_grad():
        torch.compile(torch.relu, backend="tv", options=STRICT)(torch.ones(2))
    assert store.find(SM90) == SMALL


def test_a_lookup_opens_no_file(monkeypatch):
    store.keep(SM90, SMALL)
    choose(SM90)
    monkeypatch.setattr("builtins.open", lambda *a, **k: pytest.fail("a file was opened"))
    monkeypatch.setattr(Path, "open", lambda *a, **k: pytest.fail("a file was opened"))
    monkeypatch.setattr(Path, "stat", lambda *a, **k: pytest.fail("a file was looked for"))
    choose.cache_clear()
    assert choose(SM90)[0].source == SMALL.source
    assert choose(dataclasses.replace(SM90, rows=77, work="full"))


# Many processes

FILES = """
    import sys, time
    from tests.test_store import SM90, SMALL, Entry, dataclasses, store
    who, mine = int(sys.argv[1]), dataclasses.replace(SM90, pass_=f"p{sys.argv[1]}")
    for i in range(40):
        store.keep(dataclasses.replace(mine, D=8 * (1 + i)), Entry(SMALL.config, f"by {who}", 1.0))
        if i == 20:
            store.load()
    searched = False
    with store.turn("search", wait=60) as mine:
        if mine and store.find(SM90) is None:
            searched = True
            time.sleep(0.3)
            store.keep(SM90, SMALL)
    print(searched, store.find(SM90) == SMALL)
"""
RANKS = """
    import datetime, os, sys, time
    rank, file = int(sys.argv[1]), sys.argv[2]
    # Each rank has a cache folder of its own, as on machines that share none.
    os.environ["TVCOMPILE_CACHE_DIR"] = f"{file}.{rank}"
    import torch.distributed as dist
    from tests.test_store import SM90, SMALL, choose, dataclasses, store
    dist.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))

    def search(ask, wait):
        with store.turn("search", wait) as mine:
            if mine:
                time.sleep(0.3)
                store.keep(ask, SMALL)
        print(mine, choose(ask)[0].source)

    search(SM90, 60)
    # Now rank 1 asks first, and does not wait.
    dist.barrier() if rank == 0 else None
    search(dataclasses.replace(SM90, D=64), 0)
    dist.barrier() if rank == 1 else None
    dist.barrier()
    dist.destroy_process_group()
"""


def processes(program: str, *arguments: list) -> list[str]:
    """What processes that run at the same time print, one for each list of arguments."""
    command = [sys.executable, "-c", textwrap.dedent(program)]
    started = [
        subprocess.Popen([*command, *map(str, a)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for a in arguments
    ]
    ended = [p.communicate(timeout=120) for p in started]
    assert not any(p.returncode for p in started), "\n".join(error[-2000:] for _, error in ended)
    return [out.strip() for out, _ in ended]


def test_two_processes_at_once_lose_nothing_and_search_once():
    said = processes(FILES, [0], [1])
    held = json.loads(file_of().read_text())["rows"]
    assert len(held) == 81 and {row["source"] for row in held.values()} == {"by 0", "by 1", SMALL.source}
    assert sorted(said) == ["False True", "True True"]


def test_who_does_not_wait_goes_on_without_a_turn():
    with store.turn("a") as mine, store.turn("a") as again, store.turn("b") as other:
        assert mine and other and not again
    with store.turn("a") as mine:
        assert mine


def test_rank_0_searches_and_the_others_wait_or_take_what_is_shipped(tmp_path):
    first, second = (x.splitlines() for x in processes(RANKS, [0, tmp_path / "group"], [1, tmp_path / "group"]))
    assert first == [f"True {SMALL.source}"] * 2
    assert second == [f"False {SMALL.source}", "False table sm90: static"]


def test_a_search_that_fails_lets_the_next_one_have_its_turn():
    with pytest.raises(RuntimeError), store.turn("a"):
        raise RuntimeError
    with store.turn("a") as mine:
        assert mine


def test_a_state_says_what_the_tables_and_the_kernels_are(monkeypatch):
    before = lookup.state()
    lookup._shipped.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(lookup, "_text", lambda op: "changed")
        assert lookup.state() != before
    lookup._shipped.cache_clear()
    assert lookup.state() == before
