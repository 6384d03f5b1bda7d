"""What travels over the signer's socket: one line of JSON there, one line back, then the connection is closed.

A request names no user: the kernel does. Nothing secret travels in either direction.
"""

from __future__ import annotations

import datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from lclstream.security.revocation import Revocation, same_serial
from lclstream.signer.errors import RefusedError

#: Bytes of a request.
REQUEST_BYTES = 64 * 1024
#: Bytes of an answer; a list of signatures may be long.
ANSWER_BYTES = 16 << 20

_Serial = Annotated[str, Field(strict=True), AfterValidator(same_serial)]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Sign(_Message):
    """Sign my key.

    Attributes:
        key: a certificate request, a certificate or a public key (PEM); only its public key is used.
        hours: how long; the signer's usual time when None.
    """

    do: Literal["sign"] = "sign"
    key: str = Field(min_length=1, max_length=32 * 1024)
    hours: float | None = Field(default=None, gt=0, allow_inf_nan=False)


class Revoke(_Message):
    """Revoke one certificate, or all of a login that are valid now.

    Attributes:
        serial: the certificate's serial number.
        login: whose certificates.
        reason: why; told to whoever presents one of them.
    """

    do: Literal["revoke"] = "revoke"
    serial: _Serial | None = None
    login: str | None = Field(default=None, min_length=1, max_length=255)
    reason: str = Field(default="", max_length=500)


class Check(_Message):
    """Ask about one certificate."""

    do: Literal["check"] = "check"
    serial: _Serial


class Revoked(_Message):
    """Ask for the list of revoked certificates that have not expired."""

    do: Literal["revoked"] = "revoked"


class List(_Message):
    """Ask for signatures, newest first.

    Attributes:
        all: everybody's, not only mine.
        limit: at most so many.
    """

    do: Literal["list"] = "list"
    all: bool = False
    limit: int = Field(default=100, ge=1, le=10_000)


Request = Sign | Revoke | Check | Revoked | List
_REQUEST: TypeAdapter[Request] = TypeAdapter(Annotated[Request, Field(discriminator="do")])


class Signature(_Message):
    """A row of the table.

    Attributes:
        serial: the certificate's serial number, hexadecimal.
        login: whose it is.
        uid: the user's number when it was signed.
        pid: the process that asked.
        issuer: who signed (RFC 4514).
        key_sha256: the public key's digest (SubjectPublicKeyInfo).
        form: what was sent: ``request``, ``certificate`` or ``key``.
        signed: when.
        not_before: valid from.
        not_after: valid until.
        revoked: since when it is not; None while it is.
        reason: why it was revoked.
    """

    serial: str
    login: str
    uid: int
    pid: int
    issuer: str
    key_sha256: str
    form: str
    signed: AwareDatetime
    not_before: AwareDatetime
    not_after: AwareDatetime
    revoked: AwareDatetime | None = None
    reason: str = ""

    def valid_at(self, now: datetime.datetime) -> bool:
        """Whether a service should accept it."""
        return self.not_before <= now < self.not_after and (self.revoked is None or now < self.revoked)


class Answer(_Message):
    """The signer's answer; what was not asked for is empty.

    Attributes:
        ok: whether the request was fulfilled.
        rule: the rule that forbade it.
        detail: why, in words.
        certificate: the signed certificate (PEM).
        issuer: the signer's own certificate (PEM).
        services: addresses of services by name.
        services_issuer: certificate of the issuer of their certificates (PEM).
        signatures: what was asked about.
        revoked: the list of revoked certificates.
        unwritten: lists on this machine that could not be brought up to date.
    """

    ok: bool
    rule: str = ""
    detail: str = ""
    certificate: str = ""
    issuer: str = ""
    services: dict[str, str] = Field(default_factory=dict)
    services_issuer: str = ""
    signatures: list[Signature] = Field(default_factory=list)
    revoked: list[Revocation] = Field(default_factory=list)
    unwritten: list[str] = Field(default_factory=list)

    def line(self) -> bytes:
        """The bytes that travel."""
        return self.model_dump_json(exclude_defaults=True).encode() + b"\n"


def parse(line: bytes) -> Request:
    """Read a request.

    Raises:
        RefusedError: it is none; the message repeats nothing of its content.
    """
    try:
        return _REQUEST.validate_json(line)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "request"
        raise RefusedError("form", f"{place}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise RefusedError("form", "the request is no JSON document") from error
