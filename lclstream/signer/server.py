"""The signer's socket.

The event loop of :func:`serve` owns the socket and one task a connection; one thread beside it owns the
:class:`.service.Signer`, so that requests are answered one after the other. :func:`serve` returns when SIGINT or
SIGTERM arrives and the request under way is answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import stat
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lclstream.config_file import ConfigError
from lclstream.signer.peer import Peer, peer_of
from lclstream.signer.service import Signer
from lclstream.signer.wire import REQUEST_BYTES, Answer

log = logging.getLogger(__name__)

#: Seconds a peer may take to send its request, and to take its answer.
TALK_S = 10.0
#: Connections of one user at once, so that nobody keeps the others waiting.
_MOST_OF_ONE = 8
#: Seconds between two looks at the lists of revoked certificates, which somebody may have changed or removed.
_PUBLISH_S = 60.0


class InUseError(OSError):
    """Another signer listens at the same socket."""


def listen(path: Path) -> socket.socket:
    """A listening UNIX socket that everybody on the machine may connect to.

    Raises:
        ConfigError: others could put their own socket in its place.
        InUseError: another signer listens there.
        OSError: the socket cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    folder = path.parent.stat()
    if stat.S_IMODE(folder.st_mode) & 0o022 or folder.st_uid not in (0, os.geteuid()):
        raise ConfigError(
            f"{path.parent}: others can write there and put their own socket in place of ours: "
            "choose a folder that only root or the signer's user can write to (`socket`)"
        )
    if path.exists() or path.is_symlink():
        if not path.is_socket():
            raise ConfigError(f"{path} is there and is no socket: choose another name (`socket`), or remove it")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(2)
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                # Left behind by a signer that was killed.
                path.unlink()
            except OSError as error:
                raise InUseError(f"{path} is in use: {error}") from error
            else:
                raise InUseError(f"{path} is in use: another signer listens there")
    listening = socket.socket(socket.AF_UNIX)
    try:
        listening.bind(str(path))
        path.chmod(0o666)
        listening.listen()
    except BaseException:
        listening.close()
        raise
    return listening


async def serve(
    signer: Signer, listening: socket.socket, *, stop: asyncio.Event | None = None, talk_s: float = TALK_S
) -> None:
    """Answer until it is told to stop, then remove the socket.

    Args:
        signer: what answers.
        listening: from :func:`listen`.
        stop: ends it; SIGINT and SIGTERM do when None.
        talk_s: seconds a peer may take to send its request, and to take its answer.
    """
    path = Path(listening.getsockname())
    made = path.stat().st_ino
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM) if stop is None else ()
    stop = stop or asyncio.Event()
    for number in signals:
        loop.add_signal_handler(number, stop.set)
    open_of: Counter[int] = Counter()
    talks: set[asyncio.Task[None]] = set()

    with ThreadPoolExecutor(1, "signer") as worker:

        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            talks.add(task)
            peer = None
            try:
                peer = peer_of(writer.get_extra_info("socket"))
                open_of[peer.uid] += 1
                if open_of[peer.uid] <= _MOST_OF_ONE:
                    await _talk(signer, worker, peer, reader, writer, talk_s)
            except OSError as error:
                log.info("a connection broke: %s", error)
            finally:
                talks.discard(task)
                writer.transport.abort()
                if peer is not None:
                    open_of[peer.uid] -= 1
                    if not open_of[peer.uid]:
                        del open_of[peer.uid]

        async def publish() -> None:
            while True:
                await loop.run_in_executor(worker, signer.publish)
                await asyncio.sleep(_PUBLISH_S)

        server = await asyncio.start_unix_server(talk, sock=listening, limit=REQUEST_BYTES)
        publishing = asyncio.create_task(publish())
        log.info("listening at %s", path)
        try:
            await stop.wait()
        finally:
            publishing.cancel()
            server.close()
            if talks:
                await asyncio.wait(talks, timeout=2)
            for task in set(talks):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await publishing
            with contextlib.suppress(FileNotFoundError):
                # Not the socket of a successor.
                if path.stat().st_ino == made:
                    path.unlink()
            for number in signals:
                loop.remove_signal_handler(number)
    log.info("stopped")


async def _talk(
    signer: Signer,
    worker: ThreadPoolExecutor,
    peer: Peer,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    talk_s: float,
) -> None:
    try:
        try:
            async with asyncio.timeout(talk_s):
                line = await reader.readuntil(b"\n")
        except asyncio.LimitOverrunError:
            answer = Answer(ok=False, rule="form", detail=f"a request has at most {REQUEST_BYTES} bytes")
        except asyncio.IncompleteReadError:
            return
        else:
            answer = await asyncio.get_running_loop().run_in_executor(worker, signer.answer, peer, line)
        writer.write(answer.line())
        async with asyncio.timeout(talk_s):
            await writer.drain()
    except TimeoutError:
        log.info("a peer did not say or take anything for %g s: connection cut", talk_s)
    finally:
        writer.close()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(talk_s):
                await writer.wait_closed()
