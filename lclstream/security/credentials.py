"""TLS contexts from a folder in the layout of the published `certified` package.

==============================  ==========================================================================
``id.crt``, ``id.key`` (0600)   our certificate and key
``id/<issuer>.crt``             our certificate as another site signed it, for that site's services
``known_clients/*.crt``         issuers whose certificates may call our services
``known_servers/*.crt``         issuers whose services we may call
``known_servers/<name>.yaml``   one service: `url`, `cert` (its issuer, url-safe base64 DER), `auths` (whose
                                signature it wants to see on our certificate)
==============================  ==========================================================================
"""

from __future__ import annotations

import base64
import datetime
import ssl
import stat
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import yaml
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from pydantic import BaseModel, ConfigDict, field_validator

from lclstream.security.errors import CredentialsError


class TrustedService(BaseModel):
    """An entry of ``known_servers/``.

    `certified.models` has the same model. Importing it brings in `certified`'s own clients and servers, which takes
    half a second: too long for programs that do nothing but a call, such as every task of a DAG.
    """

    model_config = ConfigDict(extra="ignore")

    url: str
    cert: str | None = None
    auths: list[str] = []

    @field_validator("cert")
    @classmethod
    def _pem(cls, text: str | None) -> str | None:
        """Make the issuer's certificate, url-safe base64 (DER), into PEM."""
        if text is None:
            return None
        der = base64.b64decode(text, altchars=b"-_", validate=True)
        return x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM).decode()


class Credentials:
    """One program's identity: its certificate, its key, and whom it trusts.

    Args:
        folder: a `certified` folder. It is read each time a context is made, so a renewed certificate is used by the
            next connection.

    Raises:
        CredentialsError: the folder, the certificate or the key is missing, or the key can be read by others.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise CredentialsError(
                f"certificate folder {self.folder} does not exist: "
                f"make one with `certified init --config {self.folder}`"
            )
        for name in ("id.crt", "id.key"):
            if not (self.folder / name).is_file():
                raise CredentialsError(f"certificate folder {self.folder} has no {name}: run `certified init` for it")
        self.check_key()

    def check_key(self) -> None:
        """Refuse a key that others can read.

        Raises:
            CredentialsError: its mode allows it; the message says what to do.
        """
        mode = stat.S_IMODE(self.key.stat().st_mode)
        if mode & 0o077:
            raise CredentialsError(
                f"key {self.key} has mode {mode:04o}: others can read it; run `chmod 600 {self.key}`"
            )

    @property
    def certificate(self) -> Path:
        """Path of our own certificate (PEM)."""
        return self.folder / "id.crt"

    @property
    def key(self) -> Path:
        """Path of our key (PEM, mode 0600)."""
        return self.folder / "id.key"

    def expiry(self) -> datetime.datetime | None:
        """When our own certificate expires (UTC); None when it cannot be read now."""
        try:
            return x509.load_pem_x509_certificate(self.certificate.read_bytes()).not_valid_after_utc
        except (OSError, ValueError, x509.InvalidVersion):
            return None

    def server_context(self) -> ssl.SSLContext:
        """A context for a server that demands a certificate from every client."""
        return self.server_context_for(self._issuers("known_clients"))

    def server_context_for(self, issuers: str) -> ssl.SSLContext:
        """The same, for clients of these issuers only.

        Args:
            issuers: certificates (PEM), one after the other; an empty text trusts nobody.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        # A resumed session is not verified again: a client could come back after its issuer was removed.
        context.num_tickets = 0
        context.load_cert_chain(self.certificate, self.key)
        if issuers:
            context.load_verify_locations(cadata=issuers)
        return context

    def client_context(self, url: str) -> ssl.SSLContext:
        """A context for calling the service at `url`.

        A service listed in ``known_servers/<name>.yaml`` is verified against its own issuer and shown the certificate
        that an issuer of its choice signed; any other against all known issuers, with our own certificate. For a stream
        (``tls+tcp://``) an entry with the same host is enough, whatever its port.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        self.fill_client_context(context, url)
        return context

    def fill_client_context(self, context: ssl.SSLContext, url: str) -> None:
        """Give a client's context the certificate and the issuers that the folder holds now for the service at `url`.

        A context in use takes a renewed certificate for its next connection this way. Issuers are only added: one that
        was removed is trusted until a new context is made.
        """
        service = self._known_service(url)
        chain = self.certificate if service is None else self._signed_by(service)
        own_issuer = None if service is None else service.cert
        issuers = own_issuer or self._issuers("known_servers")
        context.load_cert_chain(chain, self.key)
        context.load_verify_locations(cadata=issuers)

    def _issuers(self, side: str) -> str:
        certificates = sorted((self.folder / side).glob("*.crt"))
        if not certificates:
            raise CredentialsError(
                f"{self.folder / side} names no issuer (*.crt): nobody could be trusted; "
                "copy the site's CA.crt there, or use `certified add-client` / `certified set-org`"
            )
        return "\n".join(path.read_text() for path in certificates)

    def _services(self) -> Iterator[TrustedService]:
        for path in sorted((self.folder / "known_servers").glob("*.yaml")):
            try:
                yield TrustedService.model_validate(yaml.safe_load(path.read_text()))
            except (ValueError, yaml.YAMLError) as error:
                raise CredentialsError(f"{path}: not a service entry of `certified`: {error}") from error

    def _known_service(self, url: str) -> TrustedService | None:
        wanted = urlsplit(url)
        same_host = None
        for service in self._services():
            known = urlsplit(service.url)
            if known.hostname != wanted.hostname:
                continue
            if known.port == wanted.port:
                return service
            same_host = same_host or service
        # A stream has another port each time: what the folder says about its host holds for it.
        return same_host if wanted.scheme == "tls+tcp" else None

    def _signed_by(self, service: TrustedService) -> Path:
        if not service.auths:
            return self.certificate
        for issuer in service.auths:
            path = self.folder / "id" / f"{issuer}.crt"
            if path.is_file():
                return path
        raise CredentialsError(
            f"{service.url} wants a certificate signed by {' or '.join(service.auths)}, "
            f"and {self.folder / 'id'} has none: "
            "ask that site for an introduction and install it with `certified add-intro`"
        )
