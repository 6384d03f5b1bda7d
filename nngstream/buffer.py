"""The buffer: memory, queue, connections and status, put together and led through its states.

Threads: the one that calls :meth:`Buffer.run` owns the state and everything's start and end. The doorman's thread
accepts and watches; each connection and each dialled address has a thread; each status request has one. All of them
have ended when `run` returns.
"""

from __future__ import annotations

import logging
import os
import ssl
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from nngstream import tls, url
from nngstream.config import BufferConfig
from nngstream.connections import Connections
from nngstream.errors import ConfigurationError
from nngstream.fifo import Fifo, Ledger
from nngstream.lifecycle import Lifecycle, State
from nngstream.memory import Pool
from nngstream.outlet import LINGER_S
from nngstream.peers import Register
from nngstream.rates import Rate
from nngstream.spill import Spill
from nngstream.status import document, to_json
from nngstream.status_server import StatusServer
from nngstream.url import Address

log = logging.getLogger("nngstream")

_TICK_S = 0.1
_SAMPLE_S = 1.0
#: A connection that was interrupted ends at once; this only bounds what must not happen.
_JOIN_S = 5.0


class Buffer:
    """A buffer; use :meth:`start`, then :meth:`run`.

    Args:
        config: checked options.
    """

    def __init__(self, config: BufferConfig) -> None:
        if config.summary is not None and not config.summary.absolute().parent.is_dir():
            raise ConfigurationError(
                f"--summary {config.summary}: there is no folder {config.summary.absolute().parent}"
            )
        self.config = config
        self.pool = Pool(config.capacity)
        self.fifo = Fifo(groups=1 if config.route is None else len(config.outputs))
        self.register = Register()
        self.recovered = 0
        self.lifecycle = Lifecycle(config.producers, config.grace)
        self._changed = threading.Event()
        self._stop_wanted = 0
        self._finished = False
        self._input_closed = False
        self._started = time.time()
        self._rate_in, self._rate_out = Rate(), Rate()
        self._next_sample = 0.0
        self._inputs: list[Address] = []
        self._outputs: list[Address] = []
        self._status: StatusServer | None = None
        server = client = None
        if config.tls is not None:
            # TLS 1.2 too: the Mbed TLS in libnng may know nothing newer.
            server = tls.server_context(config.tls, minimum=ssl.TLSVersion.TLSv1_2)
            client = tls.client_context(config.tls, minimum=ssl.TLSVersion.TLSv1_2)
        self._connections = Connections(
            config,
            self.pool,
            self.fifo,
            self.register,
            server_tls=server,
            client_tls=client,
            changed=self._changed,
        )

        self.spill = None if config.spill is None else Spill(config.spill, config.spill_limit, self.fifo, self.pool)

    # -- any thread

    @property
    def inputs(self) -> list[str]:
        """URLs of the producers' side, with real ports."""
        return [str(each) for each in self._inputs]

    @property
    def outputs(self) -> list[str]:
        """URLs of the consumers' side, with real ports."""
        return [str(each) for each in self._outputs]

    @property
    def status_url(self) -> str | None:
        """URL of the status, with its real port."""
        return None if self._status is None else self._status.url

    @property
    def state(self) -> State:
        """Where it is in its life; `done` and `failed` only when the last consumer has been told."""
        state = self.lifecycle.state
        return state if self._finished or state not in (State.DONE, State.FAILED) else State.DRAINING

    def stop(self) -> None:
        """A stop signal: give away what is there for a bounded time; a second call gives up at once."""
        self._stop_wanted += 1
        self._changed.set()

    def ledger(self) -> Ledger:
        """The account now."""
        return self.fifo.ledger()

    def status(self) -> dict[str, Any]:
        """The status document."""
        return document(self, started=self._started, rates=(self._rate_in.per_second, self._rate_out.per_second))

    # -- the buffer's thread

    def start(self) -> None:
        """Listen everywhere, then let everybody in.

        Raises:
            ListenError: an address cannot be listened at; nothing is left open.
        """
        config, doorman = self.config, self._connections.doorman
        try:
            if self.spill is not None:
                self.recovered = self.spill.recover()
                if self.recovered:
                    log.info("spill: %d messages of a buffer before this one are offered again", self.recovered)
            for text in config.inputs:
                address = url.parse(text)
                self._inputs.append(address if address.dial else doorman.listen(address, "in"))
            for text in config.outputs:
                address = url.parse(text)
                self._outputs.append(address if address.dial else doorman.listen(address, "out"))
            if config.route is not None:
                self._connections.groups |= {address: group for group, address in enumerate(self._outputs)}
            if config.status is not None:
                self._status = StatusServer(
                    url.parse(config.status, schemes=("http", "https")), config.tls, self.status
                )
        except BaseException:
            self._connections.close()
            if self.spill is not None:
                self.spill.close()
            raise
        if self.spill is not None:
            self.spill.start()
        doorman.start()
        if self._status is not None:
            self._status.start()
        for address in self._inputs:
            if address.dial:
                self._connections.dial(address, "in")
        for address in self._outputs:
            if address.dial:
                self._connections.dial(address, "out")

    def run(self) -> State:
        """Lead the buffer to its end; :meth:`start` must have been called.

        Returns:
            ``done``, or ``failed`` when messages were dropped after a stop signal.
        """
        try:
            stops = 0
            while self.lifecycle.state not in (State.DONE, State.FAILED):
                self._changed.wait(_TICK_S)
                self._changed.clear()
                now = time.monotonic()
                if self._stop_wanted > stops:
                    stops = self._stop_wanted
                    log.info("stop signal: giving messages away for %g s", self.config.drain if stops == 1 else 0)
                    self.lifecycle.stop(now, self.config.drain if stops == 1 else 0)
                self._observe(now)
            self._finish()
        finally:
            self._connections.interrupt_all("the buffer ends")
            self._connections.join("in", _JOIN_S)
            self._connections.join("out", _JOIN_S)
            self._connections.close()
            if self.spill is not None:
                self.spill.stop()
                self.spill.close()
            self._finished = True
            if self.config.summary is not None:
                write_atomically(self.config.summary, to_json(self.status()))
            if self._status is not None:
                self._status.close()
        return self.state

    def _observe(self, now: float) -> None:
        before = self.lifecycle.state
        state = self.lifecycle.observe(
            now,
            connected=self.register.now("in") if before is not State.DRAINING else self._connections.count("in"),
            seen=self.register.seen("in"),
            empty=self.fifo.empty,
        )
        if state is not before:
            log.info("%s", state)
        if state is not State.STREAMING and state is not State.WAITING and not self._input_closed:
            self._input_closed = True
            self.register.close("in")
            self._connections.close_side("in", "the buffer stops" if self._stop_wanted else None)
        self._connections.cut_silent(now)
        if now >= self._next_sample:
            self._next_sample = now + _SAMPLE_S
            ledger = self.fifo.ledger()
            self._rate_in.sample(now, ledger.received.bytes)
            self._rate_out.sample(now, ledger.sent.bytes)

    def _finish(self) -> None:
        """Tell consumers the end, or give up what is left."""
        if self.lifecycle.state is State.DONE:
            self._connections.end_consumers()
            # Each consumer's own patience is bounded; a slow one that makes progress is not cut off.
            while not self._connections.join("out", LINGER_S):
                if self._stop_wanted:
                    break
        self._connections.interrupt_all("the buffer ends")
        self._connections.join("in", _JOIN_S)
        self._connections.join("out", _JOIN_S)
        if self.spill is not None:
            self.spill.stop()
            if not self.fifo.empty and not self.spill.keep_everything():
                log.error("spill: not all that is left could be written to %s", self.config.spill)
        dropped = self.fifo.drop_all()
        ledger = self.fifo.ledger()
        if dropped.messages:
            log.error("dropped %d messages (%d bytes) that nobody took in time", dropped.messages, dropped.bytes)
        if ledger.held.messages:
            log.warning("%d messages (%d bytes) wait in %s for the next start", *ledger.held, self.config.spill)
        log.info(
            "end: received %d messages (%d bytes), sent %d (%d bytes), lost %d (%d bytes)",
            *ledger.received,
            *ledger.sent,
            *ledger.lost,
        )


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees all of it or nothing, also after a crash of the machine."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)
