"""`lclstream api`: the transfer service."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False)

EPILOG = """
Example: `lclstream api --config api.yaml`, with an api.yaml of two lines:
`credentials: /etc/lclstream/api` and `job_service: {url: "https://localhost:8447"}`

Exit codes: 0 stopped by a signal; 2 wrong option or configuration; 3 the address cannot be listened at, or the
database cannot be opened.
"""


@app.command(name="api", epilog=EPILOG)
def serve_api(
    config: Annotated[
        Path | None, typer.Option(help="Configuration file (YAML); options on the command line win over it.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen at.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen at.")] = None,
    credentials: Annotated[
        Path | None, typer.Option(help="Certificate folder of the service, as `certified` makes it.")
    ] = None,
    job_service: Annotated[
        str | None, typer.Option(help="URL of the job service that runs buffers and engines.")
    ] = None,
    database: Annotated[
        str | None,
        typer.Option(help="SQLAlchemy URL, such as sqlite:///transfers.sqlite or postgresql+psycopg://host/db."),
    ] = None,
    public_url: Annotated[
        str | None, typer.Option(help="URL under which the job service reaches us for callbacks.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Also say what is done at each step.")] = False,
) -> None:
    """Serve transfers: an engine configuration is POSTed, a buffer and an MPI engine job start, and a URI comes back.

    Everything is kept in a database. A service that was stopped or killed goes on where it was.
    """
    # Imported here, so that `lclstream --help` does not wait for the server's libraries.
    from sqlalchemy.exc import ArgumentError, OperationalError

    from lclstream.api import readers
    from lclstream.api.config import load_config
    from lclstream.api.launch import engine_certificates, issuer_of_status_readers
    from lclstream.api.service import create_app
    from lclstream.api.store import Store
    from lclstream.security.credentials import Credentials
    from lclstream.security.errors import CredentialsError
    from lclstream.security.roles import NOBODY, RolesFile
    from lclstream.security.server import serve

    logging.basicConfig(
        stream=sys.stderr,
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    for noisy in ("httpx", "httpcore", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        settings = load_config(
            config,
            host=host,
            port=port,
            credentials=None if credentials is None else str(credentials),
            database=database,
            public_url=public_url,
            **{"job_service.url": job_service},
        )
        member = Credentials(settings.credentials)
        issuer_of_status_readers(settings.buffer, settings.buffer.credentials or settings.credentials)
        roles = NOBODY if settings.roles is None else RolesFile(settings.roles).current
        if settings.ports.scheme == "tls+tcp":
            engine_certificates(settings)
            readers.check(settings, roles)
        store = Store(settings.database, settings.limit_s)
    except (CredentialsError, ArgumentError, ModuleNotFoundError, ValueError) as error:
        print(f"lclstream api: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    except (OperationalError, OSError) as error:
        print(f"lclstream api: the database cannot be opened: {error}", file=sys.stderr)
        raise typer.Exit(3) from error
    try:
        serve(
            create_app(settings, store),
            host=settings.host,
            port=settings.port,
            credentials=member,
            limits=settings.limits_of_requests,
        )
    finally:
        store.close()


if __name__ == "__main__":
    app()
