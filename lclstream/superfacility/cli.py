"""``lclstream superfacility``: a stand-in of NERSC's Superfacility API."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lclstream.config_file import ConfigError
from lclstream.jobs.engine import PrefixInUseError
from lclstream.security.access import AccessLog
from lclstream.security.limits import LimitRequests, Limits
from lclstream.superfacility.compute import make_engine
from lclstream.superfacility.config import API_PATH, TOKEN_PATH, SuperfacilityConfig, load
from lclstream.superfacility.keys import make_client
from lclstream.superfacility.service import create_app

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="""A stand-in of NERSC's Superfacility API, for the published client `sfapi_client`: tests, demonstrations.

    Make a client, write its id into the configuration, serve.

    Exit codes: 0 done, or stopped by a signal; 2 wrong command line or configuration; 3 the port or the folder is in
    use.
    """,
)
log = logging.getLogger("lclstream.superfacility")

#: Seconds requests under way may take after a stop signal.
_GRACEFUL_STOP_S = 5


def _fail(code: int, message: object) -> typer.Exit:
    print(f"lclstream superfacility: {message}", file=sys.stderr)
    return typer.Exit(code)


@app.command()
def client(
    name: Annotated[str, typer.Argument(help="File name of the key, without its end.")],
    folder: Annotated[Path, typer.Option(help="Where the two halves are written.")] = Path(),
) -> None:
    """Make a client: NAME.pem (secret, mode 0600, for `sfapi_client`) and NAME.pub (for the service).

    Example: lclstream superfacility client airflow --folder ~/.superfacility
    """
    try:
        client_id, secret, public = make_client(folder, name)
    except OSError as error:
        raise _fail(2, error) from error
    print(f"client id: {client_id}\nsecret key: {secret}\npublic key: {public}")


@app.command()
def serve(
    config: Annotated[Path, typer.Option(help="Configuration file (YAML).", dir_okay=False)],
) -> None:
    """Serve until a signal comes. Jobs outlive the service, unless the configuration says otherwise.

    Example: lclstream superfacility serve --config superfacility.yaml
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        settings = load(config)
        settings.public_keys()
        engine = make_engine(settings)
    except ConfigError as error:
        raise _fail(2, error) from error
    except PrefixInUseError as error:
        raise _fail(3, error) from error
    except OSError as error:
        raise _fail(2, f"{config}: {error}") from error
    listen = settings.listen
    try:
        listening = socket.create_server(
            (listen.host, listen.port), family=socket.AF_INET6 if ":" in listen.host else socket.AF_INET
        )
    except OSError as error:
        raise _fail(3, f"cannot listen at {listen.host}:{listen.port}: {error.strerror}") from error
    log.info("API at %s%s, tokens at %s%s", settings.base_url, API_PATH, settings.base_url, TOKEN_PATH)
    # uvicorn repeats the signal to the process after it has stopped. A service stopped by a signal has done its work.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    server = server_for(create_app(settings, engine), settings)
    with contextlib.suppress(KeyboardInterrupt), listening:
        server.run([listening])
    if server.lifespan.should_exit:
        raise typer.Exit(1)


def server_for(application: Any, settings: SuperfacilityConfig) -> Any:
    """A server (of uvicorn) that is not started yet."""
    import uvicorn

    return uvicorn.Server(
        uvicorn.Config(
            AccessLog(LimitRequests(application, Limits(body_bytes=settings.upload_bytes))),
            host=settings.listen.host,
            port=settings.listen.port,
            loop="asyncio",
            ws="none",
            lifespan="on",
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=_GRACEFUL_STOP_S,
            ssl_certfile=settings.tls.certificate if settings.tls else None,
            ssl_keyfile=settings.tls.key if settings.tls else None,
        )
    )


if __name__ == "__main__":
    app()
