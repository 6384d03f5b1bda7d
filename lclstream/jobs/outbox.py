"""Callbacks: written down first, sent in order for each job, repeated until they arrive.

The event loop owns the outbox. One task for each job with something to tell sends its callbacks one after the other;
a slow or dead receiver delays nobody but itself. Delivery is *at least once*: after a crash between sending and
noting it, a callback comes twice, with the same content.

The database knows what is to be told, and up to which line of a job's history that was noted; the secret stays in the
job's own ``spec.json``.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from lclstream.jobs.config import Callbacks
from lclstream.jobs.models import Callback, JobSpec, Transition
from lclstream.jobs.signatures import sign
from lclstream.security.credentials import Credentials
from lclstream.security.errors import AuthenticationError, CredentialsError, PeerError, ServiceError
from lclstream.security.http import async_client, explained

log = logging.getLogger(__name__)

#: Callbacks under way to one receiver at the same time.
_AT_ONCE = 8
_SCHEMA = """
CREATE TABLE IF NOT EXISTS noted (stamp TEXT PRIMARY KEY, line INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS pending (
  stamp TEXT NOT NULL, line INTEGER NOT NULL, body BLOB NOT NULL, since REAL NOT NULL, attempts INTEGER NOT NULL,
  PRIMARY KEY (stamp, line)
) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class _Letter:
    stamp: str
    line: int
    body: bytes
    since: float
    attempts: int


class Outbox:
    """See the module's text.

    Args:
        path: the SQLite database; made when missing.
        settings: receivers and times.
        credentials: the service's certificate folder, shown to receivers.
        spec_of: gives a job's specification by its id; raises `ValueError` when it is gone.
    """

    def __init__(
        self, path: Path, settings: Callbacks, credentials: Credentials, spec_of: Callable[[str], JobSpec]
    ) -> None:
        self._settings = settings
        self._credentials = credentials
        self._spec_of = spec_of
        self._database = sqlite3.connect(path, isolation_level=None)
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=NORMAL")
        self._database.executescript(_SCHEMA)
        self._senders: dict[str, asyncio.Task[None]] = {}
        self._clients: dict[str, httpx.AsyncClient] = {}
        self._turns: dict[str, asyncio.Semaphore] = {}

    def resume(self) -> None:
        """Go on with what an earlier run of the service did not deliver."""
        for (stamp,) in self._database.execute("SELECT DISTINCT stamp FROM pending").fetchall():
            self._send_for(stamp)

    def note(self, stamp: str, history: Sequence[Transition]) -> None:
        """Note what is new in a job's history since the last call. `new` is told to nobody: its maker knows.

        Args:
            stamp: the job.
            history: all its lines.
        """
        row = self._database.execute("SELECT line FROM noted WHERE stamp = ?", (stamp,)).fetchone()
        done = row[0] if row else 0
        letters = [
            (stamp, number, _body(stamp, line), line.time)
            for number, line in enumerate(history)
            if number > done and number > 0
        ]
        if not letters:
            return
        with self._database:
            self._database.execute("BEGIN")
            self._database.executemany("INSERT OR IGNORE INTO pending VALUES (?, ?, ?, ?, 0)", letters)
            self._database.execute("INSERT OR REPLACE INTO noted VALUES (?, ?)", (stamp, len(history) - 1))
        self._send_for(stamp)

    def has_to_tell(self, stamp: str) -> bool:
        """Whether a callback about the job is not delivered yet."""
        return self._first(stamp) is not None

    def forget(self, stamp: str) -> None:
        """Forget a job whose folder was removed."""
        self._database.execute("DELETE FROM noted WHERE stamp = ?", (stamp,))

    @property
    def waiting(self) -> int:
        """Number of callbacks not delivered yet."""
        count: int = self._database.execute("SELECT COUNT(*) FROM pending").fetchone()[0]
        return count

    def _send_for(self, stamp: str) -> None:
        if stamp not in self._senders:
            self._senders[stamp] = asyncio.create_task(self._send_all(stamp), name=f"callbacks of {stamp}")

    async def _send_all(self, stamp: str) -> None:
        try:
            while (letter := self._first(stamp)) is not None:
                await self._deliver(letter)
        except Exception:
            log.exception("job %s: its callbacks stop until the service starts again", stamp)
        finally:
            del self._senders[stamp]

    def _first(self, stamp: str) -> _Letter | None:
        row = self._database.execute("SELECT * FROM pending WHERE stamp = ? ORDER BY line LIMIT 1", (stamp,)).fetchone()
        return None if row is None else _Letter(*row)

    async def _deliver(self, letter: _Letter) -> None:
        """Send one callback until it has arrived, or there is no hope left."""
        refused = 0
        attempts = letter.attempts
        while True:
            why = await self._try(letter)
            if why is None:
                break
            attempts += 1
            refused += isinstance(why, ServiceError) and not why.retry
            hopeless = refused >= self._settings.refused_most or isinstance(why, ValueError)
            if hopeless or time.time() - letter.since > 3600 * self._settings.give_up_after_h:
                log.error("job %s: callback %s is given up: %s", letter.stamp, letter.body.decode(), why)
                break
            delay = min(self._settings.retry_most_s, self._settings.retry_first_s * 2 ** min(attempts - 1, 30))
            log.warning("job %s: callback not delivered, again in %g s: %s", letter.stamp, delay, why)
            self._database.execute(
                "UPDATE pending SET attempts = ? WHERE stamp = ? AND line = ?", (attempts, letter.stamp, letter.line)
            )
            await asyncio.sleep(delay)
        self._database.execute("DELETE FROM pending WHERE stamp = ? AND line = ?", (letter.stamp, letter.line))

    async def _try(self, letter: _Letter) -> Exception | None:
        """Send once; returns None when it has arrived."""
        try:
            spec = self._spec_of(letter.stamp)
        except ValueError as error:
            return error
        url = spec.callback
        if url is None or not self._settings.permit(url):
            return ValueError("the configuration does not allow its URL (`callbacks.allow`)")
        headers = {**spec.cb_headers, "content-type": "application/json"}
        if spec.cb_secret is not None:
            headers["x-hub-signature-256"] = sign(letter.body, spec.cb_secret.get_secret_value())
        parts = urlsplit(url)
        origin = f"{parts.scheme}://{parts.netloc}"
        async with self._turns.setdefault(origin, asyncio.Semaphore(_AT_ONCE)):
            try:
                with explained(origin):
                    answer = await self._client(origin).post(url, content=letter.body, headers=headers)
                    answer.raise_for_status()
            except (PeerError, CredentialsError) as error:
                if isinstance(error, (AuthenticationError, CredentialsError)):
                    # The next try reads the certificates again: somebody may have put them right.
                    await self._drop_client(origin)
                    return ConnectionError(str(error))
                return error
        return None

    def _client(self, origin: str) -> httpx.AsyncClient:
        if origin not in self._clients:
            self._clients[origin] = async_client(origin, self._credentials, timeout=self._settings.timeout_s)
        return self._clients[origin]

    async def _drop_client(self, origin: str) -> None:
        client = self._clients.pop(origin, None)
        if client is not None:
            await client.aclose()

    async def flush(self, within_s: float) -> None:
        """Wait until everything is delivered, or the time is over."""
        if self._senders:
            await asyncio.wait(list(self._senders.values()), timeout=within_s)

    async def close(self) -> None:
        """Stop sending; what was not delivered is sent by the next run."""
        senders = list(self._senders.values())
        for sender in senders:
            sender.cancel()
        await asyncio.gather(*senders, return_exceptions=True)
        for origin in list(self._clients):
            await self._drop_client(origin)
        self._database.close()


def _body(stamp: str, line: Transition) -> bytes:
    return Callback(jobid=stamp, jobndx=line.jobndx, state=line.state, info=line.info).model_dump_json().encode()
