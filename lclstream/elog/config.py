"""The logbook stand-in's configuration file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from lclstream.security.rate import Rate

#: What an experiment may be called; the name becomes part of URLs, messages and DAG run ids.
EXPERIMENT_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"

_FilePath = Annotated[Path, AfterValidator(Path.expanduser)]
ExperimentName = Annotated[str, Field(pattern=EXPERIMENT_PATTERN)]


class ConfigError(ValueError):
    """A configuration file that cannot be used; the message names file, key and value."""


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
    credentials: _FilePath
    database: str = "sqlite:///elog.sqlite"
    kafka: KafkaConfig
    experiments: list[ExperimentName] | None = None
    locations: dict[str, LocationConfig] = {}
    rate: Rate | None = None


def load(path: Path, **overrides: object) -> ElogConfig:
    """Read a configuration file; options of the command line replace what it says.

    Raises:
        ConfigError: the file cannot be read, or something in it is wrong.
    """
    try:
        document = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: must be a mapping of keys, not {type(document).__name__}")
    return validated(document, str(path), **overrides)


def validated(document: dict[str, object], source: str, **overrides: object) -> ElogConfig:
    """The configuration in a mapping.

    Raises:
        ConfigError: with every wrong key, its value, and what is wrong with it.
    """
    try:
        return ElogConfig.model_validate(
            document | {key: value for key, value in overrides.items() if value is not None}
        )
    except ValidationError as error:
        raise ConfigError(f"{source}: {explain(error)}") from error


def explain(error: ValidationError) -> str:
    """A validation error in one line a problem: key, value, what is wrong."""
    lines = []
    for problem in error.errors(include_url=False):
        key = ".".join(str(part) for part in problem["loc"]) or "(top level)"
        given = "" if problem["type"] == "missing" else f" (got {problem['input']!r})"
        lines.append(f"{key}: {problem['msg']}{given}")
    return "; ".join(lines)
