"""NERSC's Superfacility API, through its published client, as an Airflow hook."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from airflow.sdk import BaseHook
from airflow.sdk.exceptions import AirflowNotFoundException, AirflowOptionalProviderFeatureException

from lclstream.jobs.sbatch import SbatchOptionError, directives
from lclstream_airflow.hooks.blocking import in_own_loop
from lclstream_airflow.hooks.service import ConnectionDefinitionError, UndefinedConnectionError

try:
    from lclstream.superfacility.client import (
        NERSC_PREFIX,
        NERSC_TOKEN_URL,
        NERSC_URL,
        FacilityJob,
        MachineStanding,
        SuperfacilityClient,
    )
except ModuleNotFoundError as error:
    if error.name is None or error.name.startswith("lclstream"):
        raise
    raise AirflowOptionalProviderFeatureException(
        f"the Superfacility API needs the Python package {error.name!r}: pip install 'lclstream[superfacility]'"
    ) from error

if TYPE_CHECKING:
    from airflow.sdk import Connection

__all__ = [
    "FacilityJob",
    "MachineStanding",
    "SbatchOptionError",
    "SuperfacilityClient",
    "SuperfacilityHook",
    "directives",
]

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class _Place:
    """What a connection says."""

    api_url: str
    token_url: str
    key: Path
    machine: str
    job_page: str


class SuperfacilityHook(BaseHook):
    """Gives clients of the Superfacility API that a connection of type `superfacility` names.

    :param superfacility_conn_id: id of the connection: host (empty: NERSC's), extra ``{"key_file": PATH, "token_url"?,
        "prefix"?, "machine"?, "job_page"?}``. The key file lies on the workers and triggerers, with mode 0600; keys
        and tokens never pass through Airflow
    """

    conn_name_attr = "superfacility_conn_id"
    default_conn_name = "superfacility_default"
    conn_type = "superfacility"
    hook_name = "Superfacility API (NERSC)"
    default_machine = "perlmutter"

    def __init__(self, superfacility_conn_id: str = default_conn_name) -> None:
        super().__init__()
        self.conn_id = superfacility_conn_id
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

    async def get_async_conn(self) -> SuperfacilityClient:
        """A client for an event loop; use it in an ``async with``.

        Raises:
            ConnectionDefinitionError: the connection lacks something.
            CredentialsError: the key file cannot be used.
        """
        if self._place is None:
            try:
                self._place = self._read(await self.aget_connection(self.conn_id))
            except AirflowNotFoundException as error:
                raise self._undefined() from error
        # The key is read from disk, which may be a slow network file system.
        return await asyncio.to_thread(self._client)

    def call(self, work: Callable[[SuperfacilityClient], Awaitable[Answer]]) -> Answer:
        """Do something with a client, and wait for it.

        :param work: takes a client; every call of it is bounded
        """
        self.place()

        async def run() -> Answer:
            async with self._client() as client:
                return await work(client)

        return in_own_loop(run, f"superfacility {self.conn_id}")

    def job_url(self, machine: str, job_id: str) -> str:
        """A page about a job: the connection's `job_page`, or the API's own document."""
        place = self.place()
        page = place.job_page or f"{place.api_url}/compute/jobs/{{machine}}/{{job_id}}"
        return page.replace("{machine}", machine).replace("{job_id}", job_id)

    def test_connection(self) -> tuple[bool, str]:
        """What the button "Test" of the connection form shows."""
        try:
            place = self.place()
            user = self.call(lambda client: client.user())
            standing = self.call(lambda client: client.standing(place.machine))
        except (ValueError, OSError) as error:
            return False, str(error)
        return True, f"{place.api_url} answers to {user}; {place.machine} is {standing.status}."

    def _client(self) -> SuperfacilityClient:
        place = self.place()
        return SuperfacilityClient(place.api_url, place.token_url, place.key)

    def _read(self, connection: Connection) -> _Place:
        extra = connection.extra_dejson
        base = self._base_url(connection)
        prefix = self._text(extra, "prefix") or NERSC_PREFIX
        if not prefix.startswith("/"):
            raise self._wrong("prefix (extra)", prefix, f"a path such as {NERSC_PREFIX}")
        token_url = self._text(extra, "token_url") or (
            NERSC_TOKEN_URL if base == NERSC_URL else f"{base}{urlsplit(NERSC_TOKEN_URL).path}"
        )
        self._check_scheme("token_url (extra)", token_url)
        key = self._text(extra, "key_file")
        if not key:
            raise self._wrong("key_file (extra)", key or None, "the path of the key file made in NERSC's Iris")
        return _Place(
            api_url=base + prefix.rstrip("/"),
            token_url=token_url,
            key=Path(key).expanduser(),
            machine=self._text(extra, "machine") or self.default_machine,
            job_page=self._text(extra, "job_page"),
        )

    def _base_url(self, connection: Connection) -> str:
        host = (connection.host or "").strip().rstrip("/")
        if not host:
            return NERSC_URL
        url = host if "://" in host else f"https://{host}"
        parts = urlsplit(url)
        if parts.path or not parts.hostname:
            raise self._wrong("host", host, "a host name, or https://host[:port] without a path (extra `prefix`)")
        if parts.port is None and connection.port:
            url = f"{url}:{connection.port}"
        self._check_scheme("host", url)
        return url

    def _check_scheme(self, field: str, url: str) -> None:
        parts = urlsplit(url)
        loopback = parts.hostname in ("127.0.0.1", "::1", "localhost")
        if parts.scheme != "https" and not (parts.scheme == "http" and loopback):
            raise self._wrong(field, url, "an https address: tokens must not travel in plain text")

    def _text(self, extra: dict[str, Any], name: str) -> str:
        value = extra.get(name)
        if value is not None and not isinstance(value, str):
            raise self._wrong(f"{name} (extra)", value, "a text")
        return value or ""

    def _undefined(self) -> UndefinedConnectionError:
        return UndefinedConnectionError(
            f"connection {self.conn_id!r} is not defined: add one of type {self.conn_type!r} (Admin, Connections)"
        )

    def _wrong(self, field: str, value: object, valid: str) -> ConnectionDefinitionError:
        return ConnectionDefinitionError(f"connection {self.conn_id!r}: {field} is {value!r}: set it to {valid}")
