"""Who may push into and pull from a transfer's encrypted buffers.

Decided once, when the transfer is asked for: its owner and the members of its experiment by the rule for reading
(:data:`lclstream.security.roles.RULES`), then those the request names, and those the site lets pull every transfer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from lclstream.api import launch
from lclstream.api.config import ApiConfig
from lclstream.config_file import ConfigError
from lclstream.security.credentials import Credentials
from lclstream.security.identity import Identity
from lclstream.security.roles import RULES, Action, Person, Role, Roles
from nngstream.config import Allowed

#: For each side of a buffer who may come; None: whoever has a certificate of an issuer the buffer trusts.
Access = dict[str, list[dict[str, str]] | None]


def person(text: str, home: str, issuers: Mapping[str, str]) -> Person:
    """Somebody by ``login``, ``login@short name of an issuer`` or ``login@issuer's name (RFC 4514)``.

    Args:
        text: the words.
        home: issuer of a login that names none (RFC 4514).
        issuers: short names, as in ``roles.yaml``.

    Raises:
        ValueError: the issuer is none of those, or there is no login.
    """
    allowed = Allowed.model_validate(text)
    if allowed.issuer is not None:
        return Person(login=allowed.login, issuer=allowed.issuer)
    login, at, short = allowed.login.rpartition("@")
    if not at:
        return Person(login=short, issuer=home)
    if not login or short not in issuers:
        known = ", ".join(issuers) or "none is listed in a roles file"
        raise ValueError(
            f"{text!r}: {short!r} is no short name of an issuer ({known}): write `login`, or `login@` and the issuer's "
            "whole name, such as `ada@CN=site`"
        )
    return Person(login=login, issuer=issuers[short])


def access(
    owner: Identity, experiment: str | None, named: Iterable[str], roles: Roles, service: ApiConfig
) -> Access | None:
    """Who may come to the buffers of a new transfer; None: their sockets are plain and ask nobody.

    Args:
        owner: who asks for it.
        experiment: whose data they are, if that is known.
        named: logins the owner names; one without an issuer is of the owner's.
        roles: members of experiments, and short names of issuers.
        service: the site's configuration.

    Raises:
        ValueError: a name that cannot be understood.
        ConfigError: the same in the site's configuration, or nobody knows who the engine is.
    """
    readers = {Person.of(owner)} if Role.owner in RULES[Action.read] else set()
    if experiment is not None and Role.member in RULES[Action.read]:
        readers.update(roles.experiments.get(experiment, ()))
    readers.update(person(text, owner.issuer, roles.issuers) for text in named)
    if service.ports.scheme != "tls+tcp":
        return None
    site = _of_the_site(service, roles)
    return {
        "producers": _listed([_engine(service, roles)]),
        "consumers": None if site is None else _listed({*readers, *site}),
    }


def check(service: ApiConfig, roles: Roles) -> None:
    """Find out at the start what would fail at every request.

    Raises:
        ConfigError: a name in the configuration cannot be understood, or nobody knows who the engine is.
    """
    if service.ports.scheme == "tls+tcp":
        _of_the_site(service, roles)
        _engine(service, roles)


def _of_the_site(service: ApiConfig, roles: Roles) -> list[Person] | None:
    if service.ports.readers == "anyone-trusted":
        return None
    if service.ports.readers == "owner":
        return []
    return [_configured("ports.readers", text, service, roles) for text in service.ports.readers]


def _engine(service: ApiConfig, roles: Roles) -> Person:
    if service.engine.identity is not None:
        return _configured("engine.identity", service.engine.identity, service, roles)
    certificate = launch.engine_folder(service) / "id.crt"
    try:
        return Person.of(_identity(certificate.read_bytes()))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{certificate} cannot be read here ({error}): name the login in the engine's certificate with "
            "`engine: {identity: LOGIN}`, since nobody else may push into its buffers"
        ) from error


def _configured(key: str, text: str, service: ApiConfig, roles: Roles) -> Person:
    home = roles.issuers[roles.home] if roles.home is not None else ""
    try:
        if not home:
            home = _identity(Credentials(service.credentials).certificate.read_bytes()).issuer
        return person(text, home, roles.issuers)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: {error}") from error


def _identity(pem: bytes) -> Identity:
    return Identity.of_certificate(x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER))


def _listed(persons: Iterable[Person]) -> list[dict[str, str]]:
    return [each.model_dump() for each in sorted(persons, key=lambda each: (each.issuer, each.login))]
