"""The interface of serializers."""

from __future__ import annotations

import abc
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lclstreamer.events import Event, Message


@dataclass(frozen=True)
class SerializerContext:
    """What a serializer is told besides its options.

    Attributes:
        source_identifier: the configuration's.
        configuration_sha256: fingerprint of the configuration.
        version: of the engine.
        rank: number of this rank.
        size: number of ranks.
        timestamps: names of the data sources whose value is the event's time.
        batch_size: how many events a message has, for making room.
        slots: how many messages may exist at a time, which bounds the memory.
        stop: set when the run is told to stop.
    """

    source_identifier: str = ""
    configuration_sha256: str = ""
    version: str = ""
    rank: int = 0
    size: int = 1
    timestamps: frozenset[str] = field(default_factory=frozenset)
    batch_size: int = 8
    slots: int = 4
    stop: threading.Event | None = None


class Serializer(abc.ABC):
    """Makes messages of events. One instance a rank, used in the main thread.

    An event's arrays are read before :meth:`add` returns; the event may be changed afterwards.
    """

    def __init__(self, parameters: Any, context: SerializerContext) -> None:
        self.parameters = parameters
        self.context = context

    @property
    def waited_s(self) -> float:
        """Seconds spent waiting until messages had left and their memory was free again."""
        return 0.0

    @abc.abstractmethod
    def add(self, event: Event) -> Iterable[Message]:
        """Take an event; messages that are ready because of it.

        Raises:
            ComponentError: the event cannot be put into this format.
        """

    @abc.abstractmethod
    def end_batch(self) -> Iterable[Message]:
        """The batch is complete; the messages made of it, none when it has no event."""

    def end(self) -> Iterable[Message]:
        """The data have ended, after the last batch; closing messages of formats that have some."""
        return ()

    def close(self) -> None:  # noqa: B027 - most serializers hold nothing
        """Give back threads and memory; called once, also after errors."""

    @classmethod
    def fields(cls, parameters: Any, names: Iterable[str]) -> Mapping[str, str]:
        """Data source name to where its value is found in a message, for `--check`."""
        return {name: name for name in names}
