"""Which machines work, and which do not: a small YAML file that whoever runs the stand-in edits while it runs.

::

    perlmutter:
      status: unavailable          # active (default), degraded, unavailable, other
      notes: ["Maintenance"]
      outages:
        - {start_at: 2026-03-01T08:00:00Z, end_at: 2026-03-01T18:00:00Z, description: Maintenance, status: Active}
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from lclstream import config_file
from lclstream.config_file import ConfigError


class Outage(BaseModel):
    """A time in which a machine is not there.

    Attributes:
        start_at: when it begins.
        end_at: when it ends.
        description: a sentence.
        notes: more of it.
        status: a planned one says ``Planned``.
        swo: who announced it.
    """

    model_config = ConfigDict(extra="forbid")

    start_at: datetime.datetime | None = None
    end_at: datetime.datetime | None = None
    description: str | None = None
    notes: str | None = None
    status: Literal["Active", "Cancelled", "Completed", "Extended", "Planned"] = "Active"
    swo: str | None = None


class Standing(BaseModel):
    """How one machine stands.

    Attributes:
        status: ``active``, ``degraded``, ``unavailable`` or ``other``.
        description: what the machine is.
        notes: anything users should know.
        outages: planned, active and past ones.
    """

    model_config = ConfigDict(extra="forbid")

    status: Literal["active", "degraded", "unavailable", "other"] = "active"
    description: str = ""
    notes: list[str] = []
    outages: list[Outage] = []


_file = TypeAdapter(dict[str, Standing])


def read(path: Path | None, machines: Iterable[str]) -> dict[str, Standing]:
    """How all machines stand, those of the file and the others.

    Raises:
        ConfigError: the file cannot be used.
    """
    found: dict[str, Standing] = {}
    if path is not None and path.exists():
        document = config_file.read(path)
        try:
            found = _file.validate_python(document.value or {})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise ConfigError(f"{document.where(first['loc'])}{first['msg']}, not {first['input']!r}") from error
    return {**{name: Standing() for name in machines}, **found}
