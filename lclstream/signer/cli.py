"""``lclstream signer``: run the signer, ask it for a certificate, revoke."""

from __future__ import annotations

import asyncio
import datetime
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
import yaml

from lclstream.config_file import ConfigError
from lclstream.security.errors import AuthenticationError, CredentialsError, UnreachableError
from lclstream.security.revocation import dump, same_serial, write
from lclstream.signer.client import ask, remaining, request_certificate
from lclstream.signer.config import SOCKET, load
from lclstream.signer.errors import RefusedError
from lclstream.signer.wire import Answer, Check, List, Request, Revoke, Revoked

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="""Short-lived certificates for the users of a machine, by the login its kernel reports.

    A user types `lclstream signer request` and has a certificate for the day. The data centre runs
    `lclstream signer serve`, and revokes with `lclstream signer revoke`.

    Exit codes: 0 done; 1 the signer refuses, or a checked certificate is not valid; 2 wrong option, configuration or
    folder; 3 the signer cannot be reached, or cannot listen or open its database at start.
    """,
)
log = logging.getLogger("lclstream.signer")

_Socket = Annotated[Path, typer.Option("--socket", help="The signer's socket.")]


def _logging() -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


def _fail(code: int, message: object) -> typer.Exit:
    print(f"lclstream signer: {message}", file=sys.stderr)
    return typer.Exit(code)


@app.command()
def serve(
    config: Annotated[Path | None, typer.Option(help="Configuration file (YAML); options win over it.")] = None,
    authority: Annotated[Path | None, typer.Option(help="Folder with CA.crt and CA.key (`certified init`).")] = None,
    socket: Annotated[Path | None, typer.Option(help=f"Socket to listen at; {SOCKET} unless configured.")] = None,
    database: Annotated[str | None, typer.Option(help="SQLAlchemy URL, such as sqlite:///signer.sqlite.")] = None,
) -> None:
    """Sign the keys of this machine's users until a signal comes.

    Example: lclstream signer serve --config /etc/lclstream/signer.yaml

    Exit codes: 0 stopped by a signal; 2 wrong option, configuration or signing key; 3 another signer listens there, or
    the socket or the database cannot be opened.
    """
    # Imported here, so that a user's request does not wait for the server's libraries.
    from sqlalchemy.exc import SQLAlchemyError

    from lclstream.signer.issuing import Authority
    from lclstream.signer.server import listen
    from lclstream.signer.server import serve as serve_signer
    from lclstream.signer.service import Signer
    from lclstream.signer.store import Store

    _logging()
    try:
        settings = load(config, authority=authority, socket=socket, database=database)
        key = Authority(settings.authority)
        store = Store(settings.database)
        signer = Signer(settings, key, store)
    except ConfigError as error:
        raise _fail(2, error) from error
    except (SQLAlchemyError, OSError, ImportError) as error:
        raise _fail(3, f"the database cannot be opened: {error}") from error
    try:
        listening = listen(settings.socket)
    except ConfigError as error:
        raise _fail(2, error) from error
    except OSError as error:
        raise _fail(3, f"cannot listen at {settings.socket}: {error}") from error
    log.info("signing as %s, %g h unless asked otherwise", key.name, settings.validity_h)
    try:
        asyncio.run(serve_signer(signer, listening))
    finally:
        store.close()


@app.command()
def request(
    folder: Annotated[
        Path | None,
        typer.Option(help="Your certificate folder; $CERTIFIED_CONFIG or ~/.certified when not given."),
    ] = None,
    hours: Annotated[float | None, typer.Option(min=0.01, help="Hours of validity.")] = None,
    new_key: Annotated[bool, typer.Option("--new-key", help="Make a new private key, too.")] = False,
    unless_valid_for: Annotated[
        float | None, typer.Option(min=0, help="Do nothing when the present certificate is valid for so many hours.")
    ] = None,
    socket: _Socket = SOCKET,
) -> None:
    """Have your key signed for your login, and install the certificate into your folder.

    The private key is made in the folder (mode 0600) and stays there.

    Example, for a crontab: lclstream signer request --unless-valid-for 4

    Exit codes: 0 installed, or not needed yet; 1 the signer refuses; 2 the folder cannot be used; 3 no signer there.
    """
    _logging()
    place = (folder or Path(os.environ.get("CERTIFIED_CONFIG", "~/.certified"))).expanduser()
    if unless_valid_for is not None and remaining(place) >= datetime.timedelta(hours=unless_valid_for):
        print(f"{place}: valid for {remaining(place).total_seconds() / 3600:.1f} h, nothing to do")
        return
    try:
        installed = request_certificate(socket, place, hours=hours, new_key=new_key)
    except RefusedError as error:
        raise _fail(1, f"refused: {error} (rule: {error.rule})") from error
    except CredentialsError as error:
        raise _fail(2, error) from error
    except (UnreachableError, AuthenticationError) as error:
        raise _fail(3, error) from error
    print(f"{installed.certificate}: {installed.login}, serial {installed.serial}, until {_local(installed.until)}")
    for path in installed.services:
        print(f"{path}: service")
    for note in installed.notes:
        print(f"note: {note}")


@app.command()
def revoke(
    serial: Annotated[str | None, typer.Argument(help="Serial number of the certificate (hexadecimal).")] = None,
    login: Annotated[str | None, typer.Option(help="Revoke all valid certificates of this login instead.")] = None,
    reason: Annotated[str, typer.Option(help="Why; told to whoever presents it.")] = "",
    socket: _Socket = SOCKET,
) -> None:
    """Revoke a certificate: your own, or as an operator or root anybody's.

    Example: lclstream signer revoke --login ada --reason "laptop lost"

    Exit codes: 0 revoked; 1 the signer refuses, or a list on its machine could not be written; 2 wrong option;
    3 no signer there.
    """
    if (serial is None) == (login is None):
        raise _fail(2, "name a serial number or --login, and not both")
    answer = _ask(socket, Revoke(serial=_serial(serial) if serial else None, login=login, reason=reason))
    print(answer.detail)
    for entry in answer.revoked:
        print(f"{entry.serial}  since {_local(entry.since)}  {entry.reason}")
    if answer.unwritten:
        raise _fail(1, f"revoked, but these lists could not be written: {', '.join(answer.unwritten)}")


@app.command()
def revoked(
    output: Annotated[
        Path | None, typer.Option(help="Write the list to this file, such as a service's revoked.yaml.")
    ] = None,
    socket: _Socket = SOCKET,
) -> None:
    """Print the revoked certificates that have not expired, as services read them (`revoked.yaml`).

    Example: lclstream signer revoked --output /etc/lclstream/api/revoked.yaml

    Exit codes: 0 done; 1 the file cannot be written; 3 no signer there.
    """
    entries = _ask(socket, Revoked()).revoked
    if output is None:
        print(dump(entries), end="")
        return
    try:
        changed = write(output, entries, note="Written by `lclstream signer revoked`.")
    except OSError as error:
        raise _fail(1, f"{output} cannot be written: {error.strerror}") from error
    print(f"{output}: {len(entries)} revoked, {'written' if changed else 'unchanged'}")


@app.command("list")
def list_signatures(
    everybody: Annotated[bool, typer.Option("--all", help="Everybody's; for operators and root.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many.")] = 100,
    socket: _Socket = SOCKET,
) -> None:
    """Print what was signed for you, newest first, as YAML.

    Example: lclstream signer list --limit 3

    Exit codes: 0 done; 1 the signer refuses; 3 no signer there.
    """
    answer = _ask(socket, List(all=everybody, limit=limit))
    rows = [signature.model_dump(mode="json") for signature in answer.signatures]
    print(yaml.safe_dump(rows, sort_keys=False), end="")


@app.command()
def check(
    serial: Annotated[str, typer.Argument(help="Serial number (hexadecimal), as refusals and access logs have it.")],
    socket: _Socket = SOCKET,
) -> None:
    """Say whose a certificate is and whether it is valid.

    Example: lclstream signer check 3f9c21

    Exit codes: 0 valid; 1 revoked, expired or never signed here; 2 no serial number; 3 no signer there.
    """
    answer = _ask(socket, Check(serial=_serial(serial)))
    if not answer.signatures:
        raise _fail(1, f"{serial}: never signed here")
    found = answer.signatures[0]
    state = "valid" if found.valid_at(datetime.datetime.now(datetime.UTC)) else "expired"
    if found.revoked is not None:
        state = f"revoked since {_local(found.revoked)}{': ' if found.reason else ''}{found.reason}"
    print(f"{found.serial}: {found.login}, until {_local(found.not_after)}: {state}")
    if state != "valid":
        raise typer.Exit(1)


def _serial(text: str) -> str:
    try:
        return same_serial(text)
    except ValueError as error:
        raise _fail(2, error) from error


def _ask(socket: Path, question: Request) -> Answer:
    try:
        return ask(socket, question)
    except RefusedError as error:
        raise _fail(1, f"refused: {error} (rule: {error.rule})") from error
    except (UnreachableError, AuthenticationError) as error:
        raise _fail(3, error) from error


def _local(moment: datetime.datetime) -> str:
    return moment.astimezone().isoformat(sep=" ", timespec="seconds")


if __name__ == "__main__":
    app()
