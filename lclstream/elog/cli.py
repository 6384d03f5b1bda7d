"""``lclstream elog``: the logbook stand-in as a service."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from lclstream.config_file import ConfigError
from lclstream.elog.config import ElogConfig, load
from lclstream.security.errors import CredentialsError

app = typer.Typer(add_completion=False)
log = logging.getLogger("lclstream.elog")


@app.command()
def elog(
    config: Annotated[Path | None, typer.Option(help="Configuration file (YAML).", dir_okay=False)] = None,
    credentials: Annotated[Path | None, typer.Option(help="Folder of the service's certificate.")] = None,
    kafka: Annotated[str | None, typer.Option(help="Kafka brokers, HOST:PORT[,HOST:PORT].")] = None,
    database: Annotated[str | None, typer.Option(help="SQLAlchemy URL, such as sqlite:///elog.sqlite.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen at.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port to listen at.")] = None,
) -> None:
    """An electronic logbook with the REST calls and Kafka messages of LCLS' own, for demonstrations and small sites.

    Runs start and end here (`lclstream run start EXPERIMENT`), and Kafka says so. Messages are kept in the database
    until the broker has them: a broker that is down delays them and loses none. Open the address in a browser that
    holds a certificate to see the runs.

    Example: lclstream elog --config elog.yaml --port 8448

    Exit codes: 0 stopped by a signal, 2 wrong command line or configuration, 3 the port is in use, or the database
    cannot be opened.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    options = {
        "credentials": credentials, "kafka.bootstrap_servers": kafka, "database": database, "host": host, "port": port
    }  # fmt: skip
    try:
        _serve(load(config, **options))
    except (ConfigError, CredentialsError) as error:
        log.error("%s", error)
        raise typer.Exit(2) from error


def _serve(settings: ElogConfig) -> None:
    # Not at the top: a wrong key in the configuration should be said at once, not after a second of imports.
    from sqlalchemy.exc import SQLAlchemyError

    from lclstream.elog.service import LIMITS, create_app
    from lclstream.security.server import serve

    try:
        application = create_app(settings)
    except SQLAlchemyError as error:
        log.error("database %s cannot be opened: %s", settings.database, error)
        raise typer.Exit(3) from error
    log.info("logbook at https://%s:%d, Kafka at %s", settings.host, settings.port, settings.kafka.bootstrap_servers)
    serve(
        application,
        host=settings.host,
        port=settings.port,
        credentials=application.state.credentials,
        limits=LIMITS.model_copy(update={"rate": settings.rate}),
    )


if __name__ == "__main__":
    app()
