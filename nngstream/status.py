"""What a buffer tells about itself: a JSON document, and the same for Prometheus."""

from __future__ import annotations

import json
import time
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nngstream.buffer import Buffer
    from nngstream.fifo import Amount

#: Metrics: name, Prometheus type, help, and where the value lies in the document.
_METRICS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("received_messages_total", "counter", "Messages taken from producers.", ("received", "messages")),
    ("received_bytes_total", "counter", "Payload bytes taken from producers.", ("received", "bytes")),
    ("sent_messages", "gauge", "Messages given to consumers and not known to be lost.", ("sent", "messages")),
    ("sent_bytes", "gauge", "Payload bytes given to consumers and not known to be lost.", ("sent", "bytes")),
    ("held_messages", "gauge", "Messages in the buffer.", ("held", "messages")),
    ("held_bytes", "gauge", "Payload bytes in the buffer.", ("held", "bytes")),
    (
        "lost_messages_total",
        "counter",
        "Messages that died with a consumer or were dropped at a stop.",
        ("lost", "messages"),
    ),
    ("lost_bytes_total", "counter", "Payload bytes of lost messages.", ("lost", "bytes")),
    ("high_water_bytes", "gauge", "Most payload bytes ever held.", ("high_water_bytes",)),
    ("capacity_bytes", "gauge", "Bytes that messages may take.", ("capacity_bytes",)),
    ("memory_bytes", "gauge", "Bytes taken by messages, with what is kept for the next ones.", ("memory_bytes",)),
    ("disk_bytes", "gauge", "Bytes of the files of --spill.", ("disk_bytes",)),
    ("rate_in_bytes_per_second", "gauge", "Payload taken, average of the last 5 s.", ("rate_in_bytes_s",)),
    ("rate_out_bytes_per_second", "gauge", "Payload given, average of the last 5 s.", ("rate_out_bytes_s",)),
    ("oldest_age_seconds", "gauge", "Age of the oldest message in the buffer.", ("oldest_age_s",)),
    ("producers", "gauge", "Producers connected.", ("producers",)),
    ("producers_seen_total", "counter", "Producers that ever connected.", ("producers_seen",)),
    ("producers_waiting", "gauge", "Producers held up because the buffer is full.", ("producers_waiting",)),
    ("consumers", "gauge", "Consumers connected.", ("consumers",)),
    ("consumers_seen_total", "counter", "Consumers that ever connected.", ("consumers_seen",)),
    ("refused_connections_total", "counter", "Connections cut off for what they sent.", ("refused",)),
    ("denied_connections_total", "counter", "Those among them whose login may not come to that side.", ("denied",)),
    ("start_time_seconds", "gauge", "When the buffer was started, since 1970.", ("started",)),
)
_STATES = ("waiting", "streaming", "draining", "done", "failed")


def our_version() -> str:
    """Version of the installed package."""
    try:
        return version("lclstream")
    except PackageNotFoundError:
        return "unknown"


def document(buffer: Buffer, *, started: float, rates: tuple[float, float]) -> dict[str, Any]:
    """The status document.

    Args:
        buffer: whose.
        started: when, seconds since 1970.
        rates: bytes a second in and out.
    """
    register, ledger = buffer.register, buffer.ledger()
    return {
        "name": buffer.config.name,
        "version": our_version(),
        "state": str(buffer.state),
        "producers": register.now("in"),
        "producers_seen": register.seen("in"),
        "producers_waiting": buffer.pool.waiting,
        "consumers": register.now("out"),
        "consumers_seen": register.seen("out"),
        "received": _amount(ledger.received),
        "sent": _amount(ledger.sent),
        "held": _amount(ledger.held),
        "lost": _amount(ledger.lost),
        "high_water_bytes": ledger.high_water_bytes,
        "capacity_bytes": buffer.config.capacity,
        "memory_bytes": buffer.pool.mapped,
        "disk_bytes": buffer.spill.disk_bytes if buffer.spill is not None else 0,
        "recovered_messages": buffer.recovered,
        "rate_in_bytes_s": round(rates[0], 1),
        "rate_out_bytes_s": round(rates[1], 1),
        "oldest_age_s": round(ledger.oldest_age_s, 3),
        "groups": [_group(buffer, group) for group in range(buffer.fifo.groups)] if buffer.fifo.groups > 1 else [],
        "in": buffer.inputs,
        "out": buffer.outputs,
        "refused": register.refused,
        "last_refusal": register.last_refusal,
        "denied": register.denied,
        "turned_away": register.turned_away(),
        "peers": [peer.document() for peer in register.all()],
        "started": started,
        "time": time.time(),
    }


def _group(buffer: Buffer, group: int) -> dict[str, Any]:
    consumers, queued = buffer.fifo.waiting_for(group)
    return {"out": buffer.outputs[group], "consumers": consumers, "queued": _amount(queued)}


def _amount(amount: Amount) -> dict[str, int]:
    return {"messages": amount.messages, "bytes": amount.bytes}


def to_json(content: dict[str, Any]) -> str:
    """The document as text."""
    return json.dumps(content, indent=1) + "\n"


def metrics(content: dict[str, Any]) -> str:
    """A status document in Prometheus' text format, version 0.0.4."""
    label = f'buffer="{_escaped(content["name"])}"'
    lines = []
    for name, kind, text, path in _METRICS:
        value: Any = content
        for key in path:
            value = value[key]
        lines += [
            f"# HELP nngstream_{name} {text}",
            f"# TYPE nngstream_{name} {kind}",
            f"nngstream_{name}{{{label}}} {value}",
        ]
    lines += ["# HELP nngstream_state 1 for the state the buffer is in.", "# TYPE nngstream_state gauge"]
    lines += [f'nngstream_state{{{label},state="{state}"}} {int(content["state"] == state)}' for state in _STATES]
    for key in ("messages", "bytes", "lost_messages"):
        lines += [f"# HELP nngstream_peer_{key} Of each connected peer: {key}.", f"# TYPE nngstream_peer_{key} gauge"]
        lines += [
            f'nngstream_peer_{key}{{{label},side="{peer["side"]}",protocol="{peer["protocol"]}",'
            f'address="{_escaped(peer["address"])}"}} {peer[key]}'
            for peer in _distinct(content["peers"])
        ]
    return "\n".join(lines) + "\n"


def _distinct(peers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Connected peers with different labels: ipc peers have no address of their own, and are summed."""
    merged: dict[tuple[str, str, str], dict[str, Any]] = {}
    for peer in peers:
        if peer["ended"] is not None:
            continue
        key = (peer["side"], peer["protocol"], peer["address"])
        if key in merged:
            for counted in ("messages", "bytes", "lost_messages"):
                merged[key][counted] += peer[counted]
        else:
            merged[key] = dict(peer)
    return list(merged.values())


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
