"""The transfer service (LCLStream-API) as an Airflow hook."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from lclstream.api.client import AsyncTransferClient, TransferClient
from lclstream.api.models import JobState, TransferInfo, TransferPhase, TransferStatus
from lclstream_airflow.hooks.service import ServiceHook

__all__ = [
    "AsyncTransferClient",
    "LCLStreamHook",
    "TransferClient",
    "TransferInfo",
    "TransferPhase",
    "TransferStatus",
    "transfer_facts",
]


class LCLStreamHook(ServiceHook):
    """Gives clients of the transfer service that a connection of type `lclstream` names.

    :param lclstream_conn_id: id of the connection: host, port (8446), extra ``{"credentials": FOLDER, "prefix"?}``
    """

    conn_name_attr = "lclstream_conn_id"
    default_conn_name = "lclstream_default"
    conn_type = "lclstream"
    hook_name = "LCLStream transfers"
    default_port = 8446
    default_prefix = "/v1"

    def __init__(self, lclstream_conn_id: str = default_conn_name) -> None:
        super().__init__(lclstream_conn_id)

    def get_conn(self) -> TransferClient:
        """A blocking client; use it in a ``with``."""
        endpoint = self.endpoint()
        return TransferClient(endpoint.base_url, endpoint.credentials, prefix=endpoint.prefix)

    async def get_async_conn(self) -> AsyncTransferClient:
        """A client for an event loop; use it in an ``async with``."""
        endpoint = await self.aendpoint()
        # Certificates are read from disk, which may be a slow network file system.
        return await asyncio.to_thread(
            AsyncTransferClient, endpoint.base_url, endpoint.credentials, prefix=endpoint.prefix
        )

    def under_way(self, tags: Mapping[str, str]) -> list[TransferStatus]:
        """Our transfers that have all of these tags and have not ended.

        Raises:
            PeerError: the service cannot be asked.
        """
        with self.get_conn() as client:
            return [
                one
                for state in (JobState.new, JobState.queued, JobState.active)
                for one in client.list(state=state, tags=tags)
            ]

    def transfers_url(self) -> str:
        """The address of the list of our transfers."""
        endpoint = self.endpoint()
        return f"{endpoint.base_url}{endpoint.prefix}/transfers"

    def transfer_url(self, transfer_id: int) -> str:
        """The address of a transfer's document."""
        return f"{self.transfers_url()}/{transfer_id}"

    def _greet(self) -> str:
        with self.get_conn() as client:
            latest = client.list(limit=1)
        last = f"; the latest transfer is {latest[0].id} ({latest[0].phase.value})" if latest else ""
        return f"The transfer service at {self.endpoint().base_url} answers{last}."


def transfer_facts(info: TransferInfo) -> dict[str, Any]:
    """What a DAG may know about a transfer: ids, address and counts; JSON values only.

    Keys: ``transfer_id url phase info received_messages sent_messages held_messages lost_messages received_bytes
    sent_bytes producers consumers rate_in_bytes_s rate_out_bytes_s lease_expires``; counts are None until the buffer
    has answered once.
    """
    buffer = info.buffer or {}

    def count(group: str, unit: str) -> int | None:
        value = buffer.get(group)
        return value.get(unit) if isinstance(value, dict) else None

    received, sent, held = count("received", "messages"), count("sent", "messages"), count("held", "messages")
    return {
        "transfer_id": info.id,
        "url": info.url,
        "name": info.name,
        "phase": info.phase.value,
        "info": info.info,
        "received_messages": info.metrics.recvd if received is None else received,
        "sent_messages": info.metrics.sent if sent is None else sent,
        "held_messages": info.metrics.buffered if held is None else held,
        "lost_messages": count("lost", "messages"),
        "received_bytes": count("received", "bytes"),
        "sent_bytes": count("sent", "bytes"),
        "producers": buffer.get("producers", info.metrics.producers),
        "consumers": buffer.get("consumers"),
        "rate_in_bytes_s": buffer.get("rate_in_bytes_s"),
        "rate_out_bytes_s": buffer.get("rate_out_bytes_s"),
        "lease_expires": info.lease_expires,
    }
