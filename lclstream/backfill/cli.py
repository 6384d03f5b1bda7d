"""``lclstream backfill``: process archived runs, one DAG run for each."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from lclstream import config_file
from lclstream.arp.airflow_rest import AirflowRefusalError, AirflowUnavailableError
from lclstream.arp.config import AirflowConfig
from lclstream.backfill.runner import Backfill, BackfillAirflow, Progress
from lclstream.backfill.runs import Reprocess, RunsError, Step, parse_runs
from lclstream.config_file import ConfigError
from lclstream.elog.client import ElogClient
from lclstream.elog.models import RunNumber
from lclstream.security.credentials import Credentials
from lclstream.security.errors import CredentialsError, PeerError

app = typer.Typer(add_completion=False)


def _stop(code: int, message: object) -> typer.Exit:
    typer.echo(str(message), err=True)
    return typer.Exit(code)


def _parameters(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        document = config_file.read(path).value
    except ConfigError as error:
        raise _stop(2, f"--parameters {error}") from error
    if not isinstance(document, dict):
        raise _stop(2, f"--parameters {path}: must hold keys and values, as the DAG's `parameters`")
    return document


def _chosen(
    experiment: str,
    runs: list[int] | None,
    elog: str | None,
    credentials: Path | None,
    where: list[str],
    tag: str | None,
) -> list[RunNumber]:
    """Those of the runs (None: of all) that the logbook has, with these parameters and this tag."""
    if elog is None:
        if runs is None:
            raise _stop(2, "`all` asks the logbook: give its address with --elog, and --credentials")
        if where or tag:
            raise _stop(2, "--where and --tag ask the logbook: give its address with --elog, and --credentials")
        return list(runs)
    if credentials is None:
        raise _stop(2, "--elog needs --credentials: the folder of your certificate")
    wanted: dict[str, Any] = {}
    for condition in where:
        name, equals, text = condition.partition("=")
        if not equals or not name:
            raise _stop(2, f"--where {condition!r}: write NAME=VALUE, such as photon_energy=9.5")
        try:
            wanted[name] = json.loads(text)
        except ValueError:
            wanted[name] = text
    try:
        with ElogClient(elog, Credentials(credentials)) as client:
            known = {run.num for run in client.runs(experiment, include_params=False)}
            if wanted:
                known &= set(client.runs_matching_params(experiment, wanted))
            if tag:
                known &= set(client.runs_with_tag(experiment, tag))
    except (CredentialsError, ValueError) as error:
        raise _stop(2, error) from error
    except PeerError as error:
        raise _stop(3, error) from error
    if runs is None:
        # Runs have names instead of numbers at some instruments.
        return sorted(known, key=lambda run: (isinstance(run, str), run))
    return [run for run in runs if run in known]


def _table(planned: list[Progress]) -> Table:
    table = Table("run", "DAG run", "what", "state")
    for entry in planned:
        table.add_row(str(entry.run), entry.dag_run_id, entry.step.value, entry.state or "")
    return table


@app.command()
def backfill(
    experiment: Annotated[str, typer.Argument(help="Experiment, such as mfx100852324.")],
    runs: Annotated[str, typer.Argument(help="Run numbers, such as 100..150,160; or `all` that the logbook has.")],
    dag: Annotated[str, typer.Option(help="The DAG that processes a run.")] = "backfill_run",
    name: Annotated[str, typer.Option(help="Tells several backfills of the same runs apart.")] = "backfill",
    parameters: Annotated[
        Path | None, typer.Option(help="File (YAML or JSON) with what the DAG gets as `parameters`.", dir_okay=False)
    ] = None,
    location: Annotated[
        str | None, typer.Option(help="Data centre where the files are waited for, as the logbook names it.")
    ] = None,
    max_active: Annotated[int, typer.Option(min=1, help="DAG runs under way at a time.")] = 4,
    reprocess: Annotated[Reprocess, typer.Option(help="Which runs that have ended are processed again.")] = (
        Reprocess.NONE
    ),
    where: Annotated[list[str] | None, typer.Option(help="Only runs with this parameter NAME=VALUE.")] = None,
    tag: Annotated[str | None, typer.Option(help="Only runs with this tag in the logbook, such as DARK.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and do nothing.")] = False,
    airflow: Annotated[str, typer.Option(envvar="LCLSTREAM_AIRFLOW", help="Airflow's address.")] = (
        "http://127.0.0.1:8080"
    ),
    user: Annotated[str, typer.Option(envvar="LCLSTREAM_AIRFLOW_USER", help="Airflow user.")] = "admin",
    password_file: Annotated[
        Path, typer.Option(envvar="LCLSTREAM_AIRFLOW_PASSWORD_FILE", help="File (mode 0600) with the password.")
    ] = Path("~/.config/lclstream/airflow-password"),
    elog: Annotated[str | None, typer.Option(envvar="LCLSTREAM_ELOG", help="Base URL of the logbook.")] = None,
    credentials: Annotated[
        Path | None, typer.Option(envvar="LCLSTREAM_CREDENTIALS", help="Folder of your certificate.")
    ] = None,
    poll: Annotated[float, typer.Option(min=0.05, help="Seconds between two looks.")] = 2.0,
) -> None:
    """Process archived runs: one DAG run for each, a bounded number at a time, with a table at the end.

    The DAG runs' ids follow from experiment, run and --name, so a backfill that was stopped goes on where it was when
    it is started again; stopping it (Ctrl-C) leaves the DAG runs that are under way to Airflow.

    Example: lclstream backfill mfx100852324 100..150,160 --parameters stream.yaml --max-active 4 --reprocess failed

    Exit codes: 0 every run succeeded, 1 a run failed or Airflow refused it, 2 wrong command line or file, 3 Airflow or
    the logbook cannot be reached, 130 stopped.
    """
    console = Console(stderr=True)
    try:
        numbers = _chosen(experiment, None if runs == "all" else parse_runs(runs), elog, credentials, where or [], tag)
        config = AirflowConfig(url=airflow, username=user, password_file=password_file)
        client = BackfillAirflow(config)
    except (RunsError, ConfigError) as error:
        raise _stop(2, error) from error
    except ValidationError as error:
        raise _stop(2, "; ".join(str(problem["msg"]) for problem in error.errors(include_url=False))) from error
    work = Backfill(
        client, dag_id=dag, experiment=experiment, name=name, parameters=_parameters(parameters), location=location
    )
    planned: list[Progress] = []
    with client:
        try:
            client.log_in()
            planned = work.plan(numbers, reprocess)
            if not dry_run:
                with _bar(console) as bar:
                    task = bar.add_task("runs", total=len(planned))
                    work.work(
                        planned,
                        max_active=max_active,
                        poll_s=poll,
                        show=lambda entries: bar.update(task, completed=sum(entry.ended for entry in entries)),
                    )
        except (RunsError, ConfigError) as error:
            raise _stop(2, error) from error
        except AirflowUnavailableError as error:
            raise _stop(3, error) from error
        except AirflowRefusalError as error:
            raise _stop(1, error) from error
        except KeyboardInterrupt:
            active = [entry for entry in planned if entry.step is Step.FOLLOW and not entry.ended]
            message = f"stopped; {len(active)} DAG runs are left to Airflow. The same command goes on from here."
            raise _stop(130, message) from None
    Console().print(_table(planned))
    if dry_run:
        return
    counts = Counter(entry.state for entry in planned)
    console.print(", ".join(f"{count} {state or 'deleted'}" for state, count in counts.items()) or "no run to process")
    if any(entry.state != "success" for entry in planned):
        raise typer.Exit(1)


def _bar(console: Console) -> Bar:
    return Bar(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )


if __name__ == "__main__":
    app()
