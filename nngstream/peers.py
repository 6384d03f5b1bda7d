"""Who is connected, who was, and how much each of them gave or took.

Ownership: a :class:`Peer` is counted up by its connection's thread alone; the :class:`Register` has a lock.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

from nngstream.errors import NotAllowedError
from nngstream.handshake import Greeted, Side
from nngstream.stream import Stream

#: How many peers that have gone the status still shows.
REMEMBERED = 200
#: How many identities that were turned away the status shows.
DENIED = 100


class Peer:
    """One connection that finished its handshake.

    Attributes:
        messages, bytes: payload received from it, or written to it.
        lost_messages, lost_bytes: written to it and certainly not arrived.
        incomplete_bytes: wire bytes of a message it began and did not end.
        ended: why it has gone, None while it is connected.
    """

    def __init__(self, side: Side, greeted: Greeted, stream: Stream) -> None:
        self.side = side
        self.greeted = greeted
        self.address = stream.address
        self.subject = stream.subject
        self.tls = stream.subject is not None
        self.messages = 0
        self.bytes = 0
        self.lost_messages = 0
        self.lost_bytes = 0
        self.incomplete_bytes = 0
        self.connected = time.time()
        self.ended: str | None = None

    def document(self) -> dict[str, Any]:
        """The peer's part of the status document."""
        return {
            "side": self.side,
            "protocol": self.greeted.protocol,
            "address": self.address,
            "buffer": self.greeted.buffer,
            "subject": self.subject,
            "messages": self.messages,
            "bytes": self.bytes,
            "lost_messages": self.lost_messages,
            "lost_bytes": self.lost_bytes,
            "incomplete_bytes": self.incomplete_bytes,
            "connected": self.connected,
            "ended": self.ended,
        }


class Register:
    """All peers of a buffer."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now: dict[Side, list[Peer]] = {"in": [], "out": []}
        self._seen: dict[Side, int] = {"in": 0, "out": 0}
        self._gone: deque[Peer] = deque(maxlen=REMEMBERED)
        self._closed: set[Side] = set()
        #: Connections that were cut off before they became peers, and the last reason.
        self.refused = 0
        self.last_refusal: str | None = None
        #: Those among them whom the list of their side does not name, and who they were, the latest last.
        self.denied = 0
        self._denied: dict[tuple[Side, str, str], dict[str, Any]] = {}

    def came(self, peer: Peer) -> bool:
        """A peer finished its handshake; says whether its side is still open."""
        with self._lock:
            if peer.side in self._closed:
                peer.ended = "too late"
                return False
            self._now[peer.side].append(peer)
            self._seen[peer.side] += 1
            return True

    def close(self, side: Side) -> None:
        """Nobody may come any more at this side."""
        with self._lock:
            self._closed.add(side)

    def left(self, peer: Peer, why: str) -> None:
        """A peer has gone."""
        with self._lock:
            peer.ended = why
            self._now[peer.side].remove(peer)
            self._gone.append(peer)

    def refuse(self, address: str, why: str) -> None:
        """A connection was cut off for what it did."""
        with self._lock:
            self.refused += 1
            self.last_refusal = f"{address}: {why}"

    def deny(self, side: Side, address: str, error: NotAllowedError) -> int:
        """Somebody came who may not; returns how often he has come to this side."""
        self.refuse(address, str(error))
        with self._lock:
            self.denied += 1
            key = (side, error.login, error.issuer)
            times = self._denied.pop(key, {"times": 0})["times"] + 1
            self._denied[key] = {
                "side": side,
                "login": error.login,
                "issuer": error.issuer,
                "rule": error.rule,
                "address": address,
                "times": times,
                "time": time.time(),
            }
            if len(self._denied) > DENIED:
                del self._denied[next(iter(self._denied))]
            return int(times)

    def turned_away(self) -> list[dict[str, Any]]:
        """Who came and may not, for the status document; the latest last."""
        with self._lock:
            return [dict(each) for each in self._denied.values()]

    def now(self, side: Side) -> int:
        """How many are connected."""
        return len(self._now[side])

    def seen(self, side: Side) -> int:
        """How many have ever come."""
        return self._seen[side]

    def all(self) -> list[Peer]:
        """Those connected, then those remembered."""
        with self._lock:
            return [*self._now["in"], *self._now["out"], *self._gone]
