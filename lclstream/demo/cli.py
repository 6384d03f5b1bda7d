"""`lclstream demo`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console

from lclstream.demo.story import Options, play

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


class _StopRequested(BaseException):
    """A stop signal arrived; not an Exception, so that no step takes it for its own failure."""

    def __init__(self, number: int) -> None:
        self.number = number


def _stop(number: int, _frame: FrameType | None) -> None:
    # A second Ctrl-C must not interrupt the cleaning up that the first one started.
    for later in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(later, signal.SIG_IGN)
    raise _StopRequested(number)


@app.command()
def demo(
    data: Annotated[
        Path | None,
        typer.Option(help="Stream this xtc2 file instead of a synthetic run.", exists=True, dir_okay=False),
    ] = None,
    kafka: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Use this Kafka broker instead of the embedded one.")
    ] = None,
    events: Annotated[int, typer.Option(min=1, help="Events of the synthetic run.")] = 200,
    ranks: Annotated[int, typer.Option(min=1, max=64, help="MPI ranks that read and send the run.")] = 2,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave everything running, to look around; Ctrl-C stops it.")
    ] = False,
    folder: Annotated[
        Path, typer.Option(help="Where to work; what an earlier demonstration left there is deleted.")
    ] = Path(".lclstream/demo"),
) -> None:
    """From an empty folder to an analysed run: the whole loop, on this machine.

    Makes certificates for two sites, writes a run, starts Kafka, the logbook, the transfer API, two job services, the
    run processor and Airflow, then starts a run on the logbook and watches what follows by itself. Everything is
    stopped at the end.

    Exit codes: 0 every event arrived exactly once and the DAG run succeeded · 1 it did not, and the last lines say
    why · 2 wrong options · 130, 143 stopped by Ctrl-C or SIGTERM.

    Example: `lclstream demo --keep --events 1000`
    """
    console = Console(highlight=False)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    try:
        summary = play(Options(data=data, kafka=kafka, events=events, ranks=ranks, keep=keep, folder=folder), console)
    except _StopRequested as stop:
        console.print(f"stopped by {signal.Signals(stop.number).name}: everything that was started has been ended")
        sys.exit(128 + stop.number)
    sys.exit(0 if summary.ok else 1)
