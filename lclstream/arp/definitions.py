"""Workflow definitions: from the logbook, or from a file that is read again when it changes.

Used by the consumer's thread only.
"""

from __future__ import annotations

import logging
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ConfigDict, Field

from lclstream import config_file
from lclstream.arp.decisions import ASK_THE_LOGBOOK
from lclstream.config_file import ConfigError
from lclstream.elog.client import ElogClient
from lclstream.elog.models import Trigger, WorkflowDefinition

log = logging.getLogger("lclstream.arp")

#: Seconds for which definitions of the logbook are taken as they were. A run's parameters come in bursts of messages.
MAX_AGE_S = 10.0


class DefinitionSource(Protocol):
    """Where definitions come from."""

    def of(self, experiment: str, *, fresh: bool) -> list[WorkflowDefinition]:
        """The experiment's definitions; `fresh` asks for what holds now.

        Raises:
            PeerError: the logbook cannot be asked.
        """


class ElogDefinitions:
    """Definitions in the logbook.

    Args:
        elog: its client.
    """

    def __init__(self, elog: ElogClient) -> None:
        self._elog = elog
        self._known: dict[str, tuple[float, list[WorkflowDefinition]]] = {}

    def of(self, experiment: str, *, fresh: bool) -> list[WorkflowDefinition]:
        """The experiment's definitions, at most :data:`MAX_AGE_S` old unless `fresh`."""
        known = self._known.get(experiment)
        if known is not None and not fresh and time.monotonic() - known[0] < MAX_AGE_S:
            return known[1]
        definitions = self._elog.workflow_definitions(experiment)
        self._known[experiment] = (time.monotonic(), definitions)
        return definitions


class FileDefinition(WorkflowDefinition):
    """A definition in the file: the logbook's fields, and for which experiments (shell patterns) it holds."""

    model_config = ConfigDict(extra="forbid", populate_by_name=False)

    trigger: Trigger
    experiments: list[str] = Field(default=["*"], min_length=1)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    definitions: list[FileDefinition]


def read_file(path: Path, *, logbook: bool) -> list[FileDefinition]:
    """The definitions in a file.

    Args:
        path: the file.
        logbook: whether there is a logbook, which some triggers have to ask.

    Raises:
        ConfigError: it cannot be read, or something in it is wrong.
    """
    document = config_file.read(path)
    entries = config_file.validate(_File, document).definitions
    for number, entry in enumerate(entries):
        where = document.where(("definitions", number))
        try:
            entry.parameter_object()
        except ValueError as error:
            raise ConfigError(f"{where}{error}") from error
        if entry.trigger == Trigger.RUN_PARAM_IS_VALUE and not entry.run_param_name:
            raise ConfigError(f"{where}RUN_PARAM_IS_VALUE needs run_param_name")
        if entry.trigger in ASK_THE_LOGBOOK and not logbook:
            raise ConfigError(
                f"{where}{entry.trigger} can only be judged with the logbook's file catalogue: "
                "set `elog` in the run processor's configuration"
            )
    return entries


class FileDefinitions:
    """Definitions in a YAML file.

    Args:
        path: the file.
        logbook: whether there is a logbook, which some triggers have to ask.

    Raises:
        ConfigError: it cannot be used. Later changes that cannot be used are logged, and what was read before holds.
    """

    def __init__(self, path: Path, *, logbook: bool) -> None:
        self._path = path
        self._logbook = logbook
        self._stamp = self._now()
        self.entries = read_file(path, logbook=logbook)

    def _now(self) -> tuple[int, int] | None:
        try:
            state = self._path.stat()
        except OSError:
            return None
        return state.st_mtime_ns, state.st_size

    def of(self, experiment: str, *, fresh: bool) -> list[WorkflowDefinition]:
        """The experiment's definitions, as the file is now."""
        stamp = self._now()
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self.entries = read_file(self._path, logbook=self._logbook)
                log.info("%s was changed: %d definition(s) now", self._path, len(self.entries))
            except ConfigError as error:
                log.error("%s; the %d definition(s) read before still hold", error, len(self.entries))
        return [
            entry for entry in self.entries if any(fnmatchcase(experiment, pattern) for pattern in entry.experiments)
        ]
