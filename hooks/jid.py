"""The job interface of LCLS' Automated Run Processor as an Airflow hook."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from airflow.sdk import BaseHook
from airflow.sdk.exceptions import AirflowNotFoundException
from airflow.sdk.log import mask_secret

from lclstream.jobs.interface import LIVE, SLAC_PREFIX, SLAC_URL, JobInterfaceClient
from lclstream.security.errors import CredentialsError
from lclstream_airflow.hooks.blocking import in_own_loop
from lclstream_airflow.hooks.service import ConnectionDefinitionError, UndefinedConnectionError

if TYPE_CHECKING:
    from airflow.sdk import Connection

__all__ = ["LIVE", "JobInterfaceClient", "JobInterfaceHook"]

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class _Place:
    url: str
    token_file: Path | None


class JobInterfaceHook(BaseHook):
    """Gives clients of the job interface that a connection of type `jid` names.

    :param jid_conn_id: id of the connection: host (empty: LCLS' own), extra ``{"prefix"?, "token_file"?}``. The file
        on the workers and triggerers, mode 0600, holds the bearer token; it is read at every use, so it may be renewed
    :param authorization: a token from elsewhere (the DAG run's conf), used where the connection names no file. It is
        masked in all logs
    """

    conn_name_attr = "jid_conn_id"
    default_conn_name = "jid_default"
    conn_type = "jid"
    hook_name = "Job interface (ARP)"

    def __init__(self, jid_conn_id: str = default_conn_name, authorization: str | None = None) -> None:
        super().__init__()
        self.conn_id = jid_conn_id
        self._authorization = authorization
        if authorization:
            _mask(authorization)
        self._place: _Place | None = None

    def place(self) -> _Place:
        """What the connection says.

        Raises:
            ConnectionDefinitionError: it lacks something.
        """
        if self._place is None:
            try:
                self._place = self._read(self.get_connection(self.conn_id))
            except AirflowNotFoundException as error:
                raise self._undefined() from error
        return self._place

    @property
    def has_token(self) -> bool:
        """Whether the connection itself names a token: the triggerer can wait without the DAG run's."""
        return self.place().token_file is not None

    async def get_async_conn(self) -> JobInterfaceClient:
        """A client for an event loop; use it in an ``async with``.

        Raises:
            ConnectionDefinitionError: the connection lacks something.
            CredentialsError: the token file cannot be used.
        """
        if self._place is None:
            try:
                self._place = self._read(await self.aget_connection(self.conn_id))
            except AirflowNotFoundException as error:
                raise self._undefined() from error
        return await asyncio.to_thread(self._client)

    def call(self, work: Callable[[JobInterfaceClient], Awaitable[Answer]]) -> Answer:
        """Do something with a client, and wait for it."""
        self.place()

        async def run() -> Answer:
            async with self._client() as client:
                return await work(client)

        return in_own_loop(run, f"job interface {self.conn_id}")

    def test_connection(self) -> tuple[bool, str]:
        """What the button "Test" of the connection form shows."""
        try:
            # The only call that needs no experiment and changes nothing.
            self.call(lambda client: client.statuses([]))
        except (ValueError, OSError) as error:
            return False, str(error)
        return True, f"The job interface at {self.place().url} answers."

    def _client(self) -> JobInterfaceClient:
        place = self.place()
        return JobInterfaceClient(place.url, self._token(place.token_file))

    def _token(self, file: Path | None) -> str | None:
        if file is None:
            return self._authorization
        try:
            if stat.S_IMODE(file.stat().st_mode) & 0o077:
                raise CredentialsError(f"token file {file} can be read by others: chmod 600 {file}")
            token = file.read_text().strip()
        except OSError as error:
            raise CredentialsError(f"token file {file}: {error.strerror}") from error
        if not token or not token.isprintable() or not token.isascii():
            raise CredentialsError(f"token file {file} does not hold one line with a token")
        _mask(token)
        return token if " " in token else f"Bearer {token}"

    def _read(self, connection: Connection) -> _Place:
        extra = connection.extra_dejson
        host = (connection.host or "").strip().rstrip("/") or SLAC_URL
        url = host if "://" in host else f"https://{host}"
        parts = urlsplit(url)
        if parts.path or not parts.hostname:
            raise self._wrong("host", host, "a host name, or https://host[:port] without a path (extra `prefix`)")
        if parts.scheme != "https" and parts.hostname not in ("127.0.0.1", "::1", "localhost"):
            raise self._wrong("host", host, "an https address: tokens must not travel in plain text")
        if parts.port is None and connection.port:
            url = f"{url}:{connection.port}"
        prefix = extra.get("prefix") or SLAC_PREFIX
        if not isinstance(prefix, str) or not prefix.startswith("/"):
            raise self._wrong("prefix (extra)", prefix, f"a path such as {SLAC_PREFIX}")
        file = extra.get("token_file") or None
        if file is not None and not (isinstance(file, str) and Path(file).expanduser().is_absolute()):
            raise self._wrong("token_file (extra)", file, "the absolute path of a file with the token")
        return _Place(url + prefix.rstrip("/"), Path(file).expanduser() if file else None)

    def _undefined(self) -> UndefinedConnectionError:
        return UndefinedConnectionError(
            f"connection {self.conn_id!r} is not defined: add one of type {self.conn_type!r} (Admin, Connections)"
        )

    def _wrong(self, field: str, value: object, valid: str) -> ConnectionDefinitionError:
        return ConnectionDefinitionError(f"connection {self.conn_id!r}: {field} is {value!r}: set it to {valid}")


def _mask(token: Any) -> None:
    """Keep a token out of all logs, with and without its scheme."""
    mask_secret(token)
    mask_secret(str(token).rpartition(" ")[2])
