"""A stream asked for at the transfer service, kept alive while it is read, and ended with its reader.

One thread beside the reader renews the lease and looks how the transfer is; it ends with the ``with`` block. When the
block is left before the end of the stream, by whatever error or signal, the transfer is cancelled.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lclstream.api.client import TransferClient
from lclstream.api.models import TransferInfo, TransferPhase, TransferStatus
from lclstream.client.encryption import context_for
from lclstream.client.errors import NoPeerError, StreamTimeout, TransferError
from lclstream.client.pulling import CONNECT_TIMEOUT_S, TIMEOUT_S, Puller, pull
from lclstream.client.statistics import Statistics
from lclstream.security.errors import AuthenticationError, PeerError, ServiceError

_log = logging.getLogger(__name__)
#: Seconds between two looks at the transfer, and between two looks of the reader at what was seen.
_LOOK_S, _SLICE_S = 5.0, 0.5
#: Seconds within which the transfer is final after its stream has ended.
_FINAL_S = 60.0
_REQUEST_S = 120.0


class Transfer:
    """One transfer with its stream.

    Args:
        api: client of the transfer service; the caller closes it.
        config: the engine's configuration.
        lease_s: the transfer ends by itself this long after we have vanished; None: never.
        ranks: MPI ranks of the engine; None: the service's default.
        library: protocol to pull with.
        timeout_s: longest silence of the stream.
        connect_timeout_s: longest wait for the buffer, from the moment the transfer is accepted.
        credentials: folder of our certificate, for a service whose streams are encrypted.
        interruptible: a context manager entered around every wait (``Stopping.interruptible``). The request itself is
            never interrupted: its answer is needed to cancel what it has started.
    """

    def __init__(
        self,
        api: TransferClient,
        config: dict[str, Any],
        *,
        lease_s: float | None = 60.0,
        ranks: int | None = None,
        library: Any = "nng",
        timeout_s: float = TIMEOUT_S,
        connect_timeout_s: float = 4 * CONNECT_TIMEOUT_S,
        credentials: Path | str | None = None,
        interruptible: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._api = api
        self._config = config
        self._lease_s = lease_s
        self._ranks = ranks
        self._library = library
        self._timeout_s = timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._credentials = None if credentials is None else Path(credentials)
        self._interruptible = interruptible
        self._key = uuid.uuid4().hex
        self._leaving = threading.Event()
        self._keeper: threading.Thread | None = None
        self._seen: TransferInfo | None = None
        self._over = False
        self._warned = ""
        self.status: TransferStatus | None = None
        self.statistics = Statistics()

    def __enter__(self) -> Self:
        """Ask for the transfer.

        Raises:
            PeerError: the service refused, or cannot be reached.
        """
        self.status = self._requested()
        self._keeper = threading.Thread(target=self._keep, name=f"transfer {self.status.id}", daemon=True)
        self._keeper.start()
        _log.info("transfer %s: %s", self.status.id, self.status.url)
        return self

    def _requested(self) -> TransferStatus:
        deadline = time.monotonic() + _REQUEST_S
        pause = 0.5
        taken = False
        while True:
            try:
                # The same key each time: an answer that was lost does not start a second transfer.
                return self._api.request(
                    self._config, lease_s=self._lease_s, ranks=self._ranks, idempotency_key=self._key
                )
            except PeerError as error:
                if not _ask_again(error, taken) or time.monotonic() + pause > deadline:
                    raise
                taken = True
                _log.warning("%s; asking again", error)
            with self._interruptible():
                time.sleep(pause)
            pause = min(2 * pause, 10.0)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._leaving.set()
        if self._keeper is not None:
            self._keeper.join(30)
        if not self._over and self.status is not None:
            try:
                self._api.cancel(self.status.id)
                _log.info("transfer %s cancelled", self.status.id)
            except PeerError as failed:
                _log.error(
                    "transfer %s could not be cancelled (%s); %s",
                    self.status.id,
                    failed,
                    f"its lease ends it within {self._lease_s:g} s" if self._lease_s else "cancel it by hand",
                )

    def _keep(self) -> None:
        """Renew the lease and look at the transfer until we leave; the only code of the keeper thread."""
        assert self.status is not None
        every = min(_LOOK_S, self._lease_s / 3) if self._lease_s else _LOOK_S
        while not self._leaving.wait(every):
            try:
                if self._lease_s is not None:
                    self._api.renew(self.status.id, self._lease_s)
                self._seen = self._api.info(self.status.id)
            except ServiceError as error:
                if error.status == 409:  # it has ended: see how
                    self._look()
                else:
                    self._warn(error)
            except PeerError as error:
                # The stream itself may be well: the service restarts, or the network is slow.
                self._warn(error)

    def _look(self) -> TransferInfo | None:
        assert self.status is not None
        try:
            self._seen = self._api.info(self.status.id)
        except PeerError as error:
            self._warn(error)
        return self._seen

    def _warn(self, error: PeerError) -> None:
        """Say it once, not each time we look."""
        assert self.status is not None
        if str(error) != self._warned:
            self._warned = str(error)
            _log.warning("transfer %s: %s", self.status.id, error)

    def messages(self) -> Iterator[bytes]:
        """The stream's messages.

        Raises:
            TransferError: the transfer failed, was cancelled, or expired.
            StreamError: as :meth:`lclstream.client.pulling.Puller.receive`.
        """
        assert self.status is not None
        with self._interruptible():
            puller = self._connected()
        self.statistics = puller.statistics
        with puller:
            silent_since = time.monotonic()
            while True:
                with self._interruptible():
                    try:
                        message = puller.receive(min(_SLICE_S, self._timeout_s))
                    except StreamTimeout:
                        self._check()
                        if time.monotonic() - silent_since >= self._timeout_s:
                            raise
                        continue
                if message is None:
                    break
                yield message
                silent_since = time.monotonic()
        with self._interruptible():
            self._end()
        self._over = True

    def _connected(self) -> Puller:
        assert self.status is not None
        deadline = time.monotonic() + self._connect_timeout_s
        url = self.status.url
        tls = context_for([url], self._credentials, listen=False)
        while True:
            left = deadline - time.monotonic()
            try:
                return pull(url, library=self._library, connect_timeout_s=min(2.0, max(left, 0.1)), tls=tls).open()
            except NoPeerError:
                self._check()
                if self._seen is not None and self._seen.phase is TransferPhase.done:
                    raise TransferError(f"transfer {self._seen.id} was over before we could read from it") from None
                if time.monotonic() >= deadline:
                    raise

    def _check(self) -> None:
        seen = self._seen
        if seen is not None and seen.phase.final and seen.phase is not TransferPhase.done:
            self._over = True
            raise TransferError(f"transfer {seen.id} {seen.phase.value}: {seen.info}")

    def _end(self) -> None:
        """A dying buffer closes its connections like one that is done: only the service knows which it was."""
        deadline = time.monotonic() + _FINAL_S
        pause = 0.1
        while (seen := self._look()) is None or not seen.phase.final:
            if time.monotonic() > deadline:
                state = "unknown" if seen is None else seen.phase.value
                raise TransferError(f"the stream has ended, but its transfer is still {state} after {_FINAL_S:g} s")
            self._leaving.wait(pause)
            pause = min(2 * pause, 2.0)
        self._check()


def _ask_again(error: PeerError, taken: bool) -> bool:
    """Whether to repeat the request for a transfer.

    Args:
        error: why there is no answer.
        taken: whether the service may have taken an earlier try. It may then be running the transfer, which nobody
            would read or cancel: a service that restarts meanwhile is waited for, one that never was there is not.
    """
    if isinstance(error, AuthenticationError):
        # A connection that is closed before the first answer mostly means that our certificate is refused, and then
        # it is closed again; a service that was killed does not do it twice.
        return error.answer_lost and not taken
    if isinstance(error, ServiceError):
        return error.retry
    return error.retry and (error.answer_lost or taken)
