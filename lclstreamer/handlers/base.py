"""The interface of data handlers, and the queue between the main thread and their threads."""

from __future__ import annotations

import abc
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from lclstreamer.errors import ComponentError, HandlerError
from lclstreamer.events import Message

_POLL_S = 0.1


@dataclass(frozen=True)
class HandlerContext:
    """What a data handler is told besides its options.

    Attributes:
        rank: number of this rank.
        size: number of ranks.
        stop: set when the run is told to stop; waits end soon after it.
    """

    rank: int
    size: int
    stop: threading.Event


class Handler(abc.ABC):
    """Takes messages somewhere. The main thread calls every method.

    Attributes:
        messages: how many have been delivered.
        nbytes: how many bytes that were.
    """

    def __init__(self, parameters: Any, context: HandlerContext) -> None:
        self.parameters = parameters
        self.context = context
        self.messages = 0
        self.nbytes = 0

    @property
    def name(self) -> str:
        """How reports and errors call it."""
        return type(self).__name__

    def open(self) -> None:  # noqa: B027 - some handlers need no opening
        """Make ready.

        Raises:
            ConnectError: an address cannot be listened at.
            HandlerError: a folder cannot be written.
        """

    @abc.abstractmethod
    def handle(self, message: Message) -> None:
        """Take a message, and release it once it has been delivered. May return before that. Waits a bounded time.

        Raises:
            HandlerError: messages cannot be delivered any more; the message is released.
        """

    @abc.abstractmethod
    def close(self, *, drain: bool, timeout: float | None = None) -> None:
        """End. With `drain`, deliver what was taken first, and wait for it at most `timeout` or the configured time.

        Raises:
            HandlerError: messages were taken and not delivered; the text says how many.
        """


class MessageQueue:
    """Messages on their way from the main thread to the threads of a handler.

    `put` is called by the main thread; `take`, `give_back` and `done` by the handler's threads; the first failure
    reported with `fail` ends all waiting.
    """

    def __init__(self, room: int, stop: threading.Event) -> None:
        self._room = room
        self._stop = stop
        self._waiting: deque[Message] = deque()
        self._in_hand = 0
        self._changed = threading.Condition()
        self._error: HandlerError | None = None
        self._closed = False
        #: Messages that came back undelivered after the end.
        self.refused = 0
        self.last_progress = time.monotonic()

    @property
    def error(self) -> HandlerError | None:
        """What ended the handler, if something did."""
        return self._error

    @property
    def closed(self) -> bool:
        """Whether no message will come any more."""
        return self._closed

    def __len__(self) -> int:
        return len(self._waiting) + self._in_hand

    def put(self, message: Message, timeout: float, why: str) -> None:
        """Wait for room and add a message.

        Raises:
            HandlerError: the handler has failed, or nothing left the queue for `timeout` seconds; `why` explains it.
        """
        with self._changed:
            self.last_progress = max(self.last_progress, time.monotonic() if not self._waiting else 0.0)
            while len(self._waiting) >= self._room and self._error is None:
                self._changed.wait(_POLL_S)
                if self._stop.is_set() and len(self._waiting) >= self._room:
                    # The run is ending: this message joins the others, and the bounded drain decides about all of them.
                    break
                if time.monotonic() - self.last_progress > timeout:
                    self.fail(HandlerError(why))
            if self._error is not None:
                message.release()
                raise self._error
            self._waiting.append(message)
            self._changed.notify_all()

    def take(self, timeout: float = _POLL_S) -> Message | None:
        """The next message with its parts ready, `None` when none came in time or it could not be made."""
        message = self._next(timeout)
        if message is not None and not message.ready:
            try:
                # Here and not in the main thread, which goes on with the next events meanwhile.
                message.parts  # noqa: B018 - asking makes them
            except ComponentError as error:
                self.fail(HandlerError(str(error)))
                self.done(message)
                return None
        return message

    def _next(self, timeout: float) -> Message | None:
        with self._changed:
            if not self._waiting:
                self._changed.wait(timeout)
            if not self._waiting or self._error is not None:
                return None
            self._in_hand += 1
            message = self._waiting.popleft()
            self._changed.notify_all()
            return message

    def give_back(self, message: Message) -> None:
        """A taken message could not be delivered here: it is the next one for whoever takes."""
        with self._changed:
            self._in_hand -= 1
            if self._error is None and not self._closed:
                self._waiting.appendleft(message)
            else:
                self.refused += 1
                message.release()
            self._changed.notify_all()

    def done(self, message: Message) -> None:
        """A taken message has been delivered."""
        message.release()
        with self._changed:
            self._in_hand -= 1
            self.last_progress = time.monotonic()
            self._changed.notify_all()

    def fail(self, error: HandlerError) -> None:
        """Delivering has ended for good."""
        with self._changed:
            if self._error is None:
                self._error = error
            # Whoever waits for the memory of these messages must not wait for ever.
            while self._waiting:
                self._waiting.popleft().release()
            self._changed.notify_all()

    def wait_empty(self, deadline: float) -> bool:
        """Wait until every message was delivered; whether that was so before the deadline and without failure."""
        with self._changed:
            while (self._waiting or self._in_hand) and self._error is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(min(left, _POLL_S))
            return self._error is None

    def close(self) -> int:
        """No more messages; how many were never taken, which are released."""
        with self._changed:
            self._closed = True
            left = len(self._waiting)
            while self._waiting:
                self._waiting.popleft().release()
            self._changed.notify_all()
            return left
