"""``lclstream kafka``: the embedded broker in a process of its own."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from typing import Annotated

import typer

from lclstream.kafka.embedded import TOPICS, EmbeddedKafka, EmbeddedKafkaError

app = typer.Typer(add_completion=False)
log = logging.getLogger("lclstream.kafka")


def _write_atomically(path: Path, text: str) -> None:
    # Whoever waits for the file reads it the moment it appears: it must be complete then.
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text)
    part.replace(path)


@app.command()
def kafka(
    port_file: Annotated[
        Path | None, typer.Option(help="File that gets the address HOST:PORT once the broker answers.", dir_okay=False)
    ] = None,
    topics: Annotated[str, typer.Option(help="Topics to make, separated by commas.")] = ",".join(TOPICS),
    partitions: Annotated[int, typer.Option(min=1, help="Partitions of each of them.")] = 1,
) -> None:
    """A Kafka broker for demonstrations and tests: in memory, loopback only, gone when it ends.

    It prints its address, HOST:PORT on a free port, and runs until SIGINT or SIGTERM. Use a real broker wherever a
    message must outlive a process.

    Example: lclstream kafka --port-file kafka.address --topics runs,file_catalog

    Exit codes: 0 stopped by a signal, 2 wrong command line, 3 the broker cannot be started.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Blocked before the broker's thread exists, so that a signal waits for sigwait() and ends us in order.
    stop_signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals)
    names = [name.strip() for name in topics.split(",") if name.strip()]
    try:
        broker = EmbeddedKafka(names, partitions=partitions)
    except EmbeddedKafkaError as error:
        log.error("%s", error)
        raise typer.Exit(3) from error
    with broker:
        typer.echo(broker.bootstrap_servers)
        log.info(
            "broker at %s, topics %s, %d partition(s) each", broker.bootstrap_servers, ", ".join(names), partitions
        )
        try:
            if port_file is not None:
                _write_atomically(port_file, broker.bootstrap_servers + "\n")
        except OSError as error:
            log.error("--port-file %s: %s", port_file, error.strerror)
            raise typer.Exit(2) from error
        received = signal.sigwait(stop_signals)
        log.info("stopped by %s", signal.Signals(received).name)
    if port_file is not None:
        port_file.unlink(missing_ok=True)


if __name__ == "__main__":
    app()
