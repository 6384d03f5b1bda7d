"""The handler that writes every message to a file.

One thread writes, so that the disk works while the next message is made. A file has its final name only when it is
complete: whoever watches the folder never reads half a file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

from lclstreamer.errors import HandlerError
from lclstreamer.events import Message
from lclstreamer.handlers.base import Handler, HandlerContext, MessageQueue

#: The disk may take nothing for this long before the run is ended.
_STUCK_S = 300.0
_QUEUED = 2


class BinaryFileWritingDataHandler(Handler):
    """Writes ``<write_directory>/[prefix_]r<rank>_<number>.<suffix>``, numbers from 0."""

    def __init__(self, parameters: Any, context: HandlerContext) -> None:
        super().__init__(parameters, context)
        prefix = parameters.file_prefix
        self._prefix = f"{prefix}_" if prefix and not prefix.endswith("_") else prefix
        self._folder = Path(parameters.write_directory)
        self._queue = MessageQueue(_QUEUED, context.stop)
        self._thread = threading.Thread(target=self._work, name="file-writer", daemon=True)

    def open(self) -> None:
        """Make the folder.

        Raises:
            HandlerError: it cannot be made or written.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise HandlerError(
                f"data_handlers: write_directory {self._folder} cannot be made: {error.strerror}"
            ) from error
        if not os.access(self._folder, os.W_OK):
            raise HandlerError(f"data_handlers: write_directory {self._folder} cannot be written by this user")
        self._thread.start()

    def handle(self, message: Message) -> None:
        """Queue a message for writing."""
        self._queue.put(message, _STUCK_S, f"{self._folder}: the file system took nothing for {_STUCK_S:.0f} s")

    def close(self, *, drain: bool, timeout: float | None = None) -> None:
        """Write what is queued, and end the thread.

        Raises:
            HandlerError: a file could not be written, or not in time.
        """
        deadline = time.monotonic() + (_STUCK_S if timeout is None else timeout)
        if drain:
            self._queue.wait_empty(deadline)
        left = self._queue.close()
        if self._thread.is_alive():
            self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._queue.error is not None:
            raise self._queue.error
        # Of those taken, one whose file hangs on a slow disk has been written no more than those that still wait.
        left += len(self._queue)
        if left and drain:
            raise HandlerError(
                f"{self._folder}: {left} messages were not written in time: the file system is slow, or hangs"
            )

    def _work(self) -> None:
        while not (self._queue.closed or self._queue.error):
            message = self._queue.take()
            if message is None:
                continue
            path = self._folder / f"{self._prefix}r{self.context.rank}_{self.messages}.{self.parameters.file_suffix}"
            try:
                self._write(path, message)
            except OSError as error:
                hint = "; free space there or choose another write_directory" if error.errno == errno.ENOSPC else ""
                self._queue.fail(HandlerError(f"{path} cannot be written: {error.strerror or error}{hint}"))
            else:
                self.messages += 1
                self.nbytes += message.nbytes
            self._queue.done(message)

    def _write(self, path: Path, message: Message) -> None:
        partial = path.with_name(f".{path.name}.part")
        try:
            with partial.open("wb", buffering=0) as file:
                for part in message.parts:
                    view = part
                    while view.nbytes:
                        view = view[file.write(view) :]
                if self.parameters.fsync:
                    os.fsync(file.fileno())
            partial.replace(path)
            if self.parameters.fsync:
                folder = os.open(path.parent, os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
