"""The ``nngstream`` command."""

from __future__ import annotations

import logging
import resource
import signal
import ssl
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from nngstream.buffer import Buffer
from nngstream.config import Tls, checked, load
from nngstream.errors import ConfigurationError, ListenError
from nngstream.lifecycle import State
from nngstream.tls import client_context

_HELP = """
A buffer in memory between parallel producers and consumers: first in, first out, each message to one consumer.

NNG (Push0/Pull0) and ZeroMQ (PUSH/PULL) programs may be mixed on one port, on both sides. When the memory is full, the
producers wait. When every producer that came has gone, the buffer gives away what it holds, tells the consumers
the end, and exits.

\b
Examples:
  nngstream --in tcp://*:5000 --out tcp://*:5001 --capacity 8GiB --status http://127.0.0.1:5002
  nngstream --in dial+tcp://dtn01:5001 --out ipc:///tmp/frames --sentinel 1

\b
Addresses: tcp://HOST:PORT, tls+tcp://HOST:PORT, ipc:///PATH listen (port 0 takes a free one, which is printed);
with dial+ before them they connect, and connect again when the connection breaks.

\b
Exit codes: 0 everything was given away; 2 wrong options; 3 an address cannot be listened at;
130 (SIGINT) or 143 (SIGTERM) ended by a signal with messages left that nobody took within --drain seconds: they are
dropped, or kept by --spill for the next start.
"""

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True, help=_HELP)
def main_command(
    context: typer.Context,
    inputs: Annotated[
        list[str] | None, typer.Option("--in", metavar="URL", help="Where producers come; may be repeated.")
    ] = None,
    outputs: Annotated[
        list[str] | None, typer.Option("--out", metavar="URL", help="Where consumers come; may be repeated.")
    ] = None,
    capacity: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory for messages, such as 8GiB. [1GiB]")
    ] = None,
    producers: Annotated[
        int | None, typer.Option(metavar="N", help="Producers that must have come before the end. [1]")
    ] = None,
    grace: Annotated[
        float | None, typer.Option(metavar="S", help="Seconds without any producer that are the end. [1]")
    ] = None,
    sentinel: Annotated[
        int | None, typer.Option(metavar="N", help="Empty messages to each ZeroMQ consumer at the end. [0]")
    ] = None,
    drain: Annotated[
        float | None, typer.Option(metavar="S", help="Seconds to give messages away after a stop signal. [10]")
    ] = None,
    silence: Annotated[
        float | None, typer.Option(metavar="S", help="Seconds a producer may pause inside a message. [60]")
    ] = None,
    send_buffer: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Kernel's buffer to a consumer: what may die with it. Far away: bandwidth x round trip. [256KiB]",
        ),
    ] = None,
    route: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Key in each message, OFFSET:TYPE such as 8:u32le: same key, same --out."),
    ] = None,
    spill: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where messages go while the memory is full or nobody takes them."),
    ] = None,
    spill_limit: Annotated[str | None, typer.Option(metavar="SIZE", help="Most bytes there. [the disk]")] = None,
    status: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Serve /status and /metrics: http:// on loopback, https:// with mutual TLS."),
    ] = None,
    tls_certificate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Our certificate (PEM), for tls+tcp and https.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its key (PEM, mode 0600).")] = None,
    tls_ca: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Issuers whose certificates are accepted (PEM).")
    ] = None,
    tls_producer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LOGIN[@ISSUER]", help="Only they may push; may be repeated. [whoever --tls-ca vouches for]"
        ),
    ] = None,
    tls_consumer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LOGIN[@ISSUER]", help="Only they may pull; may be repeated. [whoever --tls-ca vouches for]"
        ),
    ] = None,
    summary: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the last status document here.")] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name in status, metrics and to other buffers. [nngstream]")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML file with these options; those given here override it.")
    ] = None,
    log_level: Annotated[str, typer.Option(metavar="LEVEL", help="debug, info, warning or error.")] = "info",
) -> None:
    """Run a buffer."""
    if context.invoked_subcommand is not None:
        return
    options = {
        "in": inputs or None,
        "out": outputs or None,
        "capacity": capacity,
        "producers": producers,
        "grace": grace,
        "sentinel": sentinel,
        "drain": drain,
        "silence": silence,
        "send_buffer": send_buffer,
        "route": route,
        "spill": spill,
        "spill_limit": spill_limit,
        "status": status,
        "summary": summary,
        "name": name,
    }
    encryption = {
        "certificate": tls_certificate,
        "key": tls_key,
        "ca": tls_ca,
        "producers": tls_producer or None,
        "consumers": tls_consumer or None,
    }
    try:
        _start_logging(log_level)
        raise typer.Exit(_run(options, encryption, config))
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from error
    except ListenError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(3) from error


@app.command("top")
def top_command(
    urls: Annotated[list[str], typer.Argument(metavar="URL...", help="What --status printed, of one or more buffers.")],
    interval: Annotated[float, typer.Option(metavar="S", min=0.1, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print the view once, and exit.")] = False,
    tls_certificate: Annotated[Path | None, typer.Option(metavar="FILE", help="Our certificate, for https.")] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its key.")] = None,
    tls_ca: Annotated[Path | None, typer.Option(metavar="FILE", help="Issuers of the buffers' certificates.")] = None,
) -> None:
    """Live view of running buffers: where the data are, how fast, and what they wait for.

    Example: nngstream top http://127.0.0.1:5002

    Exit codes: 0 the buffers have ended, or Ctrl-C; 2 wrong options; 3 no buffer answers.
    """
    from nngstream.top import Source, show  # here: a buffer starts faster without the terminal library

    context = None
    try:
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise ConfigurationError(f"{url!r} is no status address: it begins with http:// or https://")
        if any(url.startswith("https://") for url in urls):
            if tls_certificate is None or tls_key is None or tls_ca is None:
                raise ConfigurationError("https:// needs --tls-certificate, --tls-key and --tls-ca")
            files = Tls(certificate=tls_certificate, key=tls_key, ca=tls_ca)
            context = client_context(files, minimum=ssl.TLSVersion.TLSv1_3)
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from error
    raise typer.Exit(show([Source(url, context) for url in urls], interval, once=once))


def _run(options: dict[str, Any], encryption: dict[str, Any], config: Path | None) -> int:
    values = load(config) if config is not None else {}
    values |= {key: value for key, value in options.items() if value is not None}
    given = {key: value for key, value in encryption.items() if value is not None}
    if given:
        values["tls"] = {**(values.get("tls") or {}), **given}
    if config is None and not ("in" in values and "out" in values):
        raise ConfigurationError("--in and --out are needed (or --config); `nngstream --help` shows examples")
    buffer = Buffer(checked(values, str(config) if config is not None else "options"))
    _allow_many_files()
    buffer.start()
    stopped_by = _stop_on_signals(buffer)
    for side, urls in (("in", buffer.inputs), ("out", buffer.outputs), ("status", [buffer.status_url])):
        for each in urls:
            if each is not None:
                print(side, each, flush=True)
    state = buffer.run()
    return 0 if state is State.DONE or not stopped_by else 128 + stopped_by[0]


def _stop_on_signals(buffer: Buffer) -> list[int]:
    """Stop the buffer on SIGINT and SIGTERM; the returned list tells which came."""
    came: list[int] = []

    def stop(number: int, _frame: object) -> None:
        came.append(number)
        buffer.stop()

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    return came


def _allow_many_files() -> None:
    """A connection is a file: the soft limit of 1024 is often all that hinders more."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _start_logging(level: str) -> None:
    if level not in ("debug", "info", "warning", "error"):
        raise ConfigurationError(f"--log-level: {level!r} is none of debug, info, warning, error")
    logging.basicConfig(
        level=level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )


def main() -> None:
    """Entry point of the console command."""
    app(prog_name="nngstream")
