"""Feeding an analysis from a stream: the frame every consumer runs in.

A consumer gives an :class:`Analysis`; :func:`follow` pulls, decodes, reports progress, and tells in its
:class:`Outcome` how the stream ended, so that what was analysed until then can be kept. Everything runs in the
caller's (main) thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from lclstream.client.batch import Batch
from lclstream.client.decoding import Decoder
from lclstream.client.errors import NoPeerError, StreamError, WrongPeerError
from lclstream.client.pulling import Puller
from lclstream.client.statistics import in_units
from lclstream.client.stopping import StoppedBySignal, Stopping

_log = logging.getLogger(__name__)
_FIRST_REPORT_S, _LONGEST_REPORT_S = 2.0, 30.0


class Analysis(Protocol):
    """What a consumer does with each message.

    Attributes:
        events: events taken in so far.
    """

    events: int

    def add(self, batch: Batch, received_unix_s: float) -> None:
        """Take in the events of one message that arrived at that wall time (seconds since 1970, UTC)."""


@dataclass(frozen=True)
class Outcome:
    """How a stream ended.

    Attributes:
        complete: the end of the stream was seen, and every message was read and understood.
        reason: why not; None when complete.
        exit_code: 0 complete, 1 broken or unreadable, 3 nobody was there at the start, 128 + signal.
    """

    complete: bool
    reason: str | None
    exit_code: int


def follow(puller: Puller, analysis: Analysis, *, report: Callable[[], str] = str) -> Outcome:
    """Feed `analysis` until the stream ends, breaks, or SIGINT or SIGTERM comes.

    Args:
        puller: an unopened puller; it is closed afterwards.
        analysis: gets every message; what it raises ends the run as *unreadable*.
        report: more words for the progress lines.
    """
    began = time.monotonic()
    pause = _FIRST_REPORT_S
    due = began + pause
    statistics = puller.statistics
    stopping = Stopping()
    decoder = Decoder()
    with stopping:
        try:
            with stopping.interruptible():
                puller.open()
            _log.info("pulling from %s", ", ".join(puller.urls))
            while True:
                # Between two messages a signal interrupts the wait; inside the analysis it waits its turn, so that
                # no event is counted in one result and missing in another.
                with stopping.interruptible():
                    message = puller.receive()
                if message is None:
                    decoder.end()
                    break
                received = statistics.last_unix_s or time.time()
                for batch in decoder.feed(message, name=f"message {statistics.messages - 1}"):
                    analysis.add(batch, received)
                if time.monotonic() >= due:
                    _log.info("%s", progress(puller, analysis, report()))
                    pause = min(2 * pause, _LONGEST_REPORT_S)
                    due = time.monotonic() + pause
        except StoppedBySignal as signal:
            outcome = Outcome(False, f"stopped by {signal.name}", 128 + signal.number)
        except (NoPeerError, WrongPeerError) as error:
            outcome = Outcome(False, str(error), 3)
        except (StreamError, ValueError) as error:
            outcome = Outcome(False, str(error), 1)
        except Exception as error:
            # An analysis that trips over one message must not cost the results of all before it.
            _log.exception("the analysis failed")
            outcome = Outcome(False, f"the analysis failed: {type(error).__name__}: {error}", 1)
        else:
            outcome = Outcome(True, None, 0)
        finally:
            puller.close()
    _log.info("%s: %s", "end of stream" if outcome.complete else "INCOMPLETE", progress(puller, analysis, report()))
    if outcome.reason:
        _log.error("%s", outcome.reason)
    return outcome


def progress(puller: Puller, analysis: Analysis, more: str) -> str:
    """One line: how much, how fast."""
    statistics = puller.statistics
    rate = analysis.events / statistics.seconds if statistics.seconds > 0 else 0.0
    line = (
        f"{statistics.messages} messages, {analysis.events} events, {in_units(statistics.bytes)}B, "
        f"{rate:.1f} events/s, {in_units(statistics.rate_bytes_s)}B/s"
    )
    return f"{line}, {more}" if more else line
