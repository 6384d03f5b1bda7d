"""``lclstream run start|end``: start and end runs in a logbook from a terminal or a script."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from lclstream.elog.client import ElogClient
from lclstream.elog.models import RunDocument, run_number
from lclstream.security.credentials import Credentials
from lclstream.security.errors import AuthenticationError, CredentialsError, PeerError, UnreachableError

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Start and end runs in the logbook.")

_Elog = Annotated[str, typer.Option("--elog", envvar="LCLSTREAM_ELOG", help="Base URL of the logbook.")]
_Folder = Annotated[
    Path, typer.Option("--credentials", envvar="LCLSTREAM_CREDENTIALS", help="Folder of your certificate.")
]
_DEFAULT_ELOG = "https://127.0.0.1:8448"
_DEFAULT_FOLDER = Path("~/.config/certified")


def _fail(code: int, message: object) -> typer.Exit:
    print(message, file=sys.stderr)
    return typer.Exit(code)


@contextmanager
def _client(elog: str, credentials: Path) -> Iterator[ElogClient]:
    try:
        with ElogClient(elog, Credentials(credentials)) as client:
            yield client
    except (CredentialsError, ValueError) as error:
        raise _fail(2, error) from error
    except (UnreachableError, AuthenticationError) as error:
        raise _fail(3, error) from error
    except PeerError as error:
        raise _fail(1, error) from error


def _parameters(assignments: list[str]) -> dict[str, Any]:
    parameters: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name:
            raise _fail(2, f"--param {assignment!r}: write NAME=VALUE, such as photon_energy=9.5")
        try:
            parameters[name] = json.loads(text)
        except ValueError:
            parameters[name] = text
    return parameters


def _show(run: RunDocument) -> None:
    typer.echo(json.dumps(run.document()))


@app.command()
def start(
    experiment: Annotated[str, typer.Argument(help="Experiment, such as mfx100852324.")],
    run_type: Annotated[str, typer.Option("--type", help="Type of the run.")] = "DATA",
    run: Annotated[str | None, typer.Option(help="Run number, instead of the next one.")] = None,
    param: Annotated[
        list[str] | None, typer.Option(help="Run parameter NAME=VALUE (JSON, or else text); may be repeated.")
    ] = None,
    sample: Annotated[str | None, typer.Option(help="Name of the sample.")] = None,
    elog: _Elog = _DEFAULT_ELOG,
    credentials: _Folder = _DEFAULT_FOLDER,
) -> None:
    """Start a run; a run that is still open is ended first. Prints the run's document (JSON).

    Example: lclstream run start mfx100852324 --param photon_energy=9.5 --param detector=jungfrau

    Exit codes: 0 started, 1 the logbook refused, 2 wrong command line or certificate folder, 3 nobody answers,
    or one side does not accept the other's certificate.
    """
    parameters = _parameters(param or [])
    with _client(elog, credentials) as client:
        number = None if run is None else run_number(run)
        _show(client.start_run(experiment, run_type, number, parameters or None, sample=sample))


@app.command()
def end(
    experiment: Annotated[str, typer.Argument(help="Experiment, such as mfx100852324.")],
    elog: _Elog = _DEFAULT_ELOG,
    credentials: _Folder = _DEFAULT_FOLDER,
) -> None:
    """End the current run. Prints the run's document (JSON), with its duration and files.

    Example: lclstream run end mfx100852324

    Exit codes: 0 ended, 1 the logbook refused, 2 wrong command line or certificate folder, 3 nobody answers,
    or one side does not accept the other's certificate.
    """
    with _client(elog, credentials) as client:
        _show(client.end_run(experiment))


if __name__ == "__main__":
    app()
