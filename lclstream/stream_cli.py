"""`lclstream get`, `lclstream pull` and `lclstream push`."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import typer
import yaml

from lclstream.client.encryption import context_for
from lclstream.client.errors import AddressError, ListenError, NoPeerError, StreamError, WrongPeerError
from lclstream.client.pulling import CONNECT_TIMEOUT_S, TIMEOUT_S, pull
from lclstream.client.pushing import push
from lclstream.client.saving import FolderWriter, TarWriter, Writer
from lclstream.client.statistics import Statistics
from lclstream.client.stopping import StoppedBySignal, Stopping
from lclstream.security.errors import AuthenticationError, CredentialsError, PeerError, ServiceError, UnreachableError

_log = logging.getLogger(__name__)
_FIRST_REPORT_S, _LONGEST_REPORT_S = 2.0, 30.0

get_app = typer.Typer(add_completion=False)
pull_app = typer.Typer(add_completion=False)
push_app = typer.Typer(add_completion=False)

_Library = Annotated[Literal["nng", "zmq"], typer.Option(help="Protocol of the stream.")]
_Names = Annotated[str, typer.Option(help="Names of the files, with one number in them (%d, %05d, %x).")]
_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only errors on stderr.")]
_OutputDir = Annotated[
    Path | None, typer.Option(help="Write a file for each message into this folder instead of tar to stdout.")
]
_Timeout = Annotated[float, typer.Option(min=0.1, help="Longest silence of the stream, in seconds.")]
_ConnectTimeout = Annotated[float, typer.Option(min=0.1, help="Longest wait for the first connection, in seconds.")]
_Credentials = Annotated[
    Path | None,
    typer.Option(envvar="LCLSTREAM_CREDENTIALS", help="Folder of your certificate; needed for tls+tcp:// addresses."),
]


class _Progress:
    """A line on stderr now and then: how much, how fast."""

    def __init__(self, statistics: Callable[[], Statistics], verb: str) -> None:
        self._statistics = statistics
        self._verb = verb
        self._pause = _FIRST_REPORT_S
        self._due = time.monotonic() + self._pause

    def tick(self) -> None:
        if time.monotonic() >= self._due:
            self.say()
            self._pause = min(2 * self._pause, _LONGEST_REPORT_S)
            self._due = time.monotonic() + self._pause

    def say(self) -> None:
        _log.info("%s %s", self._verb, self._statistics())


def _run(work: Callable[[Stopping], None], *, quiet: bool) -> None:
    """Run a command's work; what goes wrong becomes one line and an exit code."""
    level = logging.WARNING if quiet else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # One line for each of our own calls is noise in a program that polls.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    stopping = Stopping()
    try:
        with stopping:
            work(stopping)
    except StoppedBySignal as signal:
        _log.warning("%s", signal)
        code = 128 + signal.number
    except (AddressError, CredentialsError) as error:
        _log.error("%s", error)
        code = 2
    except (NoPeerError, WrongPeerError, ListenError, AuthenticationError, UnreachableError) as error:
        _log.error("%s", error)
        code = 3
    except ServiceError as error:
        _log.error("%s", error)
        code = 2 if error.status in (400, 413, 422) else 1
    except BrokenPipeError:
        _log.error("the program that reads our output has gone")
        # Or the interpreter, flushing at its end, complains about the pipe once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except (StreamError, PeerError, OSError) as error:
        _log.error("%s", error)
        code = 1
    else:
        return
    raise typer.Exit(code)


def _writer(output_dir: Path | None, names: str) -> Writer:
    if output_dir is not None:
        return FolderWriter(output_dir, names)
    output: BinaryIO = sys.stdout.buffer
    if output.isatty():
        raise AddressError("messages would go to your terminal: pipe them (… | tar xf -) or give --output-dir FOLDER")
    return TarWriter(output, names)


def _store(messages: Iterable[bytes], writer: Writer, progress: _Progress) -> None:
    """Write messages until they end; what came is readable also when they end by an error."""
    try:
        for number, message in enumerate(messages):
            writer.write(number, message)
            progress.tick()
    except BrokenPipeError:
        raise
    except BaseException:
        writer.close()
        raise
    writer.close()


@pull_app.command()
def pull_command(
    dial: Annotated[
        list[str] | None, typer.Option("--dial", "-d", help="Address to pull from; repeat it for several buffers.")
    ] = None,
    listen: Annotated[str | None, typer.Option("--listen", "-l", help="Address at which senders find us.")] = None,
    ndial: Annotated[int | None, typer.Option("--ndial", "-n", min=1, help="Connections to each --dial.")] = None,
    names: _Names = "%05d.h5",
    quiet: _Quiet = False,
    output_dir: _OutputDir = None,
    library: _Library = "nng",
    timeout: _Timeout = TIMEOUT_S,
    connect_timeout: _ConnectTimeout = CONNECT_TIMEOUT_S,
    producers: Annotated[
        int, typer.Option(min=1, help="With --listen: senders that must have come before the stream can end.")
    ] = 1,
    reconnect: Annotated[
        float, typer.Option(min=0, help="How long a connection that broke is dialled again, in seconds.")
    ] = 0.0,
    sentinel: Annotated[
        bool,
        typer.Option("--sentinel", help="ZeroMQ: only an empty message is the end; a disconnection is a break."),
    ] = False,
    credentials: _Credentials = None,
) -> None:
    """Receive the messages of a stream, as a tar archive on stdout or as files in a folder.

    Examples:
        lclstream pull --dial tcp://buffer.example.org:5001 | tar xf -

        lclstream pull --dial tcp://buffer.example.org:5001 --output-dir run7

    Exit codes: 0 the whole stream was received; 1 it broke or fell silent (what came before is written);
    2 wrong command line; 3 nobody to pull from; 130, 143 ended by SIGINT, SIGTERM.
    """

    def work(stopping: Stopping) -> None:
        if (dial is None) == (listen is None):
            raise AddressError("give either --dial URL or --listen URL")
        if listen is not None and ndial is not None:
            raise AddressError("--ndial is for --dial: a listener takes every connection")
        urls = [listen] if listen is not None else dial or []
        puller = pull(
            urls,
            library=library,
            listen=listen is not None,
            timeout_s=timeout,
            connect_timeout_s=connect_timeout,
            connections=ndial or 1,
            producers=producers,
            reconnect_s=reconnect,
            sentinel=sentinel,
            tls=context_for(urls, credentials, listen=listen is not None),
        )
        writer = _writer(output_dir, names)
        progress = _Progress(lambda: puller.statistics, "received")

        def messages() -> Iterator[bytes]:
            with stopping.interruptible():
                puller.open()
            _log.info("pulling from %s", ", ".join(puller.urls))
            while True:
                with stopping.interruptible():
                    message = puller.receive()
                if message is None:
                    return
                yield message

        try:
            _store(messages(), writer, progress)
        finally:
            puller.close()
            progress.say()

    _run(work, quiet=quiet)


@get_app.command()
def get_command(
    config: Annotated[Path, typer.Argument(help="Engine configuration (YAML, or JSON by the ending .json).")],
    server: Annotated[
        str, typer.Option(envvar="LCLSTREAM_SERVER", help="The transfer service.")
    ] = "https://sdfdtn003.slac.stanford.edu:4433",
    credentials: Annotated[
        Path, typer.Option(envvar="LCLSTREAM_CREDENTIALS", help="Folder of your certificate.")
    ] = Path("~/.certified"),
    names: _Names = "%05d.h5",
    quiet: _Quiet = False,
    output_dir: _OutputDir = None,
    library: _Library = "nng",
    ranks: Annotated[int | None, typer.Option(min=1, help="MPI ranks of the engine. Default: the service's.")] = None,
    lease: Annotated[
        float, typer.Option(min=0, help="Seconds after which the transfer ends if we vanish; 0: no lease.")
    ] = 60.0,
    timeout: _Timeout = TIMEOUT_S,
    connect_timeout: _ConnectTimeout = 4 * CONNECT_TIMEOUT_S,
) -> None:
    """Ask for a stream, and receive it as a tar archive on stdout or as files in a folder.

    Examples:
        lclstream get lclstreamer.yaml --server https://dtn.example.org:8446 | tar xf -

        lclstream get lclstreamer.yaml --server https://dtn.example.org:8446 --output-dir run7

    The transfer is cancelled when this program ends before the stream does. The lease is renewed meanwhile; a service
    that knows no leases needs --lease 0.

    Exit codes: 0 the whole stream was received; 1 it broke, or the transfer failed; 2 wrong command line or
    configuration; 3 the service or the buffer cannot be reached; 130, 143 ended by SIGINT, SIGTERM.
    """

    def work(stopping: Stopping) -> None:
        from lclstream.api.client import TransferClient
        from lclstream.client.transferring import Transfer

        document = _configuration(config)
        writer = _writer(output_dir, names)
        with (
            TransferClient(server, credentials) as api,
            Transfer(
                api,
                document,
                lease_s=lease or None,
                ranks=ranks,
                library=library,
                timeout_s=timeout,
                connect_timeout_s=connect_timeout,
                credentials=credentials,
                interruptible=stopping.interruptible,
            ) as transfer,
        ):
            progress = _Progress(lambda: transfer.statistics, "received")
            try:
                _store(transfer.messages(), writer, progress)
            finally:
                progress.say()

    _run(work, quiet=quiet)


def _configuration(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
        document = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise AddressError(f"configuration {path}: {error}") from error
    if not isinstance(document, dict):
        raise AddressError(f"configuration {path} holds {type(document).__name__}, not a mapping of sections")
    return document


@push_app.command()
def push_command(
    files: Annotated[list[Path], typer.Argument(help="Files, or folders whose files are sent in the order of names.")],
    addr: Annotated[str, typer.Option(help="Address to dial (--ndial > 0) or to listen at.")] = "tcp://127.0.0.1:3030",
    ndial: Annotated[
        int, typer.Option("--ndial", "-n", min=0, help="Connections to dial; 0: listen for receivers.")
    ] = 0,
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="Messages per second. Default: as fast as taken.")
    ] = None,
    loop: Annotated[int, typer.Option(min=0, help="Times everything is sent; 0: until a signal comes.")] = 1,
    library: _Library = "nng",
    quiet: _Quiet = False,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Longest time nobody takes a message, in seconds.")
    ] = TIMEOUT_S,
    connect_timeout: _ConnectTimeout = CONNECT_TIMEOUT_S,
    reconnect: Annotated[
        float, typer.Option(min=0, help="How long a receiver that has gone is dialled again, in seconds.")
    ] = 0.0,
    credentials: _Credentials = None,
) -> None:
    """Send files as the messages of a stream, for example to replay a run without a beamline.

    Examples:
        lclstream push run7/ --addr tcp://127.0.0.1:5000 --ndial 1 --rate 12

        lclstream push a.h5 b.h5 --addr tcp://0.0.0.0:3030

    The program ends when everything has left this machine.

    Exit codes: 0 everything has been sent; 1 receivers went away or took nothing; 2 wrong command line; 3 nobody to
    send to, or the address is taken; 130, 143 ended by SIGINT, SIGTERM.
    """

    def work(stopping: Stopping) -> None:
        paths = _in_order(files)
        listen = ndial == 0
        pusher = push(
            addr,
            library=library,
            listen=listen,
            timeout_s=timeout,
            connect_timeout_s=connect_timeout,
            connections=max(1, ndial),
            reconnect_s=reconnect,
            tls=context_for([addr], credentials, listen=listen),
        )
        progress = _Progress(lambda: pusher.statistics, "sent")
        try:
            with stopping.interruptible(), pusher:
                _log.info("%d files to %s", len(paths), ", ".join(pusher.urls))
                for message in _paced(_contents(paths, loop), rate):
                    pusher.send(message)
                    progress.tick()
        finally:
            progress.say()

    _run(work, quiet=quiet)


def _in_order(given: list[Path]) -> list[Path]:
    """The files to send: those named, and those in named folders with numbers in their natural order."""
    paths: list[Path] = []
    for path in given:
        if path.is_dir():
            inside = [each for each in path.iterdir() if each.is_file() and not each.name.startswith(".")]
            if not inside:
                raise AddressError(f"folder {path} holds no files to send")
            paths.extend(sorted(inside, key=_natural))
        elif path.is_file():
            paths.append(path)
        else:
            raise AddressError(f"{path} is no file and no folder")
    return paths


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort key in which ``9.h5`` comes before ``10.h5``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name) if part]


def _contents(paths: list[Path], loop: int) -> Iterator[bytes]:
    turn = 0
    while not loop or turn < loop:
        for path in paths:
            yield path.read_bytes()
        turn += 1


def _paced(messages: Iterable[bytes], rate: float | None) -> Iterator[bytes]:
    """Messages no faster than `rate` per second; a receiver that was slow for a while is not flooded afterwards."""
    due = time.monotonic()
    for message in messages:
        if rate is not None:
            now = time.monotonic()
            if now < due:
                time.sleep(due - now)
            due = max(due, now - 1 / rate) + 1 / rate
        yield message
