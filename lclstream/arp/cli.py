"""``lclstream arp``: the run processor as a service."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from confluent_kafka import KafkaException
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from lclstream.arp.actions import Actions
from lclstream.arp.airflow_rest import AirflowClient, AirflowUnavailableError
from lclstream.arp.config import ArpConfig, load
from lclstream.arp.decisions import Scope
from lclstream.arp.definitions import DefinitionSource, ElogDefinitions, FileDefinitions
from lclstream.arp.logbook_jobs import Follower, JobEntries, keep_following, kill
from lclstream.arp.observation import Observation
from lclstream.arp.processor import KafkaUnreachableError, Processor
from lclstream.arp.service import CannotListenError, Killer, create_app, served
from lclstream.config_file import ConfigError
from lclstream.elog.client import ElogClient
from lclstream.elog.models import WorkflowJob
from lclstream.security.credentials import Credentials
from lclstream.security.errors import CredentialsError
from lclstream.security.identity import Identity

app = typer.Typer(add_completion=False)
log = logging.getLogger("lclstream.arp")

#: Seconds a call that is under way may take after a stop signal.
STOP_S = 5.0
_NOT_FINISHED = 143


def _end_soon() -> None:
    log.warning("a call did not end within %g s of the signal: its event will come again at the next start", STOP_S)
    # Nothing of that event was committed, so it is as safe as being killed, and promptness was asked for.
    os._exit(_NOT_FINISHED)


def _stop_on_signals() -> threading.Event:
    stop = threading.Event()

    def stopped(number: int, _frame: FrameType | None) -> None:
        log.info("%s: stopping", signal.Signals(number).name)
        if not stop.is_set():
            stop.set()
            timer = threading.Timer(STOP_S, _end_soon)
            timer.daemon = True
            timer.start()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stopped)
    return stop


def _check_airflow(airflow: AirflowClient) -> None:
    try:
        airflow.log_in()
    except AirflowUnavailableError as error:
        if error.answered_with is not None:
            raise ConfigError(str(error)) from error
        log.warning("%s: events wait until it does", error)


def _login(credentials: Credentials) -> str:
    certificate = x509.load_pem_x509_certificate(credentials.certificate.read_bytes())
    return Identity.of_certificate(certificate.public_bytes(Encoding.DER)).login


@contextmanager
def _following(
    config: ArpConfig, scope: Scope, credentials: Credentials, observation: Observation, stop: threading.Event
) -> Iterator[None]:
    """A thread, with clients of its own, that shows in the logbook how DAG runs go."""
    assert config.logbook_url is not None
    with AirflowClient(config.airflow) as airflow, ElogClient(config.logbook_url, credentials) as elog:
        thread = threading.Thread(
            target=keep_following,
            args=(Follower(airflow, elog, scope),),
            kwargs={
                # One of the group does it: whoever reads this partition.
                "leads": partial(observation.reads, config.kafka.topics[0], 0),
                "stop": stop,
                "every_s": config.jobs.every_s,
            },
            name="arp-jobs",
            daemon=True,
        )
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(STOP_S)


def _killer(config: ArpConfig, scope: Scope) -> Killer:
    def killer(experiment: str, job: WorkflowJob, by: str) -> dict[str, Any]:
        # Rare, and in a thread of the server's: a client of its own is simpler than one that is shared.
        with AirflowClient(config.airflow) as airflow:
            return kill(airflow, scope, experiment, job, by)

    return killer


def _run(config: ArpConfig, stop: threading.Event) -> None:
    with ExitStack() as stack:
        credentials = None if config.credentials is None else Credentials(config.credentials)
        airflow = stack.enter_context(AirflowClient(config.airflow))
        elog = jobs = None
        # Also of one that shows nothing itself: the group's jobs are in its messages all the same.
        logins = frozenset(config.jobs.logins) | (frozenset() if credentials is None else {_login(credentials)})
        if config.logbook_url is not None and credentials is not None:
            elog = stack.enter_context(ElogClient(config.logbook_url, credentials))
            if config.jobs.show:
                jobs = JobEntries(elog, logins)
        definitions: DefinitionSource
        if config.definitions.file is not None:
            definitions = FileDefinitions(config.definitions.file, logbook=elog is not None)
        elif elog is not None:
            definitions = ElogDefinitions(elog)
        _check_airflow(airflow)
        observation = Observation(config.kafka.group, config.location)
        scope = Scope(config.location, tuple(config.experiments), re.compile(config.recorder_files), logins)
        processor = Processor(config, Actions(scope, definitions, airflow, elog, jobs), observation, stop)
        processor.connect()
        if config.status is not None and credentials is not None:
            killer = None if elog is None else _killer(config, scope)
            status = create_app(observation, killer, config.status.kill_logins)
            stack.enter_context(served(status, config.status, credentials))
        if jobs is not None and credentials is not None:
            stack.enter_context(_following(config, scope, credentials, observation, stop))
        log.info("run processor of %s, group %s", config.location, config.kafka.group)
        processor.run()


@app.command()
def arp(
    config: Annotated[Path, typer.Option(help="Configuration file (YAML).", dir_okay=False)],
    check: Annotated[bool, typer.Option("--check", help="Read and check the configuration, and end.")] = False,
) -> None:
    """The Automated Run Processor: starts Airflow DAG runs when the logbook says that runs start, end, or have files.

    It reads the logbook's messages from Kafka, looks up the experiment's workflow definitions, and makes one DAG run
    for each that asks for it: exactly one, whatever crashes, because the DAG run's id is made from the event. Messages
    that cannot be used go to a dead-letter topic with the reason.

    Example: lclstream arp --config arp.yaml

    Exit codes: 0 stopped by a signal, 1 Kafka does not let us go on, 2 wrong command line or configuration, 3 no Kafka
    broker answers or the status port is in use, 143 a call to Airflow was cut off 5 s after the signal (its event
    comes again).
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        settings = load(config)
        settings.airflow.password()
        if settings.definitions.file is not None:
            FileDefinitions(settings.definitions.file, logbook=settings.logbook_url is not None)
        if check:
            typer.echo(f"{config}: correct")
            return
        _run(settings, _stop_on_signals())
    except (ConfigError, CredentialsError) as error:
        log.error("%s", error)
        raise typer.Exit(2) from error
    except (KafkaUnreachableError, CannotListenError) as error:
        log.error("%s", error)
        raise typer.Exit(3) from error
    except KafkaException as error:
        log.error("Kafka does not let us go on: %s", error.args[0].str())
        raise typer.Exit(1) from error


if __name__ == "__main__":
    app()
