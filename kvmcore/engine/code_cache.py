"""The disk cache of translated regions: one SQLite file per engine version and host CPU, shared by all daemons.

Keyed by the identity of the head's page and the head's offset in it. An entry is run only if its keyed digest fits, so
a truncated or altered one is translated again. Bounded: the least recently used go. The host's secret lies beside it
(mode 0600). Called by the translator only. Failures of the disk never stop it: then there is no cache.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import sqlite3
import tempfile
from pathlib import Path

from kvmcore.engine import image

log = logging.getLogger("kvmcore.translator")

MAX_BYTES = 256 << 20
_SCHEMA = """
CREATE TABLE IF NOT EXISTS regions (
  identity BLOB NOT NULL, offset INTEGER NOT NULL, code BLOB NOT NULL, digest BLOB NOT NULL, used INTEGER NOT NULL,
  PRIMARY KEY (identity, offset)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_use ON regions (used);
"""


def secret(directory: Path | None = None) -> bytes:
    """The host's secret, 32 bytes, made on first use. Without a place to keep it: one for this process."""
    path = (directory or image.cache_directory()) / "secret"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not path.exists():
            fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=".secret-")
            with os.fdopen(fd, "wb") as file:
                file.write(secrets.token_bytes(32))
            try:
                os.link(temporary, path)  # the first of several writers wins
            except FileExistsError:
                pass
            finally:
                os.unlink(temporary)
        content = path.read_bytes()
    except OSError as error:
        log.warning("translations are not kept: %s", error)
        return secrets.token_bytes(32)
    if len(content) != 32:
        path.unlink(missing_ok=True)
        return secret(directory)
    return content


class CodeCache:
    """Open it, `find` what is there for a page, `store` what is new. Not thread-safe."""

    def __init__(self, key: bytes, directory: Path | None = None, limit: int = MAX_BYTES) -> None:
        self._key, self._limit = key, limit
        self._path = (directory or image.cache_directory()) / f"{image.key()}.regions"
        self._database: sqlite3.Connection | None = None
        self._clock = 0
        self._open()

    def _open(self) -> None:
        for attempt in range(2):
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                database = sqlite3.connect(self._path, timeout=2.0, isolation_level=None)
                database.execute("PRAGMA journal_mode=WAL")
                database.execute("PRAGMA synchronous=OFF")  # entries prove themselves; a lost one costs nothing
                database.executescript(_SCHEMA)
                row = database.execute("SELECT coalesce(max(used), 0) FROM regions").fetchone()
                self._clock = int(row[0]) + 1
                self._database = database
                return
            except (OSError, sqlite3.Error) as error:
                log.warning("the cache %s cannot be used: %s", self._path, error)
                if attempt == 0 and isinstance(error, sqlite3.DatabaseError) and "locked" not in str(error):
                    self._remove()

    def _remove(self) -> None:
        """A damaged file: begin a new one."""
        for suffix in ("", "-wal", "-shm"):
            Path(str(self._path) + suffix).unlink(missing_ok=True)

    def _digest(self, identity: bytes, offset: int, code: bytes) -> bytes:
        return hashlib.blake2b(
            identity + offset.to_bytes(2, "little") + code, digest_size=16, key=self._key, person=b"softkvm region"
        ).digest()

    def find(self, identity: bytes) -> dict[int, bytes]:
        """Offset of the head -> code, of all regions of a page."""
        if self._database is None:
            return {}
        try:
            rows = self._database.execute(
                "SELECT offset, code, digest FROM regions WHERE identity = ?", (identity,)
            ).fetchall()
            found = {
                offset: code
                for offset, code, digest in rows
                if isinstance(code, bytes) and self._digest(identity, offset, code) == digest
            }
            if rows:
                self._database.execute("UPDATE regions SET used = ? WHERE identity = ?", (self._clock, identity))
            return found
        except (sqlite3.Error, ValueError, TypeError, OverflowError) as error:
            self._failed(error)
            return {}

    def recent(self, limit: int) -> list[tuple[bytes, int, bytes]]:
        """(identity, offset of the head, code) of what was used last, `limit` bytes of code at most; empty ones left out."""
        if self._database is None:
            return []
        found: list[tuple[bytes, int, bytes]] = []
        left = limit
        try:
            rows = self._database.execute(
                "SELECT identity, offset, code, digest FROM regions WHERE code != x'' ORDER BY used DESC"
            )
            for identity, offset, code, digest in rows:
                if isinstance(code, bytes) and self._digest(identity, offset, code) == digest:
                    left -= len(code)
                    if left < 0:
                        break
                    found.append((identity, offset, code))
        except (sqlite3.Error, ValueError, TypeError, OverflowError) as error:
            self._failed(error)
        return found

    def used(self, identities: list[bytes]) -> None:
        """What these pages have is in use."""
        if self._database is None:
            return
        try:
            self._database.execute("BEGIN")
            for identity in identities:
                self._database.execute(
                    "UPDATE regions SET used = ? WHERE identity = ? AND used != ?", (self._clock, identity, self._clock)
                )
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            self._failed(error)

    def store(self, identity: bytes, offset: int, code: bytes) -> None:
        """Keep a region, an empty one included: that there is nothing to translate."""
        if self._database is None:
            return
        try:
            row = (identity, offset, code, self._digest(identity, offset, code), self._clock)
            self._database.execute("INSERT OR REPLACE INTO regions VALUES (?, ?, ?, ?, ?)", row)
            self._bound()
        except sqlite3.Error as error:
            self._failed(error)

    def _bound(self) -> None:
        """Throw the least recently used quarter away when the file has grown over the limit."""
        assert self._database is not None
        if self._path.stat().st_size <= self._limit:
            return
        (count,) = self._database.execute("SELECT count(*) FROM regions").fetchone()
        self._database.execute(
            "DELETE FROM regions WHERE (identity, offset) IN"
            " (SELECT identity, offset FROM regions ORDER BY used LIMIT ?)",
            (max(1, count // 4),),
        )
        self._database.execute("VACUUM")

    def _failed(self, error: Exception) -> None:
        """A full disk, a damaged file: go on without, a damaged file anew."""
        log.warning("the cache %s: %s", self._path, error)
        if self._database is not None:
            self._database.close()
            self._database = None
        if "malformed" in str(error) or "not a database" in str(error):
            self._remove()
            self._open()

    def close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None
