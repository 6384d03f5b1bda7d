"""The `lclstream` command: one word a service or action, loaded only when it is used.

Commands are listed here with one line each, so that ``lclstream --help`` answers at once and works on a machine that
has only some of the extras installed.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any, NamedTuple

import typer
import typer.main
from typer.core import TyperGroup


class _Command(NamedTuple):
    module: str
    attribute: str
    extra: str
    summary: str


_COMMANDS = {
    "demo": _Command("lclstream.demo.cli", "app", "all", "From an empty folder to an analysed run, on this machine."),
    "api": _Command(
        "lclstream.api.cli", "app", "services", "Serve transfers: POST a configuration, get a URI to pull from."
    ),
    "jobs": _Command("lclstream.jobs.cli", "app", "services", "Serve batch jobs over REST, in Psi-k's formats."),
    "superfacility": _Command(
        "lclstream.superfacility.cli", "app", "services", "Stand in for NERSC's Superfacility API, on your own Slurm."
    ),
    "elog": _Command("lclstream.elog.cli", "app", "services", "Serve a logbook that announces runs on Kafka."),
    "arp": _Command("lclstream.arp.cli", "app", "services", "Start Airflow DAG runs on the logbook's messages."),
    "backfill": _Command("lclstream.backfill.cli", "app", "services", "Process archived runs, one DAG run for each."),
    "signer": _Command("lclstream.signer.cli", "app", "services", "Short-lived certificates for this machine's users."),
    "kafka": _Command("lclstream.kafka.cli", "app", "services", "Run an in-memory Kafka for demonstrations and tests."),
    "run": _Command("lclstream.elog.run_cli", "app", "services", "Start or end a run in the logbook."),
    "get": _Command("lclstream.stream_cli", "get_app", "stream", "Ask for a stream and receive it."),
    "pull": _Command("lclstream.stream_cli", "pull_app", "stream", "Receive the messages of a stream."),
    "push": _Command("lclstream.stream_cli", "push_app", "stream", "Send files as the messages of a stream."),
    "session": _Command(
        "lclstream.consumers.session", "app", "stream", "Stay on the nodes and analyse one stream after the other."
    ),
    "collect": _Command(
        "lclstream.consumers.collecting", "app", "stream", "One HDF5 file of a run, over the engine's files."
    ),
    "consume": _Command("lclstream.consumers.cli", "app", "plot", "Analyse a stream while it arrives."),
}


def _listed(name: str, summary: str) -> Any:
    """A command that only shows in the list: the real one is imported when it is called."""
    listed = typer.Typer(add_completion=False)
    listed.command(name, help=summary)(lambda: None)
    return typer.main.get_command(listed)


class _LazyCommands(TyperGroup):
    """Lists commands by their summary; imports the one that is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        entry = _COMMANDS.get(cmd_name)
        return None if entry is None else _listed(cmd_name, entry.summary)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, _load(name) if name else command, rest


def _load(name: str) -> Any:
    entry = _COMMANDS[name]
    try:
        module = importlib.import_module(entry.module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith(("lclstream", "nngstream")):
            raise
        print(
            f"`lclstream {name}` needs the Python package {error.name!r}: "
            f"install it with  pip install 'lclstream[{entry.extra}]'",
            file=sys.stderr,
        )
        raise SystemExit(2) from error
    command = typer.main.get_command(getattr(module, entry.attribute))
    command.name = name
    return command


app = typer.Typer(cls=_LazyCommands, no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")


@app.callback(invoke_without_command=True)
def _root(
    version: bool = typer.Option(False, "--version", help="Print the version and end."),
) -> None:
    """Streams X-ray detector data from the experiment to any computing centre, on its own, under Airflow.

    Try `lclstream demo` first. Every command explains itself with `--help`.
    """
    if version:
        from lclstream import __version__

        print(f"lclstream {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point of the `lclstream` command."""
    app()


if __name__ == "__main__":
    main()
