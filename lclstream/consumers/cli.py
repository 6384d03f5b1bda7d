"""`lclstream consume`: analyses of a stream."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from lclstream.client.encryption import context_for
from lclstream.client.errors import AddressError
from lclstream.client.pulling import CONNECT_TIMEOUT_S, TIMEOUT_S, pull
from lclstream.consumers.following import follow
from lclstream.consumers.gain import GainBits
from lclstream.consumers.run_summary import RunSummary, Settings
from lclstream.consumers.summary_file import ResultFile, document, write_document
from lclstream.security.errors import CredentialsError

_log = logging.getLogger(__name__)

app = typer.Typer(name="consume", add_completion=False, no_args_is_help=True, help="Analyse a stream while it arrives.")


@app.callback()
def _group() -> None:
    """Analyse a stream while it arrives."""


@app.command("run-summary")
def run_summary(
    url: Annotated[list[str], typer.Option("--url", help="Where to pull from; repeat it for several buffers.")],
    output_dir: Annotated[
        Path, typer.Option("--output-dir", help="Folder for result.json, result.h5 and result.png; made when missing.")
    ] = Path(),
    library: Annotated[Literal["nng", "zmq"], typer.Option(help="Protocol of the stream.")] = "nng",
    listen: Annotated[bool, typer.Option("--listen", help="Wait for senders at --url instead of dialling it.")] = False,
    image: Annotated[str | None, typer.Option(help="Dataset of the detector. Default: the largest one.")] = None,
    scalar: Annotated[
        str | None, typer.Option(help="Dataset with one number an event. Default: one that sounds like an energy.")
    ] = None,
    timestamp: Annotated[
        str | None, typer.Option(help="Dataset of event times. Default: the one the engine writes in nanoseconds.")
    ] = None,
    gain_bits: Annotated[
        GainBits,
        typer.Option(
            help="Bits 14 and 15 of raw Jungfrau pixels: mask them, keep them, or mask where it is a Jungfrau."
        ),
    ] = GainBits.AUTO,
    threshold: Annotated[float, typer.Option(min=1, help="Peaks: sigma above the local background.")] = 8.0,
    hit_peaks: Annotated[int, typer.Option(min=1, help="Peaks from which an event counts as a hit.")] = 10,
    timeout: Annotated[float, typer.Option(min=0.1, help="Longest silence of the stream, in seconds.")] = TIMEOUT_S,
    connect_timeout: Annotated[
        float, typer.Option(min=0.1, help="Longest wait for the first connection, in seconds.")
    ] = CONNECT_TIMEOUT_S,
    connections: Annotated[int, typer.Option(min=1, help="Connections to each --url.")] = 1,
    credentials: Annotated[
        Path | None,
        typer.Option(
            envvar="LCLSTREAM_CREDENTIALS", help="Folder of your certificate; needed for tls+tcp:// addresses."
        ),
    ] = None,
) -> None:
    """Sum image, peaks, pulse energies and hit rate of a run, while it streams.

    For example:

        lclstream consume run-summary --url tcp://buffer.example.org:5001 --output-dir run7

    Writes result.json (numbers), result.h5 (images, histograms, a row for each event) and result.png. What was analysed
    is written also when the stream breaks or a signal comes, and is then marked as incomplete.

    Exit codes: 0 whole stream analysed; 1 stream broken or unreadable; 2 wrong command line; 3 nobody to pull from;
    130, 143 ended by SIGINT, SIGTERM.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if find_spec("matplotlib") is None:
        _log.error("the picture needs matplotlib: pip install 'lclstream[plot]'")
        raise typer.Exit(2)
    try:
        puller = pull(
            url,
            library=library,
            listen=listen,
            timeout_s=timeout,
            connect_timeout_s=connect_timeout,
            connections=connections,
            tls=context_for(url, credentials, listen=listen),
        )
        output_dir.mkdir(parents=True, exist_ok=True)
    except (AddressError, CredentialsError, OSError) as error:
        _log.error("%s", error)
        raise typer.Exit(2) from error
    settings = Settings(image, scalar, timestamp, gain_bits, threshold, hit_peaks)
    with ResultFile(output_dir / "result.h5") as table:
        summary = RunSummary(settings, table)
        outcome = follow(
            puller,
            summary,
            report=lambda: f"hits {summary.hits}/{summary.image_events}" if summary.image_events else "",
        )
        result = document(summary, puller.statistics, complete=outcome.complete, reason=outcome.reason)
        if summary.events:
            table.finish(summary, result)
    # Before the picture: the numbers are what others wait for.
    write_document(result, output_dir / "result.json")
    if summary.events:
        from lclstream.consumers.summary_figure import draw

        draw(summary, result, output_dir / "result.png")
    _log.info("wrote result.json%s in %s", ", result.h5, result.png" if summary.events else "", output_dir)
    raise typer.Exit(outcome.exit_code)


if __name__ == "__main__":
    app()
