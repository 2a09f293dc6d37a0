"""Names, versions, aliases and scans; what survives a restart, and at which cost."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest
from bad_adapters import make_bad_adapters

from chiliad.adapters import peft
from chiliad.adapters.registry import Registry
from chiliad.core import AdapterVersion
from chiliad.errors import (
    AdapterError,
    AdapterExists,
    AdapterMismatch,
    InvalidAdapter,
    InvalidConfig,
    InvalidRequest,
    ModelNotFound,
    Unavailable,
)
from chiliad.testing import SMOLLM2, base_info, write_random_adapter

BASE = base_info({**SMOLLM2, "num_hidden_layers": 2}, "smol")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_random_adapter(tmp_path / "source", BASE, 4, seed=1)


def test_add_resolve_remove(folder: Path) -> None:
    registry = Registry(base=BASE)
    added = registry.add(folder, "tone")
    assert added == registry.resolve("tone")
    assert (added.name, added.version, added.path) == ("tone", 1, str(folder))
    assert added.digest == peft.read_header(folder).digest
    assert added.nbytes == (folder / peft.TENSOR_FILE).stat().st_size
    q, k, v = added.ranks[:3]
    assert (q, k, v, len(added.ranks)) == (4, 0, 4, len(BASE.sites))
    entry = registry.entry("tone")
    assert (entry.method, entry.max_rank, entry.base_name, entry.origin) == ("lora", 4, "smol", "add")
    assert entry.created > 1e9
    assert entry.created == entry.updated
    assert registry.remove("tone") == [added]
    for call in (registry.resolve, registry.remove, registry.versions, registry.entry):
        with pytest.raises(ModelNotFound, match="tone"):
            call("tone")
    assert registry.count() == 0


def test_without_a_base_nothing_is_known_of_ranks(folder: Path) -> None:
    assert Registry().add(folder, "tone").ranks == ()


@pytest.mark.parametrize(
    "name", ["", ".hidden", "-x", "a/b", "../etc", "a b", "a:b", "a@1", "a\n", "a\x00b", "ä", "x" * 129]
)
def test_names_that_are_none(name: str, folder: Path) -> None:
    registry = Registry(base=BASE)
    with pytest.raises(InvalidRequest, match="cannot be an adapter's name"):
        registry.add(folder, name)
    with pytest.raises(InvalidRequest, match="cannot be an adapter's name"):
        registry.alias(name, "tone")
    with pytest.raises(ModelNotFound):
        registry.resolve(name)


@pytest.mark.parametrize("name", ["a", "7", "Sql-Lora_v1.2", "x" * 128, "a.b..c"])
def test_names_that_are_fine(name: str, folder: Path) -> None:
    registry = Registry(base=BASE)
    registry.add(folder, name)
    assert registry.resolve(name).name == name


def test_the_base_keeps_its_name(folder: Path) -> None:
    with pytest.raises(AdapterExists, match="base model"):
        Registry(base=BASE).add(folder, "smol")


def test_replace_makes_a_version(folder: Path, tmp_path: Path) -> None:
    registry = Registry(base=BASE)
    first = registry.add(folder, "tone")
    other = write_random_adapter(tmp_path / "other", BASE, 8)
    with pytest.raises(AdapterExists, match="taken"):
        registry.add(other, "tone")
    second = registry.add(other, "tone", replace=True)
    assert (second.version, registry.resolve("tone")) == (2, second)
    assert registry.resolve("tone@1") == first
    assert registry.resolve("tone@2") == second
    assert registry.versions("tone") == [first, second]
    assert registry.add(other, "tone", replace=True) == second  # nothing is new
    assert [entry.adapter for entry in registry.page()] == [second]
    assert registry.entry("tone@1").adapter == first
    for name in ("tone@3", "tone@0", "tone@", "tone@x", "tone@-1", "tone@1@1", "tone@9999999999999"):
        with pytest.raises(ModelNotFound):
            registry.resolve(name)
    assert registry.add(folder, "fresh", replace=True).version == 1
    assert registry.remove("tone") == [first, second]


def test_replacing_in_place(folder: Path) -> None:
    """The old version stays known, but its bytes are gone: loading it must fail, not mix."""
    registry = Registry(base=BASE)
    first = registry.add(folder, "tone")
    write_random_adapter(folder, BASE, 4, seed=2)
    second = registry.add(folder, "tone", replace=True)
    assert second.digest != first.digest
    assert peft.read_header(folder).digest == second.digest


def test_a_refused_folder_changes_nothing(folder: Path, tmp_path: Path) -> None:
    registry = Registry(base=BASE)
    first = registry.add(folder, "tone")
    for bad in make_bad_adapters(tmp_path / "bad", BASE):
        if bad.early:
            with pytest.raises(bad.error):
                registry.add(bad.folder, "tone", replace=True)
            with pytest.raises(bad.error):
                registry.add(bad.folder, "new")
    assert registry.versions("tone") == [first]
    assert registry.count() == 1


def test_aliases(folder: Path, tmp_path: Path) -> None:
    registry = Registry(base=BASE)
    first = registry.add(folder, "tone")
    second = registry.add(write_random_adapter(tmp_path / "b", BASE, 8), "tone", replace=True)
    registry.alias("stable", "tone@1")
    registry.alias("latest", "tone")
    assert registry.resolve("stable") == first
    assert registry.resolve("latest") == second
    assert registry.aliases("tone") == {"stable": "tone@1", "latest": "tone"}
    with pytest.raises(AdapterExists, match="taken"):
        registry.add(folder, "stable")
    with pytest.raises(AdapterExists, match="name of an adapter"):
        registry.alias("tone", "tone@1")
    with pytest.raises(ModelNotFound):
        registry.alias("x", "stable")  # an alias of an alias
    registry.unalias("latest")
    with pytest.raises(ModelNotFound):
        registry.unalias("latest")
    registry.remove("tone")
    assert registry.aliases() == {}
    with pytest.raises(ModelNotFound):
        registry.resolve("stable")


def test_restart_keeps_everything(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "home" / "registry.db"
    registry = Registry(path, BASE)
    registry.add(folder, "tone")
    registry.add(write_random_adapter(tmp_path / "b", BASE, 8), "tone", replace=True)
    registry.alias("stable", "tone@1")
    before = (registry.page(), registry.versions("tone"), registry.aliases())
    registry.close()
    again = Registry(path, BASE)
    assert (again.page(), again.versions("tone"), again.aliases()) == before
    assert again.resolve("stable").ranks == before[1][0].ranks


def test_another_base(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    Registry(path, BASE).add(folder, "tone")
    other = dataclasses.replace(BASE, name="other", fingerprint="f" * 64)
    registry = Registry(path, other)
    with pytest.raises(AdapterMismatch, match="registered for smol"):
        registry.resolve("tone")
    assert (registry.page(), registry.count()) == ([], 0)
    with pytest.raises(AdapterExists):
        registry.add(folder, "tone")
    assert registry.add(folder, "tone", replace=True).version == 1  # it fits: serve it here from now on
    assert (registry.count(), registry.entry("tone").base_name) == (1, "other")


def test_registered_without_a_base_and_checked_by_the_server(folder: Path, tmp_path: Path) -> None:
    """`chiliad adapters add`, then `chiliad serve`."""
    path = tmp_path / "registry.db"
    offline = Registry(path)
    offline.add(folder, "tone")
    dora = write_random_adapter(tmp_path / "dora", BASE, 2, config_overrides={"use_dora": True})
    with pytest.raises(InvalidAdapter, match="use_dora"):
        offline.add(dora, "dora")  # whatever the base
    deeper = base_info({**SMOLLM2, "num_hidden_layers": 3}, "smol")
    offline.add(write_random_adapter(tmp_path / "deeper", deeper, 2), "deeper")
    offline.add(write_random_adapter(tmp_path / "moved", BASE, 2), "moved")
    write_random_adapter(tmp_path / "moved", BASE, 2, seed=5)
    server = Registry(path, BASE)
    assert server.resolve("tone").ranks[0] == 4
    assert (server.entry("tone").base_name, server.entry("tone").max_rank) == ("smol", 4)
    assert server.resolve("tone").version == 1
    with pytest.raises(AdapterError, match=r"layers\.2"):
        server.resolve("deeper")
    with pytest.raises(AdapterError, match="changed after"):
        server.resolve("moved")
    assert offline.resolve("tone") == server.resolve("tone")


def test_looking_offline_makes_no_versions(tmp_path: Path) -> None:
    root, path = tmp_path / "adapters", tmp_path / "registry.db"
    for i in range(3):
        write_random_adapter(root / f"a{i}", BASE, 2, seed=i)
    other = dataclasses.replace(BASE, name="other", fingerprint="f" * 64)
    for base, added, unchanged in ((BASE, 3, 0), (None, 0, 3), (BASE, 0, 3), (other, 0, 3), (None, 0, 3)):
        registry = Registry(path, base)
        report = registry.scan(root)
        assert (len(report.added), report.unchanged, report.replaced) == (added, unchanged, [])
        assert registry.resolve("a1").version == 1
        assert registry.resolve("a1").ranks[0] == 2
        registry.close()


def test_a_touched_file_is_another_version_and_a_copied_inode_is_not(tmp_path: Path) -> None:
    root = tmp_path / "adapters"
    folder = write_random_adapter(root / "a", BASE, 2)
    registry = Registry(base=BASE)
    registry.scan(root)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)  # keeps the modification times
    shutil.rmtree(folder)
    shutil.move(copy, folder)
    assert (registry.scan(root).unchanged, registry.scan(root).unchanged) == (1, 1)
    assert registry.resolve("a").version == 1
    os.utime(folder / peft.TENSOR_FILE, ns=(1, 1))
    assert registry.scan(root).replaced == ["a"]


def test_a_database_of_the_future_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    Registry(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(InvalidConfig, match="newer"):
        Registry(path)


def test_not_a_database(tmp_path: Path) -> None:
    (tmp_path / "registry.db").write_bytes(b"something else entirely" * 100)
    with pytest.raises(InvalidConfig, match="cannot open"):
        Registry(tmp_path / "registry.db")


def test_pages(tmp_path: Path, folder: Path) -> None:
    registry = Registry(base=BASE)
    names = sorted(
        [f"a{i:03d}" for i in range(25)] + ["Zeta", "zeta-2", "under_score", "per%cent".replace("%", "")]
    )
    for name in names:
        registry.add(folder, name)
    seen: list[str] = []
    while page := registry.page(7, seen[-1] if seen else ""):
        seen += [entry.adapter.name for entry in page]
    assert seen == names
    assert registry.count() == len(names)
    assert [e.adapter.name for e in registry.page(query="ZETA")] == ["Zeta", "zeta-2"]
    assert [e.adapter.name for e in registry.page(query="_")] == ["under_score"]  # no wildcard
    assert registry.page(query="%") == []
    assert registry.page(0) == []


# -- scanning ----------------------------------------------------------------------------


def test_count_follows_every_writer(tmp_path: Path, folder: Path) -> None:
    """Counting takes a look at every row, so it is only done when something changed."""
    with (
        closing(Registry(tmp_path / "r.sqlite", BASE)) as here,
        closing(Registry(tmp_path / "r.sqlite", BASE)) as there,
    ):
        assert here.count() == 0
        (asked,) = here._spare
        looks: list[str] = []
        asked.set_trace_callback(lambda sql: looks.append(sql) if "count(*)" in sql else None)
        for number in (1, 2):
            here.add(folder, f"mine{number}")
            there.add(folder, f"yours{number}")
            assert [here.count() for _ in range(3)] == [2 * number] * 3
        there.remove("mine1")
        assert (here.count(), here.count(), there.count()) == (3, 3, 3)
        assert len(looks) == 3


def test_asking_waits_for_no_writer(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop asks: neither another process that writes nor a thread that waits for it may stop it."""
    monkeypatch.setattr("chiliad.adapters.registry._PATIENCE", 200_000)
    path = tmp_path / "r.sqlite"
    with closing(Registry(path)) as early:
        early.add(folder, "early")  # checked against no base yet: the first who asks does it
    with (
        closing(Registry(path, BASE)) as registry,
        closing(sqlite3.connect(path, isolation_level=None)) as stranger,
    ):
        registry.add(folder, "known")
        stranger.execute("BEGIN IMMEDIATE")
        waiting = threading.Thread(target=registry.remove, args=("known",))
        waiting.start()
        while registry._lock.acquire(blocking=False):  # until the thread has it
            registry._lock.release()
        assert registry.resolve("known").name == registry.entry("known").adapter.name == "known"
        assert len(registry.resolve("early").ranks) == len(BASE.sites)
        assert [entry.adapter.name for entry in registry.page()] == ["early", "known"]
        assert (registry.count(), len(registry.versions("known"))) == (2, 1)
        assert waiting.is_alive()
        stranger.execute("ROLLBACK")
        waiting.join(60)
        assert not waiting.is_alive()
        with pytest.raises(ModelNotFound):
            registry.resolve("known")
        registry.resolve("early")  # now it is noted
        assert registry.entry("early").base == BASE.fingerprint


def test_a_registry_that_cannot_be_written_says_so(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chiliad.adapters.registry._PATIENCE", 10)
    path = tmp_path / "r.sqlite"
    with (
        closing(Registry(path, BASE)) as registry,
        closing(sqlite3.connect(path, isolation_level=None)) as stranger,
    ):
        stranger.execute("BEGIN IMMEDIATE")
        with pytest.raises(Unavailable, match="another process"):
            registry.add(folder, "a")
        stranger.execute("ROLLBACK")
        registry.add(folder, "a")


def test_scan(tmp_path: Path) -> None:
    root, path = tmp_path / "adapters", tmp_path / "registry.db"
    for i in range(20):
        write_random_adapter(root / f"a{i:02d}", BASE, 1 + i, seed=i)
    bad = {bad.name: bad for bad in make_bad_adapters(root, BASE)}
    (root / ".git").mkdir()
    (root / "README.md").write_text("not a folder")
    (root / "no name").mkdir()
    (root / "smol").mkdir()  # the base's name
    (root / "linked").symlink_to(write_random_adapter(tmp_path / "elsewhere", BASE, 2))
    registry = Registry(path, BASE)
    early = {name for name, b in bad.items() if b.early}
    late = set(bad) - early  # NaN and the like: found when the tensors are read

    report = registry.scan(root)
    assert set(report.added) == {f"a{i:02d}" for i in range(20)} | late
    assert {r.name for r in report.rejected} == early | {"no name", "smol", "linked"}
    assert (report.replaced, report.unchanged, report.missing) == ([], 0, [])
    for rejected in report.rejected:
        if rejected.name in bad:
            assert bad[rejected.name].message in rejected.message
            with pytest.raises(InvalidAdapter, match="was found but not accepted"):
                registry.resolve(rejected.name)
    assert registry.rejected() == sorted(report.rejected, key=lambda r: r.name)
    assert registry.resolve("a07").ranks[0] == 8
    assert registry.entry("a07").origin == f"scan:{root}"

    registry.close()
    registry = Registry(path, BASE)
    write_random_adapter(root / "a03", BASE, 5, seed=99)
    shutil.rmtree(root / "a04")
    shutil.rmtree(root / "dora")
    write_random_adapter(root / "nan-in-the-config", BASE, 2)
    report = registry.scan(root)
    assert report.added == ["nan-in-the-config"]
    assert report.replaced == ["a03"]
    assert report.missing == ["a04"]
    assert report.unchanged == 18 + len(late)
    assert registry.resolve("a03").version == 2
    assert registry.resolve("nan-in-the-config").version == 1
    assert "dora" not in {r.name for r in registry.rejected()}


def test_scan_does_not_take_the_names_of_others(tmp_path: Path, folder: Path) -> None:
    registry = Registry(base=BASE)
    mine = registry.add(folder, "tone")
    write_random_adapter(tmp_path / "root" / "tone", BASE, 2)
    report = registry.scan(tmp_path / "root")
    assert [r.name for r in report.rejected] == ["tone"]
    assert registry.resolve("tone") == mine


def test_scan_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="no folder"):
        Registry().scan(tmp_path / "nowhere")
    assert Registry().scan(tmp_path).added == []


def test_scan_reads_no_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two thousand adapters register in the time of a few system calls each."""
    for i in range(5):
        write_random_adapter(tmp_path / f"a{i}", BASE, 64)
    bytes_read = 0
    original = os.pread

    def counting(file: int, size: int, offset: int) -> bytes:
        nonlocal bytes_read
        bytes_read += size
        return original(file, size, offset)

    monkeypatch.setattr(os, "pread", counting)
    registry = Registry(base=BASE)
    assert len(registry.scan(tmp_path).added) == 5
    assert bytes_read < 5 * 4096
    assert sum(registry.resolve(f"a{i}").nbytes for i in range(5)) > 5 * 100_000


def test_a_hundred_thousand_cost_no_memory(tmp_path: Path, folder: Path) -> None:
    """Nothing is cached: what the process holds does not grow with what is registered."""
    path = tmp_path / "registry.db"
    registry = Registry(path, BASE)
    registry.add(folder, "a")
    registry._db.execute("BEGIN")
    for table, columns in (("adapter", "version, created"), ("version", "*")):
        assert columns
        row = registry._db.execute(f"SELECT * FROM {table} WHERE name = 'a'").fetchone()
        marks = ", ".join("?" * len(row))
        registry._db.executemany(
            f"INSERT INTO {table} VALUES ({marks})", ((f"n{i:06d}", *row[1:]) for i in range(100_000))
        )
    registry._db.execute("COMMIT")
    registry.close()

    import tracemalloc

    tracemalloc.start()
    registry = Registry(path, BASE)
    assert registry.count() == 100_001
    assert registry.resolve("n077777").name == "n077777"
    assert len(registry.page(100, "n050000")) == 100
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 1_000_000  # 10 bytes each


def test_threads(folder: Path, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry.db", BASE)
    other = write_random_adapter(tmp_path / "other", BASE, 2)
    errors: list[Exception] = []

    def work(k: int) -> None:
        try:
            for i in range(15):
                registry.add((folder, other)[i % 2], "shared", replace=True)
                registry.add(folder, f"own-{k}-{i}")
                assert isinstance(registry.resolve("shared"), AdapterVersion)
                registry.page(5)
                if i % 3 == 0:
                    registry.remove(f"own-{k}-{i}")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert registry.count() == 1 + 4 * 10
    versions = registry.versions("shared")
    assert [v.version for v in versions] == list(range(1, len(versions) + 1))
