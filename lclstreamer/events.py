"""What flows through the engine: events, and the messages made of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

#: Anything with the buffer interface, contiguous bytes.
Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class RunInfo:
    """Which run an event is of; empty and 0 where the source does not know."""

    experiment: str = ""
    run: int = 0


@dataclass(frozen=True, slots=True)
class Ragged:
    """Values of which every event may have another number: peaks, arrival times, pieces of a waveform.

    Attributes:
        values: one axis, numbers.
    """

    values: NDArray[Any]


@dataclass(frozen=True, slots=True)
class Channels:
    """Waveforms of several channels, each with a length of its own; a FEX pipeline makes it storable.

    Attributes:
        samples: of each channel, one axis.
        numbers: of the channels.
    """

    samples: tuple[NDArray[Any], ...]
    numbers: tuple[int, ...]


@dataclass(slots=True)
class Event:
    """The data of one shot.

    Attributes:
        values: data source name to array (any shape and dtype; strings as numpy `str_`), `None` where the data source
            gave nothing; :class:`Ragged` where the number of elements changes from event to event.
        index: number of the event in the whole run, from 0, the same for any number of ranks.
        run: the run it is of.
        timestamp_ns: nanoseconds since 1970-01-01T00:00:00Z, `None` where the source has no time.
        times: name of a data source with a time of its own to that time, `None` where it is missing; all others have
            `timestamp_ns`.
    """

    values: dict[str, Any]
    index: int
    run: RunInfo = field(default_factory=RunInfo)
    timestamp_ns: int | None = None
    times: Mapping[str, int | None] | None = None

    def time_of(self, name: str) -> int | None:
        """Nanoseconds of the data source's time."""
        return self.timestamp_ns if self.times is None else self.times.get(name, self.timestamp_ns)


class Message:
    """One serialized message: buffers that belong one after the other.

    The buffers stay as they are until every holder has called :meth:`release`; then their memory may be used again.
    Whoever passes a message on calls :meth:`hold` once for each receiver. Safe to use from several threads.

    Args:
        parts: the buffers; or a function that gives them once what they are made of is ready, called in the thread that
            asks first.
        events: how many are in it.
        sequence: number of the message on its rank.
        on_release: called when the last holder has released the message.
    """

    __slots__ = ("_holders", "_later", "_lock", "_making", "_nbytes", "_on_release", "_parts", "events", "sequence")

    def __init__(
        self,
        parts: Iterable[Buffer] | Callable[[], Iterable[Buffer]],
        *,
        events: int,
        sequence: int = 0,
        on_release: Callable[[], None] | None = None,
    ) -> None:
        self._parts: tuple[memoryview, ...] = ()
        self._nbytes = 0
        self._later: Callable[[], Iterable[Buffer]] | None = None
        if callable(parts):
            self._later = parts
        else:
            self._set(parts)
        self.events = events
        self.sequence = sequence
        self._holders = 1
        self._lock = threading.Lock()
        # Not the lock above: holding and releasing must not wait until the parts are made.
        self._making = threading.Lock()
        self._on_release = on_release

    def _set(self, parts: Iterable[Buffer]) -> None:
        self._parts = tuple(memoryview(part).cast("B") for part in parts)
        self._nbytes = sum(part.nbytes for part in self._parts)

    def _make(self) -> None:
        with self._making:
            if self._later is not None:
                self._set(self._later())
                self._later = None

    @property
    def ready(self) -> bool:
        """Whether its parts have been made."""
        return self._later is None

    @property
    def parts(self) -> tuple[memoryview, ...]:
        """The buffers; waits until they are ready.

        Raises:
            ComponentError: they could not be made.
        """
        if self._later is not None:
            self._make()
        return self._parts

    @property
    def nbytes(self) -> int:
        """Length of all buffers; waits as :attr:`parts` does."""
        if self._later is not None:
            self._make()
        return self._nbytes

    def hold(self) -> None:
        """One more holder."""
        with self._lock:
            self._holders += 1

    def release(self) -> None:
        """One holder less; the last one gives the memory back."""
        with self._lock:
            self._holders -= 1
            last = self._holders == 0
        if last and self._on_release is not None:
            self._on_release()

    def __bytes__(self) -> bytes:
        return b"".join(self.parts)
