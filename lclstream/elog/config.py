"""The logbook stand-in's configuration file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from lclstream import config_file
from lclstream.config_file import FilePath
from lclstream.security.rate import Rate

#: What an experiment may be called; the name becomes part of URLs, messages and DAG run ids.
EXPERIMENT_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"

ExperimentName = Annotated[str, Field(pattern=EXPERIMENT_PATTERN)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class KafkaConfig(_Model):
    """Where messages go.

    Attributes:
        bootstrap_servers: ``HOST:PORT``, several separated by commas.
    """

    bootstrap_servers: str = Field(min_length=1)


class LocationConfig(_Model):
    """A data centre that files are moved to and workflows run at.

    Attributes:
        jid_prefix: base URL of its run processor's job interface (the ARP's status address), which is asked when
            somebody kills a job in the logbook. Without it, jobs of this location cannot be killed from the logbook.
    """

    jid_prefix: str | None = Field(default=None, pattern=r"^https://")


class ElogConfig(_Model):
    """Everything the service needs.

    Attributes:
        host, port: where it listens.
        credentials: folder of its certificate.
        database: SQLAlchemy URL.
        kafka: the broker.
        experiments: names of the experiments. Without the list, an experiment exists from its first run on.
        locations: data centres by name. Without any, every name is accepted.
        rate: requests one identity may make, `per_s` on average and `burst` at once. Without it, any number.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8448, ge=0, le=65535)
    credentials: FilePath = Field(description="folder of the service's certificate (--credentials)")
    database: str = "sqlite:///elog.sqlite"
    kafka: KafkaConfig = Field(description="the broker (--kafka)")
    experiments: list[ExperimentName] | None = None
    locations: dict[str, LocationConfig] = {}
    rate: Rate | None = None


def load(path: Path | None, **options: object) -> ElogConfig:
    """Read a configuration file; options of the command line replace what it says.

    Args:
        path: the file; None: the options say everything.
        options: fields of :class:`ElogConfig`, those of `kafka` with a dot; None: not given.

    Raises:
        ConfigError: the file cannot be read, or something in it is wrong.
    """
    return config_file.load(ElogConfig, path, options)
