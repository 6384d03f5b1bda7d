"""The command `lclstreamer`."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import traceback
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from lclstreamer import config as configuration
from lclstreamer import parallel
from lclstreamer.errors import ConfigurationError, EngineError
from lclstreamer.listing import listing

log = logging.getLogger("lclstreamer")

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")

HELP = """\
Read detector events, process them, and send them as messages to files or over the network.

What is read, how it is processed and where it goes stands in one YAML file, for example:

    source_identifier: files=run7.xtc2
    skip_incomplete_events: false
    event_source: {type: Psana2EventSource}
    data_sources:
      timestamp: {type: Psana2Timestamp}
      image: {type: Psana2DetectorInterface, psana_name: jungfrau, psana_fields: raw.raw, dtype: native}
    processing_pipeline: {type: BatchProcessingPipeline, batch_size: 10}
    data_serializer:
      type: HDF5BinarySerializer
      compression: bitshuffle_with_lz4
      fields: {timestamp: /data/timestamp, image: /data/image}
    data_handlers:
      - {type: BinaryDataStreamingDataHandler, urls: ["tcp://127.0.0.1:5000"], role: client, library: nng}

Several processes share the events when started by `mpiexec -n 4 lclstreamer --config run.yaml`.

Exit codes: 0 all events were sent and arrived · 1 failed while working · 2 wrong command line, configuration or data ·
3 an address cannot be listened at · 130 and 143 ended by SIGINT or SIGTERM before the data had ended. A signal lets the
messages already made leave first; a second one ends at once.
"""


@app.command(help=HELP.replace("\n    ", "\n\n    ", 1).replace("\n", "\n"))
def run(
    config: Annotated[
        Path, typer.Option("--config", "-c", help="The configuration, YAML or JSON.", show_default=True)
    ] = Path("lclstreamer.yaml"),
    num_events: Annotated[
        int, typer.Option("--num-events", "-n", min=0, help="Stop after so many events in all; 0 for all there are.")
    ] = 0,
    check: Annotated[
        bool, typer.Option("--check", help="Check the configuration, say what each rank would do, read nothing.")
    ] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of the configuration.")] = False,
    list_types: Annotated[bool, typer.Option("--list", help="Print every component type with its options.")] = False,
    describe: Annotated[
        str | None,
        typer.Option("--describe", metavar="SOURCE", help="Print as JSON what is in the data, e.g. files=run7.xtc2."),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            "--metrics",
            metavar="URL",
            help="Serve /metrics (Prometheus) and /status (JSON) at http://HOST:PORT + rank.",
        ),
    ] = None,
    progress: Annotated[float, typer.Option("--progress", min=0.1, help="Seconds between progress lines.")] = 5.0,
) -> None:
    """The command; see `HELP`."""
    if schema:
        typer.echo(json.dumps(configuration.schema(), indent=2))
    elif list_types:
        typer.echo(listing())
    elif describe is not None:
        _describe(describe)
    else:
        raise SystemExit(_stream(config, num_events or None, check, progress, metrics))


def _describe(source: str) -> None:
    _log_to_stderr(0, 1)
    try:
        from lclstreamer.sources.psana2_description import describe

        text = json.dumps(describe(source), indent=2)
    except EngineError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from None
    except ImportError as error:
        typer.echo(f"error: {error}; pip install 'lclstream[psana]'", err=True)
        raise SystemExit(2) from None
    typer.echo(text)


def _stream(config: Path, limit: int | None, check: bool, progress: float, metrics: str | None) -> int:
    try:
        ranks = parallel.connect()
    except EngineError as error:
        typer.echo(f"error: {error}", err=True)
        return error.exit_code
    _log_to_stderr(ranks.rank, ranks.size)
    engine = None
    server: AbstractContextManager[object] = nullcontext()
    code, text, plan = 0, "", []
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", configuration.ConfigurationWarning)
            parameters = configuration.load(config)
        if ranks.rank == 0:
            for warning in told:
                log.warning("%s: %s", config, warning.message)
        from lclstreamer.engine import Engine
        from lclstreamer.metrics import MetricsServer

        engine = Engine(parameters, rank=ranks.rank, size=ranks.size, limit=limit)
        if check:
            plan = engine.plan()
        else:
            _stop_on_signals(engine)
            if metrics is not None:
                server = made = MetricsServer(metrics, engine.counters)
                log.info("metrics at %s", made.url)
            engine.open()
    except EngineError as error:
        code, text = error.exit_code, str(error)
    except ImportError as error:
        code, text = 2, f"{error}; pip install 'lclstream[stream]'"
    except Exception:
        code, text = 1, traceback.format_exc()
    everybody = ranks.agree((code, text, plan))
    if any(one[0] for one in everybody):
        if engine is not None and not code and not check:
            engine.abandon()
        if ranks.rank == 0:
            _tell(everybody)
        return max(int(one[0]) for one in everybody)
    assert engine is not None
    if check:
        if ranks.rank == 0:
            for rank, (_, _, lines) in enumerate(everybody):
                typer.echo("\n".join(f"[rank {rank}] {line}" for line in lines))
            typer.echo(f"{config}: valid")
        return 0
    with server:
        return _run(engine, ranks, progress)


def _run(engine: object, ranks: parallel.Ranks, interval: float) -> int:
    from lclstreamer.engine import Engine
    from lclstreamer.progress import Counters, Reporter, total

    assert isinstance(engine, Engine)
    try:
        with Reporter(engine.counters, interval):
            counters = engine.run()
    except EngineError as error:
        log.error("%s", error)
        log.error("ended after %s", engine.counters.sentence())
        return _abort(ranks, error.exit_code)
    except Exception:
        log.error("%s", traceback.format_exc())
        return _abort(ranks, 1)
    everybody = ranks.gather(asdict(counters))
    if everybody is not None:
        each = [Counters(**one) for one in everybody]
        if ranks.size > 1:
            for one in each:
                typer.echo(f"[rank {one.rank}] sent {one.sentence()}")
        typer.echo(f"sent {total(each).sentence()}")
    if not counters.finished:
        log.warning("stopped by a signal before the data had ended; what was made has been sent")
        return 128 + _received[-1] if _received else 1
    return 0


def _abort(ranks: parallel.Ranks, code: int) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    ranks.abort(code)
    return code


_received: list[int] = []


def _stop_on_signals(engine: object) -> None:
    from lclstreamer.engine import Engine

    assert isinstance(engine, Engine)

    def stop(number: int, _: FrameType | None) -> None:
        if engine.stop.is_set():
            os._exit(128 + number)
        _received.append(number)
        engine.stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def _tell(everybody: list[tuple[int, str, list[str]]]) -> None:
    ranks_of: dict[str, list[int]] = {}
    for rank, (code, text, _) in enumerate(everybody):
        if code:
            ranks_of.setdefault(text, []).append(rank)
    for text, ranks in ranks_of.items():
        where = "" if len(ranks) == len(everybody) else f" (rank {', '.join(map(str, ranks))})"
        typer.echo(f"error{where}: {text}", err=True)


def _log_to_stderr(rank: int, size: int) -> None:
    who = f" [rank {rank}]" if size > 1 else ""
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format=f"%(asctime)s %(levelname)s{who} %(message)s", force=True
    )


def main() -> None:
    """Entry point of the console command."""
    try:
        app()
    except ConfigurationError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
