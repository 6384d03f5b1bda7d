"""``lclstream jobs``: the job service."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from lclstream.config_file import ConfigError
from lclstream.jobs.app import PREFIX, create_app
from lclstream.jobs.config import load
from lclstream.jobs.engine import Engine, PrefixInUseError
from lclstream.security.credentials import Credentials
from lclstream.security.errors import CredentialsError
from lclstream.security.server import serve

app = typer.Typer(add_completion=False)
log = logging.getLogger("lclstream.jobs")


@app.command()
def jobs(
    config: Annotated[Path | None, typer.Option(help="Configuration file (YAML).", dir_okay=False)] = None,
    credentials: Annotated[Path | None, typer.Option(help="Folder of the service's certificate.")] = None,
    prefix: Annotated[Path | None, typer.Option(help="Folder that holds one folder a job.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen at.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port to listen at.")] = None,
    cancel_jobs_on_exit: Annotated[
        bool | None,
        typer.Option(
            "--cancel-jobs-on-exit/--keep-jobs-on-exit",
            help="Whether stopping the service ends its jobs; by default they keep running.",
        ),
    ] = None,
) -> None:
    """Batch jobs over REST, in the formats of Psi-k: submit a script, follow its states, fetch its files.

    Every job is a folder below the prefix, which the published `psik ls` shows too. Jobs outlive the service: after a
    restart, or after a crash, it finds them and says what became of them. Options override the configuration file.

    Example: lclstream jobs --config jobs.yaml --port 8447

    Exit codes: 0 stopped by a signal, 1 it could not start, 2 wrong command line or configuration, 3 the port is in
    use, or another service works in the same folder.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        settings = load(
            config,
            credentials=credentials,
            prefix=prefix,
            host=host,
            port=port,
            cancel_jobs_on_exit=cancel_jobs_on_exit,
        )
        identity = Credentials(settings.credentials)
        # Read here as well: a folder that cannot be used must not become a traceback of the server's.
        identity.server_context()
    except (ConfigError, CredentialsError) as error:
        log.error("%s", error)
        raise typer.Exit(2) from error
    try:
        engine = Engine(settings, identity)
    except (ConfigError, CredentialsError) as error:
        log.error("%s", error)
        raise typer.Exit(2) from error
    except PrefixInUseError as error:
        log.error("%s", error)
        raise typer.Exit(3) from error
    except OSError as error:
        log.error("prefix %s cannot be used: %s", settings.prefix, error)
        raise typer.Exit(2) from error
    log.info("jobs at https://%s:%d/v2, folders in %s", settings.listen.host, settings.listen.port, engine.prefix)
    serve(
        create_app(engine),
        host=settings.listen.host,
        port=settings.listen.port,
        credentials=identity,
        limits=settings.limits.of_requests(PREFIX),
        access_log_file=settings.access_log,
    )


if __name__ == "__main__":
    app()
