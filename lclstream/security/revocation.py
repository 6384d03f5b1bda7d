"""Certificates that are no longer accepted although they have not expired: ``revoked.yaml`` in a `certified` folder.

::

    - serial: "3f9c…"                    # in quotes, hexadecimal, as `openssl x509 -serial` prints it
      issuer: "2.5.4.65=Signing Certificate,OU=lclstream,O=s3df"
      since: 2026-03-01T12:00:00Z
      reason: laptop lost

The signer writes this file (`lclstream signer revoked --output`); people may too. It is looked at again at every
request: an entry counts from the next request on, also on connections that are open already.
"""

from __future__ import annotations

import datetime
import logging
import os
import re
import tempfile
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from lclstream import config_file
from lclstream.config_file import ConfigError
from lclstream.security.errors import CredentialsError
from lclstream.security.identity import Identity
from lclstream.security.stamp import stamp

log = logging.getLogger(__name__)

#: Name of the list in a `certified` folder.
FILE = "revoked.yaml"


def same_serial(text: str) -> str:
    """A serial number as :class:`.Identity` has it: lower-case hexadecimal without colons and leading zeros.

    Raises:
        ValueError: it is not hexadecimal.
    """
    digits = text.strip().removeprefix("serial=").replace(":", "").lower().removeprefix("0x")
    if not re.fullmatch(r"[0-9a-f]{1,40}", digits):
        raise ValueError(f"{text!r} is no serial number: write 1 to 40 hexadecimal digits in quotes")
    return digits.lstrip("0") or "0"


class Revocation(BaseModel):
    """One certificate that is not accepted any more.

    Attributes:
        serial: its serial number, hexadecimal.
        issuer: its issuer's name (RFC 4514), as refusals and `lclstream signer list` print it.
        since: from when on it is refused.
        reason: why, told to whoever presents it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    # Strict: YAML reads an unquoted 1234 or 12e4 as a number, and another certificate would be meant.
    serial: Annotated[str, Field(strict=True), AfterValidator(same_serial)]
    issuer: Annotated[str, Field(min_length=1, max_length=1000)]
    since: AwareDatetime
    reason: Annotated[str, Field(max_length=500)] = ""


_LIST = TypeAdapter(list[Revocation])


def load(path: Path) -> list[Revocation]:
    """The entries of a list; an empty file has none.

    Raises:
        CredentialsError: the file cannot be read, or an entry is wrong; the message says which.
    """
    try:
        document = config_file.read(path)
    except ConfigError as error:
        raise CredentialsError(str(error)) from error
    try:
        return _LIST.validate_python([] if document.value is None else document.value)
    except ValidationError as error:
        first = error.errors()[0]
        raise CredentialsError(
            f"{document.where(first['loc'])}{first['msg']} (is {str(first['input'])[:99]!r}); an entry has `serial` "
            "(hexadecimal, in quotes), `issuer`, `since` (with time zone) and `reason`"
        ) from error


def dump(entries: list[Revocation]) -> str:
    """The YAML text of a list."""
    return yaml.safe_dump(_LIST.dump_python(entries, mode="json"), sort_keys=False, allow_unicode=True)


def write(path: Path, entries: list[Revocation], *, note: str = "") -> bool:
    """Write a list in one step, mode 0644; returns False when the file said so already.

    Args:
        path: the file.
        entries: what it shall say.
        note: one line above them.

    Raises:
        OSError: it cannot be written.
    """
    text = (f"# {note}\n" if note else "") + dump(entries)
    try:
        if path.read_text(encoding="utf-8") == text:
            return False
    except (FileNotFoundError, UnicodeDecodeError):
        pass
    number, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o644)
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
    return True


class RevokedList:
    """The list of one folder, read again when its file has changed.

    A list that cannot be read, or that vanished, is no reason to accept a revoked certificate again: the entries known
    last stay in force, and the log says so. To take an entry back, write the list without it.

    Args:
        path: the file; it may be missing.

    Raises:
        CredentialsError: at the start, when the file is there and wrong.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen = stamp(self.path)
        self._entries = self._by_certificate(load(path)) if self._seen is not None else {}

    def find(self, identity: Identity, *, now: datetime.datetime | None = None) -> Revocation | None:
        """The entry that forbids this certificate at `now`, or None."""
        self._refresh()
        entry = self._entries.get((identity.serial, identity.issuer))
        if entry is None or entry.since > (now or datetime.datetime.now(datetime.UTC)):
            return None
        return entry

    @staticmethod
    def _by_certificate(entries: list[Revocation]) -> dict[tuple[str, str], Revocation]:
        # The earliest entry counts when one certificate is listed twice.
        found: dict[tuple[str, str], Revocation] = {}
        for entry in sorted(entries, key=lambda one: one.since, reverse=True):
            found[entry.serial, entry.issuer] = entry
        return found

    def _refresh(self) -> None:
        seen = stamp(self.path)
        if seen == self._seen:
            return
        self._seen = seen
        if seen is None:
            if self._entries:
                log.error("%s has vanished: its %d entries stay in force", self.path, len(self._entries))
            return
        try:
            self._entries = self._by_certificate(load(self.path))
            log.info("%s: %d revoked certificates", self.path, len(self._entries))
        except CredentialsError as error:
            log.error("%s; the %d entries read before stay in force", error, len(self._entries))
