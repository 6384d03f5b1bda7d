"""The engine of one rank: events from the source, through pipelines and serializer, to the data handlers.

The main thread runs :meth:`Engine.run`; data handlers have threads of their own. A stop request is looked at between
events; messages already made are delivered first.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

from lclstreamer import registry
from lclstreamer.config import Parameters
from lclstreamer.errors import HandlerError
from lclstreamer.events import Event, Message
from lclstreamer.handlers.base import Handler, HandlerContext
from lclstreamer.pipelines.base import Chain, make_chain
from lclstreamer.progress import Counters
from lclstreamer.serializers.base import Serializer, SerializerContext
from lclstreamer.sources.base import EventSource, SourceContext

log = logging.getLogger("lclstreamer")

#: After a stop request the messages already made may take this long to leave.
STOPPED_DRAIN_S = 10.0


def engine_version() -> str:
    """Version of the installed package."""
    try:
        return version("lclstream")
    except PackageNotFoundError:
        return "unknown"


class Engine:
    """One rank's engine.

    Args:
        parameters: the configuration.
        rank: number of this rank.
        size: number of ranks.
        limit: events in all, over all ranks; `None` for all.

    Raises:
        ConfigurationError: a component cannot be used here.
    """

    def __init__(self, parameters: Parameters, *, rank: int = 0, size: int = 1, limit: int | None = None) -> None:
        self.parameters = parameters
        self.counters = Counters(rank=rank)
        self.stop = threading.Event()
        self._rank, self._size = rank, size
        context = SourceContext(parameters.source_identifier, parameters.data_sources, rank, size, limit)
        source_class, options = registry.resolve("event_source", parameters.event_source)
        self.source: EventSource = source_class(options, context)
        self._timestamps = frozenset(
            name
            for name, section in parameters.data_sources.items()
            if registry.resolve(f"data_sources.{name}", section)[0].is_timestamp
        )
        self._chain: Chain = make_chain(parameters.pipelines)
        self._handlers = [self._make_handler(number) for number in range(len(parameters.data_handlers))]
        self._serializer = self._make_serializer()
        self._failed: list[HandlerError] = []
        self._broken: set[Handler] = set()
        self._handling_s = 0.0
        self._unsized: deque[Message] = deque()
        self.counters.refresh = self._refresh

    def _make_serializer(self) -> Serializer:
        parameters = self.parameters
        component, options = registry.resolve("data_serializer", parameters.data_serializer)
        context = SerializerContext(
            parameters.source_identifier,
            parameters.sha256(),
            engine_version(),
            self._rank,
            self._size,
            self._timestamps,
            self._chain.batch_size,
            # One is filled, one is sent on each connection, and one waits so that no connection does.
            2 + max(len(getattr(section, "urls", "1")) for section in parameters.data_handlers),
            self.stop,
        )
        serializer: Serializer = component(options, context)
        return serializer

    def _make_handler(self, number: int) -> Handler:
        component, options = registry.resolve(f"data_handlers[{number}]", self.parameters.data_handlers[number])
        handler: Handler = component(options, HandlerContext(self._rank, self._size, self.stop))
        return handler

    def plan(self) -> list[str]:
        """What this rank would do, without reading data or sending."""
        source = self.source
        fields = type(self._serializer).fields(self.parameters.data_serializer, self.parameters.data_sources)
        lines = [f"{type(source).__name__} {source.plan(source.parameters, source.context)}"]
        lines += [f"data source {name}: {section.type}" for name, section in self.parameters.data_sources.items()]
        lines += [f"pipeline {type(one).__name__}" for one in self._chain.pipelines]
        lines.append(f"{self._chain.batch_size} events a message")
        lines += [f"{type(self._serializer).__name__}: {name} at {path}" for name, path in fields.items()]
        lines += [f"to {handler.name}" for handler in self._handlers]
        return lines

    def open(self) -> None:
        """Open data and sinks.

        Raises:
            EngineError: data, detectors or addresses are not as configured; what was opened is closed again.
        """
        try:
            self.source.open()
            for handler in self._handlers:
                handler.open()
        except BaseException:
            self._close(drain=False)
            raise

    def abandon(self) -> None:
        """Close what :meth:`open` opened, without having streamed."""
        self._close(drain=False)

    def run(self) -> Counters:
        """Stream this rank's events; to be called after :meth:`open`.

        Returns:
            What was done. `finished` is false when a stop request ended it before the data did.

        Raises:
            EngineError: a component failed, or a data handler could not deliver everything.
        """
        began = time.monotonic()
        try:
            self._stream()
        except BaseException:
            self._close(drain=False)
            raise
        finally:
            self.counters.seconds = time.monotonic() - began
        self._close(drain=True)
        self._count_sizes()
        self.counters.seconds = time.monotonic() - began
        self.counters.pipelines = self._chain.report()
        if self._failed:
            raise HandlerError("\n".join(str(error) for error in self._failed))
        return self.counters

    def _stream(self) -> None:
        counters = self.counters
        skip = self.parameters.skip_incomplete_events
        batch, size = 0, self._chain.batch_size
        events = self.source.events()
        clock = time.perf_counter
        while not self.stop.is_set():
            began = clock()
            event = next(events, None)
            counters.read_s += clock() - began
            if event is None:
                counters.finished = True
                break
            if not self._complete(event) and skip:
                counters.skipped += 1
                continue
            kept = False
            for result in self._chain.process(event):
                kept = True
                batch = self._add(result, batch, size)
            if not kept:
                counters.dropped += 1
        for result in self._chain.finish():
            batch = self._add(result, batch, size)
        self._send(self._serializer.end_batch())
        self._send(self._serializer.end())

    def _complete(self, event: Event) -> bool:
        complete = True
        missing = self.counters.missing
        for name, value in event.values.items():
            if value is None:
                complete = False
                missing[name] = missing.get(name, 0) + 1
        return complete

    def _add(self, event: Event, batch: int, size: int) -> int:
        self.counters.events += 1
        self._send(self._serializer.add(event))
        if batch + 1 < size:
            return batch + 1
        self._send(self._serializer.end_batch())
        return 0

    def _send(self, messages: Iterable[Message]) -> None:
        for message in messages:
            began = time.perf_counter()
            for handler in self._handlers:
                if handler not in self._broken:
                    message.hold()
                    self._hand_over(handler, message)
            message.release()
            self.counters.messages += 1
            self._unsized.append(message)
            self._count_sizes()
            self._handling_s += time.perf_counter() - began
            self._refresh()

    def _count_sizes(self) -> None:
        """Count the bytes of messages, once their parts are ready."""
        while self._unsized and self._unsized[0].ready:
            self.counters.nbytes += self._unsized.popleft().nbytes

    def _refresh(self) -> None:
        """Bring the waiting time up to date; called by the progress thread as well, while the main thread waits."""
        self.counters.waited_s = self._handling_s + self._serializer.waited_s

    def _hand_over(self, handler: Handler, message: Message) -> None:
        try:
            handler.handle(message)
        except HandlerError as error:
            self._failed.append(error)
            self._broken.add(handler)
            if len(self._broken) == len(self._handlers):
                raise HandlerError("\n".join(str(one) for one in self._failed)) from error
            log.error("%s; the other data handlers go on", error)

    def _close(self, *, drain: bool) -> None:
        timeout = STOPPED_DRAIN_S if self.stop.is_set() else None
        for handler in self._handlers:
            try:
                handler.close(drain=drain and handler not in self._broken, timeout=timeout if drain else 1.0)
            except HandlerError as error:
                if drain and handler not in self._broken:
                    self._failed.append(error)
            self.counters.delivered[handler.name] = handler.messages
        self._serializer.close()
        self.source.close()
