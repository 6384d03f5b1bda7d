"""What the hooks of all our services share: a connection read and checked, and mutual TLS made from it.

A connection holds an address and the *path* of a certificate folder on the workers and triggerers. Keys and tokens
never pass through Airflow.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

from airflow.sdk import BaseHook
from airflow.sdk.exceptions import AirflowNotFoundException

from lclstream.security.credentials import Credentials

if TYPE_CHECKING:
    from airflow.sdk import Connection


class ConnectionDefinitionError(ValueError):
    """An Airflow connection is not there, or lacks a field; the message names both and the remedy."""


class UndefinedConnectionError(ConnectionDefinitionError):
    """Airflow knows no such connection, or cannot be asked for it: it makes no difference between the two."""


@dataclass(frozen=True)
class Endpoint:
    """Where a service is, and who we are there.

    :param base_url: such as ``https://dtn.example.org:8446``, without a path
    :param prefix: path before the routes, such as ``/v1``
    :param credentials: our certificate folder
    """

    base_url: str
    prefix: str
    credentials: Credentials


class ServiceHook(BaseHook):
    """Reads a connection once and keeps what it says.

    Keeping it matters: `on_kill` runs in a signal handler, where a question to Airflow's supervisor could wait for the
    very code it interrupted.

    :param conn_id: id of the Airflow connection
    """

    conn_name_attr: ClassVar[str]
    default_conn_name: ClassVar[str]
    conn_type: ClassVar[str]
    hook_name: ClassVar[str]
    default_port: ClassVar[int]
    default_prefix: ClassVar[str]

    def __init__(self, conn_id: str) -> None:
        super().__init__()
        self.conn_id = conn_id
        self._endpoint: Endpoint | None = None

    def endpoint(self) -> Endpoint:
        """What the connection says.

        Raises:
            ConnectionDefinitionError: it lacks something, or is not there.
            CredentialsError: the certificate folder cannot be used.
        """
        if self._endpoint is None:
            try:
                connection = self.get_connection(self.conn_id)
            except AirflowNotFoundException as error:
                raise self._undefined() from error
            base_url, prefix, folder = self._read(connection)
            self._endpoint = Endpoint(base_url, prefix, Credentials(folder))
        return self._endpoint

    async def aendpoint(self) -> Endpoint:
        """The same without blocking the event loop."""
        if self._endpoint is None:
            try:
                connection = await self.aget_connection(self.conn_id)
            except AirflowNotFoundException as error:
                raise self._undefined() from error
            base_url, prefix, folder = self._read(connection)
            # The folder is looked at, and may be on a slow network file system.
            self._endpoint = Endpoint(base_url, prefix, await asyncio.to_thread(Credentials, folder))
        return self._endpoint

    def _read(self, connection: Connection) -> tuple[str, str, str]:
        """Address, prefix and certificate folder, as the connection has them."""
        extra = connection.extra_dejson
        return self._base_url(connection), self._prefix(extra), self._folder(extra)

    def _base_url(self, connection: Connection) -> str:
        host = (connection.host or "").strip()
        if not host:
            raise self._wrong("host", host, f"the {self.hook_name}'s host name, such as dtn.example.org")
        if "://" in host:
            parts = urlsplit(host)
            if parts.scheme != "https" or parts.path.strip("/"):
                raise self._wrong("host", host, "a host name, or https://host[:port] without a path (extra `prefix`)")
            port = parts.port or connection.port or self.default_port
            host = parts.hostname or ""
        else:
            port = connection.port or self.default_port
        return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"

    def _prefix(self, extra: dict[str, Any]) -> str:
        prefix = extra.get("prefix")
        if prefix is None or prefix == "":
            return self.default_prefix
        if not isinstance(prefix, str) or not prefix.startswith("/"):
            raise self._wrong("prefix (extra)", prefix, f"a path such as {self.default_prefix or '/ws-cert/lgbk'}")
        return prefix.rstrip("/")

    def _folder(self, extra: dict[str, Any]) -> str:
        folder = extra.get("credentials")
        if not isinstance(folder, str) or not folder:
            raise self._wrong(
                "credentials (extra)", folder, "the path of a certificate folder made by `certified init`"
            )
        return folder

    def _undefined(self) -> UndefinedConnectionError:
        return UndefinedConnectionError(
            f"connection {self.conn_id!r} is not defined: add one of type {self.conn_type!r} (Admin, Connections)"
        )

    def _wrong(self, field: str, value: object, valid: str) -> ConnectionDefinitionError:
        return ConnectionDefinitionError(f"connection {self.conn_id!r}: {field} is {value!r}: set it to {valid}")

    def test_connection(self) -> tuple[bool, str]:
        """What the button "Test" of the connection form shows."""
        try:
            return True, self._greet()
        except (ValueError, OSError) as error:
            return False, str(error)

    def _greet(self) -> str:
        """Ask the service something harmless, and say what it answered."""
        raise NotImplementedError
