"""The run processor's configuration file."""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from lclstream import config_file
from lclstream.arp.events import FILES, JOBS, RUNS
from lclstream.config_file import ConfigError, FilePath
from lclstream.security.rate import Rate

_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


def _https(url: str) -> str:
    if urlsplit(url).scheme != "https" or not urlsplit(url).hostname:
        raise ValueError("must be an https:// URL")
    return url.rstrip("/")


_HttpsUrl = Annotated[str, AfterValidator(_https)]


class KafkaConfig(_Model):
    """The broker and what is read from it.

    Attributes:
        bootstrap_servers: ``HOST:PORT``, several separated by commas.
        group: consumer group. Run processors of one group share the work; each location needs a group of its own.
        topics: the logbook's topics. `file_catalog` is needed for file triggers, `workflow_jobs` for jobs by hand.
        dead_letter_topic: where messages go that cannot be used, with the reason.
        start: where a group that was never here begins. With ``earliest`` it gets everything the broker still has: on
            an old broker that is every run of the last days. ``latest`` means from now on; topics and partitions that
            are made later are read from their beginning.
        session_timeout_s: how long the broker waits for a run processor that was killed before another one takes over.
    """

    bootstrap_servers: str = Field(min_length=1)
    group: str = Field(default="lclstream-arp", min_length=1)
    topics: list[Literal["runs", "file_catalog", "workflow_jobs"]] = Field(default=[RUNS, FILES, JOBS], min_length=1)
    dead_letter_topic: str = Field(default="arp-dead-letter", min_length=1)
    start: Literal["earliest", "latest"] = "earliest"
    session_timeout_s: float = Field(default=10, ge=1, le=300)


class DefinitionsConfig(_Model):
    """Where workflow definitions come from: the logbook, or a file. Exactly one.

    Attributes:
        elog: base URL of the logbook.
        file: a YAML file with a list `definitions`.
    """

    elog: _HttpsUrl | None = None
    file: FilePath | None = None

    @model_validator(mode="after")
    def _one(self) -> DefinitionsConfig:
        if (self.elog is None) == (self.file is None):
            raise ValueError("give either elog (a URL) or file (a path)")
        return self


class AirflowConfig(_Model):
    """Airflow's REST interface.

    Attributes:
        url: base URL; plain http only on loopback, unless `allow_plain_http`.
        username: whose DAG runs they are.
        password_file: a file, readable by its owner only, with the password. It is read for every new token.
        ca_file: issuer of Airflow's certificate (PEM) where the system does not know it.
        allow_plain_http: send password and token unencrypted to another machine, for a network that is private.
        timeout_s: seconds one call may take.
        server_errors_at_most_s: after so many seconds of status 500 for one event, the event is taken for the reason
            and goes to the dead-letter topic. An Airflow that does not answer is waited for without end.
    """

    url: str = Field(pattern=r"^https?://[^/]+")
    username: str = Field(min_length=1)
    password_file: FilePath
    ca_file: FilePath | None = None
    allow_plain_http: bool = False
    timeout_s: float = Field(default=30, gt=0, le=120)
    server_errors_at_most_s: float = Field(default=900, gt=0)

    @model_validator(mode="after")
    def _encrypted(self) -> AirflowConfig:
        parts = urlsplit(self.url)
        if parts.scheme == "http" and parts.hostname not in _LOOPBACK and not self.allow_plain_http:
            raise ValueError(
                f"url: {self.url} would send the password unencrypted: use https://, or set allow_plain_http: true "
                "where the network is private"
            )
        return self

    def password(self) -> str:
        """The password in the file.

        Raises:
            ConfigError: the file is missing, empty, or others can read it.
        """
        try:
            mode = stat.S_IMODE(self.password_file.stat().st_mode)
            password = self.password_file.read_text().strip()
        except OSError as error:
            raise ConfigError(f"airflow.password_file: {self.password_file}: {error.strerror}") from error
        if mode & 0o077:
            raise ConfigError(
                f"airflow.password_file: {self.password_file} has mode {mode:04o}: others can read it; "
                f"run `chmod 600 {self.password_file}`"
            )
        if not password:
            raise ConfigError(f"airflow.password_file: {self.password_file} is empty")
        return password


class StatusConfig(_Model):
    """Where the run processor says how it is, and takes the logbook's requests to kill a job, over mutual TLS.

    Attributes:
        host, port: where it listens; port 0 takes a free one.
        kill_logins: logins whose requests to kill a job are followed: the logbook's.
        rate: requests one identity may make, `per_s` on average and `burst` at once; None: any number.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8449, ge=0, le=65535)
    kill_logins: list[str] = ["elog"]
    rate: Rate | None = None


class JobsConfig(_Model):
    """How DAG runs are shown in the logbook.

    Attributes:
        show: whether each DAG run of a definition in the logbook gets a job there.
        every_s: how often the jobs' status and counters are brought up to date.
        logins: logins of the group's run processors, where they have several; our own is always one. Jobs of theirs
            show DAG runs there are. Without a member's login here, its jobs are taken for requests by hand.
    """

    show: bool = True
    logins: list[str] = []
    every_s: float = Field(default=5, ge=0.2, le=3600)


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return text


class ArpConfig(_Model):
    """Everything the run processor needs.

    Attributes:
        location: the data centre whose workflows it starts, as definitions name it.
        experiments: names or shell patterns (``mfx*``); empty means all.
        definitions: where workflow definitions come from.
        elog: base URL of the logbook where definitions come from a file: for file triggers, jobs by hand, and to show
            in the logbook how DAG runs go.
        credentials: folder of our certificate, for the logbook and the status page.
        status: address of the status page; none without it.
        jobs: how DAG runs are shown in the logbook.
        recorder_files: files whose path this regular expression finds are not waited for by
            ``ALL_NONREC_FILES_TRANSFERRED``.
        start_timeout_s: how long Kafka may take to answer at the start.
    """

    kafka: KafkaConfig
    definitions: DefinitionsConfig
    airflow: AirflowConfig
    location: str = Field(min_length=1)
    experiments: list[str] = []
    elog: _HttpsUrl | None = None
    credentials: FilePath | None = None
    status: StatusConfig | None = None
    jobs: JobsConfig = JobsConfig()
    recorder_files: Annotated[str, AfterValidator(_pattern)] = r"-s0?[89]\d-"
    start_timeout_s: float = Field(default=30, gt=0, le=600)

    @model_validator(mode="after")
    def _complete(self) -> ArpConfig:
        if self.definitions.elog is not None and self.elog not in (None, self.definitions.elog):
            raise ValueError("elog: is only for definitions from a file; definitions.elog is the logbook already")
        if self.credentials is None and (self.logbook_url is not None or self.status is not None):
            raise ValueError("credentials: the folder of our certificate is needed for the logbook and the status page")
        return self

    @property
    def logbook_url(self) -> str | None:
        """The logbook, when there is one."""
        return self.definitions.elog or self.elog


def load(path: Path) -> ArpConfig:
    """Read a configuration file.

    Raises:
        ConfigError: the file cannot be read, or something in it is wrong.
    """
    return config_file.load(ArpConfig, path)
