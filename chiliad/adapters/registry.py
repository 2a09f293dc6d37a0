"""Names of adapters: which folder a name means, in which version, since when.

The registry is one SQLite file and the only module with SQL in it. Nothing is cached, so a
hundred thousand adapters cost disk, not memory. An adapter's tensors are not read here: config
and header are checked against the base, and the rank of every slot is kept, so that memory can
be reserved later without touching the disk.

Names are names: they never become paths. `base:adapter` is written by clients, so ":" cannot
be in a name, and `name@2` pins a version, so "@" cannot either.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

from chiliad.adapters import peft
from chiliad.core import AdapterVersion, BaseInfo
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

_PATIENCE = 10_000  # milliseconds that a writer waits for a writer in another process

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

#: Each entry takes a database one step further; `PRAGMA user_version` counts them.
_MIGRATIONS = (
    """
    CREATE TABLE adapter (
        name TEXT PRIMARY KEY,
        version INTEGER NOT NULL,  -- the one that the name means now
        created REAL NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE version (
        name TEXT NOT NULL,
        version INTEGER NOT NULL,
        digest TEXT NOT NULL,
        path TEXT NOT NULL,
        nbytes INTEGER NOT NULL,
        method TEXT NOT NULL,
        max_rank INTEGER NOT NULL,
        ranks TEXT NOT NULL,       -- JSON: rank per slot of the base
        base TEXT NOT NULL,        -- fingerprint of the base it was checked against, or ""
        base_name TEXT NOT NULL,
        origin TEXT NOT NULL,      -- "add", "upload", "scan:/folder", ...
        stamp TEXT NOT NULL,       -- peft.Header.stamp
        created REAL NOT NULL,
        PRIMARY KEY (name, version)
    );                         -- with rowid: rows of a kilobyte would overflow an index page
    CREATE TABLE alias (
        alias TEXT PRIMARY KEY,
        target TEXT NOT NULL       -- "name" or "name@2"
    ) WITHOUT ROWID;
    CREATE TABLE rejected (        -- folders that a scan could not register
        name TEXT PRIMARY KEY,
        path TEXT NOT NULL,
        code TEXT NOT NULL,
        message TEXT NOT NULL,
        origin TEXT NOT NULL
    ) WITHOUT ROWID;
    """,
    "CREATE INDEX version_digest ON version (digest);",
)

_ENTRY = """
    SELECT v.name, v.version, v.digest, v.path, v.nbytes, v.ranks,
           v.method, v.max_rank, v.base, v.base_name, v.origin, a.created, v.created
    FROM adapter a JOIN version v ON v.name = a.name
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """One registered adapter, as listings show it."""

    adapter: AdapterVersion
    method: str  # "lora"
    max_rank: int
    base: str  # fingerprint of the base it was checked against, "" if none was known
    base_name: str
    origin: str
    created: float  # seconds since the epoch, of the name
    updated: float  # of the version that the name means


@dataclass(frozen=True, slots=True)
class Rejected:
    """A folder that a scan found and could not register."""

    name: str
    path: str
    code: str
    message: str


@dataclass(slots=True)
class ScanReport:
    """What a scan did, by name."""

    added: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    unchanged: int = 0
    rejected: list[Rejected] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # known from this root, but gone


@dataclass(frozen=True, slots=True)
class _Row:
    """A checked folder on its way into the database."""

    entry: Entry
    stamp: str


class Registry:
    """Adapters by name. Safe to use from any thread.

    Those who ask wait for nobody, not even for a writer in another process: SQLite's write-ahead
    log serves them as of the last commit, each on a connection of its own. So the event loop may.

    path: a file, or ":memory:". With `base`, adapters are checked against it when they are
    added, and those of other bases are kept but not listed. Without (`chiliad adapters ls`),
    folders are only read, and checked when a server resolves them.
    """

    def __init__(
        self, path: str | Path = ":memory:", base: BaseInfo | None = None, limits: peft.Limits | None = None
    ) -> None:
        self.base = base
        self._limits = limits or peft.Limits()
        self._lock = threading.RLock()
        self._recipes = peft.Recipes(base, self._limits)
        self._counted: dict[sqlite3.Connection, tuple[int, int]] = {}  # state of the database, count
        self._path = path
        self._open: list[sqlite3.Connection] = []
        self._spare: list[sqlite3.Connection] = []  # open for reading, and not in use
        self._finalizer = weakref.finalize(self, _close, self._open)
        try:
            if path != ":memory:":
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._db = self._connect()
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._migrate()
        except (sqlite3.Error, OSError) as error:
            raise InvalidConfig(
                f"cannot open the adapter registry at {path} ({error}): set CHILIAD_HOME to a folder that can be "
                "written"
            ) from error

    def close(self) -> None:
        with self._lock:
            self._finalizer()

    # -- changing ------------------------------------------------------------------------

    def add(
        self, folder: str | Path, name: str, *, replace: bool = False, origin: str = "add"
    ) -> AdapterVersion:
        """Register a folder. With `replace`, a taken name moves on to a new version.

        Raises InvalidRequest (name), AdapterExists, InvalidAdapter, AdapterMismatch, AdapterTooLarge.
        """
        self._check_name(name)
        if not replace:
            self._refuse_taken(name)  # before the files are read, for a quick and clear answer
        row = self._inspect(folder, name, origin)
        with self._writing():
            if not replace:
                self._refuse_taken(name)
            return self._insert(row)

    def remove(self, name: str) -> list[AdapterVersion]:
        """Forget a name and all its versions, which are returned; aliases of it go too.

        Files stay where they are. Raises ModelNotFound.
        """
        with self._writing():
            rows = self._db.execute(_ENTRY + "WHERE v.name = ? ORDER BY v.version", (name,)).fetchall()
            if not rows:
                raise self._not_found(name)
            self._db.execute("DELETE FROM adapter WHERE name = ?", (name,))
            self._db.execute("DELETE FROM version WHERE name = ?", (name,))
            self._db.execute("DELETE FROM alias WHERE target = ? OR target GLOB ?", (name, f"{name}@*"))
            return [_entry(row).adapter for row in rows]

    def alias(self, alias: str, target: str) -> None:
        """Let `alias` mean an adapter ("name") or one version of it ("name@2"). Moves an old alias."""
        self._check_name(alias)
        with self._writing():
            if self._db.execute("SELECT 1 FROM adapter WHERE name = ?", (alias,)).fetchone():
                raise AdapterExists(f"{alias} is the name of an adapter: choose another alias", param="alias")
            if _find(self._db, target) is None:  # an alias of an alias would have to be followed
                raise self._not_found(target)
            self._db.execute("INSERT OR REPLACE INTO alias VALUES (?, ?)", (alias, target))

    def unalias(self, alias: str) -> None:
        """Forget an alias. Raises ModelNotFound."""
        with self._writing():
            if not self._db.execute("DELETE FROM alias WHERE alias = ?", (alias,)).rowcount:
                raise ModelNotFound(f"there is no alias {alias!a}", param="alias")

    def scan(self, root: str | Path) -> ScanReport:
        """Register every folder directly below `root` under the folder's name.

        Known folders whose files are untouched cost two file system look-ups. Changed ones
        become a new version. A bad folder is recorded (see `rejected`) and reported, and does
        not disturb the others. Names that came from this root and are gone are reported only.
        """
        root = Path(root).resolve()
        if not root.is_dir():
            raise InvalidConfig(f"no folder at {root}: create it, or name another with --adapters")
        origin = f"scan:{root}"
        report = ScanReport()
        with self._reading() as db:
            known = {
                name: (version, f"{path}|{stamp}", fingerprint)
                for name, version, path, stamp, fingerprint in db.execute(
                    "SELECT v.name, v.version, v.path, v.stamp, v.base FROM adapter a "
                    "JOIN version v ON v.name = a.name AND v.version = a.version WHERE v.origin = ?",
                    (origin,),
                )
            }
        bases = {self.base.fingerprint} if self.base else {fingerprint for *_, fingerprint in known.values()}
        rows: list[tuple[_Row, int]] = []  # with the version that the name has had
        with os.scandir(root) as found:
            folders = sorted(item.name for item in found if item.is_dir() and not item.name.startswith("."))
        for name in folders:
            folder = root / name
            before = known.pop(name, None)
            if before and before[1] == f"{folder}|{peft.stamp(folder)}" and before[2] in bases:
                report.unchanged += 1
                continue
            try:
                self._check_name(name)
                if not folder.resolve().is_relative_to(root):
                    raise InvalidAdapter(f"{folder} is a link out of {root}: add its target by name instead")
                if before is None:
                    self._refuse_taken(name)
                rows.append((self._inspect(folder, name, origin), before[0] if before else 0))
            except (AdapterError, InvalidRequest) as error:
                report.rejected.append(Rejected(name, str(folder), error.code, error.message))
            except OSError as error:
                report.rejected.append(
                    Rejected(name, str(folder), "unreadable", f"cannot read {folder}: {error}")
                )
        with self._writing():
            self._db.execute("DELETE FROM rejected WHERE origin = ?", (origin,))
            for row, version in rows:
                adapter = self._insert(row)
                if version == adapter.version:
                    report.unchanged += 1
                else:
                    (report.replaced if version else report.added).append(adapter.name)
            self._db.executemany(
                "INSERT OR REPLACE INTO rejected VALUES (?, ?, ?, ?, ?)",
                [(bad.name, bad.path, bad.code, bad.message, origin) for bad in report.rejected],
            )
        report.missing = sorted(known)
        return report

    # -- asking --------------------------------------------------------------------------

    def resolve(self, name: str) -> AdapterVersion:
        """What "name", "name@2" or an alias means now.

        Raises ModelNotFound, or the reason why a scan rejected that folder, or AdapterMismatch
        when the adapter was registered for another base. One that was registered without any
        base is checked now, which may raise AdapterError.
        """
        with self._reading() as db:
            entry = _find(db, name)
            if entry is None:
                alias = db.execute("SELECT target FROM alias WHERE alias = ?", (name,)).fetchone()
                entry = _find(db, alias[0]) if alias else None
            if entry is None:
                bad = db.execute("SELECT message FROM rejected WHERE name = ?", (name,)).fetchone()
                if bad:
                    raise InvalidAdapter(
                        f"adapter {name} was found but not accepted: {bad[0]}", param="model"
                    )
                raise self._not_found(name)
        if self.base is not None and not entry.base:
            entry = self._adopt(entry)
        if self.base is not None and entry.base != self.base.fingerprint:
            raise AdapterMismatch(
                f"adapter {name} was registered for {entry.base_name}, the base is {self.base.name}: "
                "serve it on its own base, or add it again",
                param="model",
            )
        return entry.adapter

    def entry(self, name: str) -> Entry:
        """The listing entry of what `name` means now. Raises as `resolve` does."""
        adapter = self.resolve(name)
        with self._reading() as db:
            found = _find(db, str(adapter))
        if found is None:
            raise self._not_found(name)
        return found

    def page(self, limit: int = 100, after: str = "", query: str = "") -> list[Entry]:
        """Up to `limit` adapters by name, those after the name `after`, containing `query`."""
        sql = _ENTRY + "WHERE v.version = a.version AND a.name > ?"
        values: list[object] = [after]
        if query:
            sql += " AND instr(lower(a.name), lower(?))"
            values.append(query)
        if self.base is not None:
            sql += " AND v.base IN (?, '')"
            values.append(self.base.fingerprint)
        with self._reading() as db:
            rows = db.execute(sql + " ORDER BY a.name LIMIT ?", (*values, max(limit, 0))).fetchall()
        return [_entry(row) for row in rows]

    def count(self) -> int:
        """Adapters that `page` would list. Counted anew only after a change: it takes a look at all."""
        with self._reading() as db:
            # the first number moves with changes by other connections, the second with its own
            state = int(db.execute("PRAGMA data_version").fetchone()[0]) + db.total_changes
            known, number = self._counted.get(db, (-1, 0))
            if state != known:
                sql, values = "SELECT count(*) FROM adapter", []
                if self.base is not None:
                    sql += (
                        " a JOIN version v ON v.name = a.name AND v.version = a.version "
                        "WHERE v.base IN (?, '')"
                    )
                    values.append(self.base.fingerprint)
                number = int(db.execute(sql, values).fetchone()[0])
                self._counted[db] = (state, number)
            return number

    def versions(self, name: str) -> list[AdapterVersion]:
        """Every version of a name, oldest first. Raises ModelNotFound."""
        with self._reading() as db:
            rows = db.execute(_ENTRY + "WHERE v.name = ? ORDER BY v.version", (name,)).fetchall()
        if not rows:
            raise self._not_found(name)
        return [_entry(row).adapter for row in rows]

    def knows(self, digest: str) -> bool:
        """Whether any name means this content."""
        with self._reading() as db:
            return bool(db.execute("SELECT 1 FROM version WHERE digest = ?", (digest,)).fetchone())

    def aliases(self, name: str | None = None) -> dict[str, str]:
        """Aliases and what they mean, of one adapter or of all."""
        with self._reading() as db:
            rows = db.execute("SELECT alias, target FROM alias ORDER BY alias").fetchall()
        return {alias: target for alias, target in rows if name is None or target.partition("@")[0] == name}

    def rejected(self) -> list[Rejected]:
        """Folders that scans could not register."""
        with self._reading() as db:
            rows = db.execute("SELECT name, path, code, message FROM rejected ORDER BY name").fetchall()
        return [Rejected(*row) for row in rows]

    # -- inside --------------------------------------------------------------------------

    def _migrate(self) -> None:
        with self._writing():
            done = int(self._db.execute("PRAGMA user_version").fetchone()[0])
            if done > len(_MIGRATIONS):
                raise InvalidConfig(
                    f"the adapter registry was written by a newer chiliad (schema {done}, this one knows "
                    f"{len(_MIGRATIONS)}): upgrade, or set CHILIAD_HOME to another folder"
                )
            for script in _MIGRATIONS[done:]:
                for statement in re.sub(r"--.*", "", script).split(";"):
                    self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {len(_MIGRATIONS)}")

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(
            self._path, check_same_thread=False, isolation_level=None, timeout=_PATIENCE / 1000
        )
        self._open.append(db)
        return db

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """A connection that nobody else uses meanwhile; all share the one to a database in memory."""
        if self._path == ":memory:":
            with self._lock:
                yield self._db
            return
        try:
            db = self._spare.pop()
        except IndexError:
            db = self._connect()
        try:
            yield db
        finally:
            self._spare.append(db)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                raise Unavailable(
                    f"the adapter registry cannot be written ({error}): another process holds it, try again later",
                    retry_after=5.0,
                ) from error
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def _check_name(self, name: str) -> None:
        if not NAME.fullmatch(name):
            raise InvalidRequest(
                f"{name[:140]!a} cannot be an adapter's name: use 1 to 128 letters, digits, '.', '_' or '-', "
                "beginning with a letter or digit",
                param="name",
            )
        if self.base is not None and name in (self.base.name, *self.base.aliases):
            raise AdapterExists(f"{name} is the name of the base model: choose another", param="name")

    def _refuse_taken(self, name: str) -> None:
        with self._lock:
            for table, column in (("adapter", "name"), ("alias", "alias")):
                if self._db.execute(f"SELECT 1 FROM {table} WHERE {column} = ?", (name,)).fetchone():
                    raise AdapterExists(
                        f"the name {name} is taken: remove or replace that {table}, or choose another name",
                        param="name",
                    )

    def _inspect(self, folder: str | Path, name: str, origin: str) -> _Row:
        """Read config and header, and check them against the base."""
        with peft.PeftFolder(folder, self._limits) as files:
            plan = self._recipes.plan(files)
        ranks: tuple[int, ...] = ()
        fingerprint = base_name = ""
        if self.base is not None:
            ranks = tuple(plan.low_rank.get(slot, 0) for slot in range(len(self.base.sites)))
            fingerprint, base_name = self.base.fingerprint, self.base.name
        adapter = AdapterVersion(name, 0, files.digest, str(files.path), files.nbytes, ranks)
        entry = Entry(adapter, plan.method, plan.max_rank, fingerprint, base_name, origin, 0.0, 0.0)
        return _Row(entry, files.stamp)

    def _insert(self, row: _Row) -> AdapterVersion:
        """Make `row` the newest version of its name, unless it already is. Inside a transaction.

        Other content is another version; the same content checked against a base that it was
        not yet checked against is the same version, known better.
        """
        new, adapter, now = row.entry, row.entry.adapter, time.time()
        old = _find(self._db, adapter.name)
        if old is not None and old.adapter.digest == adapter.digest:
            self._update(str(old.adapter), row)
            return old.adapter if not new.base else changed(adapter, version=old.adapter.version)
        last = self._db.execute(
            "SELECT max(version) FROM version WHERE name = ?", (adapter.name,)
        ).fetchone()[0]
        adapter = changed(adapter, version=(last or 0) + 1)
        self._db.execute(
            "INSERT INTO version VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(adapter.name, adapter.version, adapter.digest, adapter.path, adapter.nbytes),
                *(new.method, new.max_rank, _compact(adapter.ranks), new.base, new.base_name),
                *(new.origin, row.stamp, now),
            ),
        )
        self._db.execute(
            "INSERT INTO adapter VALUES (?, ?, ?) "
            "ON CONFLICT (name) DO UPDATE SET version = excluded.version",
            (adapter.name, adapter.version, now),
        )
        self._db.execute("DELETE FROM rejected WHERE name = ?", (adapter.name,))
        return adapter

    def _update(self, version: str, row: _Row) -> None:
        """Note what a new look at unchanged content has shown. Inside a transaction."""
        new, key = row.entry, version.rsplit("@", 1)
        self._db.execute("UPDATE version SET stamp = ? WHERE name = ? AND version = ?", (row.stamp, *key))
        if new.base:
            self._db.execute(
                "UPDATE version SET method = ?, max_rank = ?, ranks = ?, base = ?, base_name = ? "
                "WHERE name = ? AND version = ?",
                (new.method, new.max_rank, _compact(new.adapter.ranks), new.base, new.base_name, *key),
            )

    def _adopt(self, entry: Entry) -> Entry:
        """Check an adapter that was registered while the base was not known. Raises AdapterError."""
        old = entry.adapter
        row = self._inspect(old.path, old.name, entry.origin)
        if row.entry.adapter.digest != old.digest:
            raise peft.changed(old.path)
        self._note(str(old), row)
        return changed(row.entry, adapter=changed(old, ranks=row.entry.adapter.ranks))

    def _note(self, version: str, row: _Row) -> None:
        """`_update`, unless somebody writes just now: then whoever asks next will do it."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            self._db.execute("PRAGMA busy_timeout = 0")
            with suppress(Unavailable), self._writing():
                self._update(version, row)
        finally:
            self._db.execute(f"PRAGMA busy_timeout = {_PATIENCE}")
            self._lock.release()

    def _not_found(self, name: str) -> ModelNotFound:
        where = "GET /v1/models lists what is served" if self.base else "`chiliad adapters ls` lists them"
        return ModelNotFound(f"there is no model or adapter {name[:140]!a}: {where}", param="model")


def _close(connections: list[sqlite3.Connection]) -> None:
    for connection in connections:
        connection.close()


def _find(db: sqlite3.Connection, name: str) -> Entry | None:
    """The entry of "name" or "name@2", without aliases."""
    plain, at, version = name.partition("@")
    if at and not (version.isascii() and version.isdigit() and len(version) < 10):
        return None
    which = "v.version = ?" if at else "v.version = a.version"
    row = db.execute(
        _ENTRY + f"WHERE a.name = ? AND {which}", (plain, int(version)) if at else (plain,)
    ).fetchone()
    return None if row is None else _entry(row)


def _compact(ranks: tuple[int, ...]) -> str:
    return json.dumps(ranks, separators=(",", ":"))


def _entry(row: tuple[Any, ...]) -> Entry:
    """A row of _ENTRY."""
    name, version, digest, path, nbytes, ranks, *rest = row
    adapter = AdapterVersion(name, version, digest, path, nbytes, tuple(json.loads(ranks)))
    return Entry(adapter, *rest)
