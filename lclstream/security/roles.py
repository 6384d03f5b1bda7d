"""Who may do what: owners, members of an experiment, facility operators and services, by a small file.

``roles.yaml``::

    issuers:                            # short names for issuers of certificates
      s3df: "2.5.4.65=Signing Certificate,OU=lclstream,O=s3df"
      olcf: "2.5.4.65=Signing Certificate,OU=lclstream,O=olcf"
    home: s3df                          # whose logins are meant where none is named
    operators: [root, ada@olcf]
    services: [api, jobs, jobs@olcf]
    experiments:
      tmox42619: [ada, bob, carol@olcf]

This module decides, and does nothing else: no files but the one given, no network, no HTTP. What each role may do is
the table :data:`RULES`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lclstream import config_file
from lclstream.config_file import ConfigError
from lclstream.security.errors import CredentialsError
from lclstream.security.identity import Identity
from lclstream.security.stamp import stamp

log = logging.getLogger(__name__)


class Role(StrEnum):
    """What somebody is, for one thing."""

    owner = "owner"
    member = "member"
    operator = "operator"
    service = "service"


class Action(StrEnum):
    """What somebody wants to do with a thing."""

    #: See that it exists, its state, log and figures.
    see = "see"
    #: Ask for a new stream of its data.
    request = "request"
    #: Get what it holds: a job's files, a transfer's address.
    read = "read"
    #: Go on with it: renew a lease, upload files, start.
    change = "change"
    #: End it.
    cancel = "cancel"
    #: Report about it from another service.
    call_back = "call_back"


#: Which roles allow which action.
RULES: dict[Action, frozenset[Role]] = {
    Action.see: frozenset({Role.owner, Role.member, Role.operator}),
    Action.request: frozenset({Role.member, Role.operator, Role.service}),
    Action.read: frozenset({Role.owner, Role.member}),
    Action.change: frozenset({Role.owner}),
    Action.cancel: frozenset({Role.owner, Role.operator}),
    Action.call_back: frozenset({Role.service}),
}


class Person(BaseModel):
    """A login of one issuer. The same login of another issuer is somebody else.

    Attributes:
        login: user id.
        issuer: issuer's name (RFC 4514).
    """

    model_config = ConfigDict(frozen=True)

    login: str = Field(min_length=1)
    issuer: str = Field(min_length=1)

    @classmethod
    def of(cls, identity: Identity) -> Person:
        """The person a certificate names."""
        return cls(login=identity.login, issuer=identity.issuer)


@dataclass(frozen=True)
class Ruling:
    """A decision; true when allowed.

    Attributes:
        allowed: whether the action is.
        rule: why, in words for a log or a refusal.
    """

    allowed: bool
    rule: str

    def __bool__(self) -> bool:
        return self.allowed


#: Says whether somebody is a member of an experiment, for sites that keep members elsewhere, such as in the logbook.
MemberLookup = Callable[[Identity, str], bool]


class Roles(BaseModel):
    """The content of ``roles.yaml``.

    Attributes:
        issuers: short name → issuer's name (RFC 4514).
        home: short name of the issuer of logins that name none.
        operators: who looks after all jobs and transfers of this service.
        services: certificates of other services that may report to this one.
        experiments: experiment → its members.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    issuers: dict[str, str] = Field(default_factory=dict)
    home: str | None = None
    operators: tuple[Person, ...] = ()
    services: tuple[Person, ...] = ()
    experiments: dict[str, tuple[Person, ...]] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        issuers, home = data.get("issuers") or {}, data.get("home")
        if not isinstance(issuers, dict):
            raise ValueError("issuers: a mapping of short names to issuers' names is needed")
        if home is not None and not (isinstance(home, str) and home in issuers):
            raise ValueError(f"home: {home!r} is not one of the issuers: {_listed(issuers)}")
        resolved = dict(data)
        for key in ("operators", "services"):
            resolved[key] = _persons(data.get(key) or [], key, issuers, home)
        experiments = data.get("experiments") or {}
        if not isinstance(experiments, dict):
            raise ValueError("experiments: a mapping of experiments to lists of logins is needed")
        resolved["experiments"] = {
            str(name): _persons(members or [], f"experiments.{name}", issuers, home)
            for name, members in experiments.items()
        }
        return resolved

    def roles_of(
        self,
        caller: Identity,
        *,
        owner: Person | None = None,
        experiment: str | None = None,
        members: MemberLookup | None = None,
    ) -> frozenset[Role]:
        """All roles of a caller for one thing.

        Args:
            caller: who asks, by certificate.
            owner: whose the thing is.
            experiment: the experiment it belongs to.
            members: asked about members of the experiment who are not in the file.
        """
        person = Person.of(caller)
        found = set()
        if owner is not None and person == owner:
            found.add(Role.owner)
        if person in self.operators:
            found.add(Role.operator)
        if person in self.services:
            found.add(Role.service)
        if experiment is not None and (
            person in self.experiments.get(experiment, ()) or (members is not None and members(caller, experiment))
        ):
            found.add(Role.member)
        return frozenset(found)

    def may(
        self,
        caller: Identity,
        action: Action,
        *,
        owner: Person | None = None,
        experiment: str | None = None,
        members: MemberLookup | None = None,
    ) -> Ruling:
        """Whether the caller may do this; arguments as for :meth:`roles_of`.

        Tell somebody who may not even *see* a thing that it does not exist (404); tell others the ruling's words (403).
        """
        roles = self.roles_of(caller, owner=owner, experiment=experiment, members=members)
        for role in Role:
            if role in roles & RULES[action]:
                return Ruling(True, f"{caller.login} ({caller.issuer}) is {_AS[role]}")
        needed = " or ".join(_AS[role] for role in Role if role in RULES[action])
        return Ruling(
            False,
            f"to {action.value.replace('_', ' ')} this, one must be {needed}; certificate {caller.serial} names "
            f"{caller.login}, issued by {caller.issuer} (rule: {action.value})",
        )


_AS = {
    Role.owner: "its owner",
    Role.member: "a member of its experiment",
    Role.operator: "an operator",
    Role.service: "a known service",
}


def _listed(issuers: dict[str, Any]) -> str:
    return ", ".join(map(str, issuers)) or "none is listed"


def _persons(entries: Any, where: str, issuers: dict[str, str], home: str | None) -> list[Person]:
    if not isinstance(entries, (list, tuple)):
        raise ValueError(f"{where}: a list of logins is needed, found {entries!r}")
    return [entry if isinstance(entry, Person) else _person(entry, where, issuers, home) for entry in entries]


def _person(entry: Any, where: str, issuers: dict[str, str], home: str | None) -> Person:
    if not isinstance(entry, str) or not entry.strip():
        raise ValueError(f"{where}: {entry!r} is no login: write `login` or `login@issuer` in quotes")
    login, at, short = entry.strip().rpartition("@")
    if not at:
        login, short = short, home or ""
        if not short:
            raise ValueError(f"{where}: {entry!r} names no issuer, and there is no `home`: write `{entry}@issuer`")
    if short not in issuers:
        raise ValueError(f"{where}: {entry!r}: issuer {short!r} is not one of `issuers`: {_listed(issuers)}")
    if not login:
        raise ValueError(f"{where}: {entry!r} names no login")
    return Person(login=login, issuer=str(issuers[short]))


#: Without a file everybody is the owner of his own things and nothing else.
NOBODY = Roles()


def load(path: Path) -> Roles:
    """Read ``roles.yaml``.

    Raises:
        CredentialsError: the file cannot be read or is wrong; the message says where.
    """
    try:
        return config_file.load(Roles, path)
    except ConfigError as error:
        raise CredentialsError(str(error)) from error


class RolesFile:
    """``roles.yaml``, read again when it has changed.

    What is wrong while it is being edited is not used: the roles known last stay in force, and the log says so. Nor
    does a file that is removed open what it kept closed.

    Args:
        path: the file; one that is not there at the start gives nobody a role until it comes.

    Raises:
        CredentialsError: at the start, when the file is there and wrong.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen = stamp(path)
        if self._seen is None:
            log.warning("%s does not exist: nobody is operator, service or member by it", path)
        self._roles = load(path) if self._seen is not None else NOBODY

    @property
    def current(self) -> Roles:
        """The roles as the file has them now."""
        seen = stamp(self.path)
        if seen != self._seen:
            self._seen = seen
            if seen is None:
                log.error("%s does not exist any more; the roles read before stay in force", self.path)
                return self._roles
            try:
                self._roles = load(self.path)
                log.info("%s: read again", self.path)
            except CredentialsError as error:
                log.error("%s; the roles read before stay in force", error)
        return self._roles
