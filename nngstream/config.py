"""The options of a buffer, from a YAML file, from the command line, or both.

Importing this needs pydantic and PyYAML only: other programs use the model to write a buffer's configuration.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from nngstream import route, url
from nngstream.errors import ConfigurationError

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)}
_UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("kMGT", 1)}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
#: ``login@issuer``: an issuer is a name in the form of RFC 4514, which begins with a type (``CN=`` or ``2.5.4.65=``).
_WITH_ISSUER = re.compile(r"(?P<login>.+?)@(?P<issuer>(?:[A-Za-z][A-Za-z0-9-]*|\d+(?:\.\d+)+)=.+)", re.DOTALL)
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def parse_size(value: object) -> int:
    """Bytes of a size such as ``8GiB``, ``512 MB`` or ``1048576``.

    Raises:
        ValueError: it is no size.
    """
    found = _SIZE.fullmatch(str(value))
    if isinstance(value, bool) or not found or found[2] not in _UNITS:
        raise ValueError(f"{value!r} is no size: write a number and one of {', '.join(list(_UNITS)[1:])}, such as 8GiB")
    return round(float(found[1]) * _UNITS[found[2]])


def _checked_url(value: object) -> str:
    return str(url.parse(str(value)))


def _checked_route(value: object) -> object:
    return str(route.parse(str(value))) if value is not None else None


RouteKey = Annotated[str, BeforeValidator(_checked_route)]
Size = Annotated[int, BeforeValidator(parse_size)]
Url = Annotated[str, BeforeValidator(_checked_url)]


class Allowed(BaseModel):
    """Somebody who may come; a text is ``login`` or ``login@issuer``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    login: str = Field(min_length=1, description="user id (UID) of the certificate's subject, else its common name")
    issuer: str | None = Field(None, min_length=1, description="issuer's name (RFC 4514); none: any issuer of `ca`")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        found = _WITH_ISSUER.fullmatch(value.strip())
        return found.groupdict() if found else {"login": value.strip()}


def _names_somebody(value: object) -> object:
    if isinstance(value, (list, tuple)) and value:
        return value
    raise ValueError(
        "list at least one `login` or `login@issuer`; leave the key out to let everybody in whom `ca` vouches for"
    )


Allowances = Annotated[tuple[Allowed, ...] | None, BeforeValidator(_names_somebody)]


class Tls(BaseModel):
    """Certificates (PEM) for ``tls+tcp`` and for a status at ``https``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    certificate: Path = Field(description="our certificate, with its chain")
    key: Path = Field(description="our key; nobody else may read it (mode 0600)")
    ca: Path = Field(description="the issuers whose certificates we accept")
    producers: Allowances = Field(
        None, description="who may push; left out: whoever has a certificate of these issuers"
    )
    consumers: Allowances = Field(
        None, description="who may pull; left out: whoever has a certificate of these issuers"
    )

    def allowed(self, side: str) -> tuple[Allowed, ...] | None:
        """Who may come to the side ``in`` or ``out``; None: everybody whom `ca` vouches for."""
        return self.producers if side == "in" else self.consumers


class BufferConfig(BaseModel):
    """Everything a buffer can be told."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    inputs: list[Url] = Field(alias="in", min_length=1, description="where producers come: URLs")
    outputs: list[Url] = Field(alias="out", min_length=1, description="where consumers come: URLs")
    name: str = Field("nngstream", min_length=1, max_length=100, description="name in status, metrics and logs")
    capacity: Size = Field(1024**3, ge=65536, description="bytes that messages may take in memory")
    producers: int = Field(1, ge=0, description="producers that must have come before the stream can end")
    grace: float = Field(1.0, ge=0, description="seconds without any producer after which the stream has ended")
    sentinel: int = Field(0, ge=0, description="empty messages to each ZeroMQ consumer at the end")
    send_buffer: Size = Field(
        256 * 1024, ge=4096, description="bytes in the kernel towards a consumer; what dies with it"
    )
    drain: float = Field(10.0, ge=0, description="seconds to give messages away after a stop signal")
    silence: float = Field(60.0, gt=0, description="seconds a producer may pause inside a message")
    status: str | None = Field(None, description="URL of the status: http:// on loopback, or https://")
    summary: Path | None = Field(None, description="file for the last status document")
    route: RouteKey | None = Field(None, description="key that decides the group of consumers, such as 8:u32le")
    spill: Path | None = Field(None, description="folder for messages while the memory is full or nobody takes them")
    spill_limit: Size | None = Field(None, description="most bytes in that folder")
    tls: Tls | None = None

    @model_validator(mode="after")
    def _consistent(self) -> BufferConfig:
        if self.status is not None:
            status = url.parse(self.status, schemes=("http", "https"))
            if not status.tls and status.host not in _LOOPBACK:
                raise ValueError(f"status: {self.status} would show everything to everybody: use https:// or 127.0.0.1")
        tls = [each for each in [*self.inputs, *self.outputs, self.status or ""] if "tls+" in each or "https:" in each]
        if tls and self.tls is None:
            raise ValueError(f"{tls[0]} needs certificates: --tls-certificate, --tls-key and --tls-ca")
        if self.tls is not None and not tls:
            raise ValueError("certificates are given, but no tls+tcp:// or https:// address uses them")
        for key, side, urls in (("producers", "in", self.inputs), ("consumers", "out", self.outputs)):
            plain = [each for each in urls if "tls+" not in each]
            if self.tls is not None and self.tls.allowed(side) is not None and plain:
                raise ValueError(
                    f"tls.{key} says who may come, but {plain[0]} asks nobody who he is: use tls+tcp:// at that side"
                )
        listening = [each for each in [*self.inputs, *self.outputs] if not each.startswith("dial+")]
        twice = {each for each in listening if listening.count(each) > 1 and not each.endswith(":0")}
        if self.route is not None and len(self.outputs) < 2:
            raise ValueError("route divides messages among the output addresses: give at least two of --out")
        if self.spill_limit is not None and self.spill is None:
            raise ValueError("spill_limit is given without spill")
        if twice:
            raise ValueError(f"{twice.pop()} is given twice: one address serves one side")
        return self


def load(path: Path) -> dict[str, Any]:
    """The content of a configuration file, not yet checked.

    Raises:
        ConfigurationError: no such file, or not a YAML mapping.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path}: expected `key: value` lines, such as `in: [tcp://127.0.0.1:5000]`")
    return content


def checked(values: dict[str, Any], source: str) -> BufferConfig:
    """The model of these values.

    Args:
        values: keys as in a configuration file.
        source: where they came from, for messages.

    Raises:
        ConfigurationError: with one line for each wrong value.
    """
    try:
        return BufferConfig.model_validate(values)
    except ValidationError as error:
        lines = []
        for problem in error.errors(include_url=False):
            where = ".".join(str(part) for part in problem["loc"])
            given = f" (given: {problem['input']!r})" if problem["loc"] and problem["type"] != "missing" else ""
            lines.append(
                f"{source}: {where + ': ' if where else ''}{problem['msg'].removeprefix('Value error, ')}{given}"
            )
        raise ConfigurationError("\n".join(lines)) from error
