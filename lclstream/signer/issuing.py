"""Which public keys are signed, and what the certificate says. Of what a user sends only the public key is used."""

from __future__ import annotations

import datetime
import hashlib
import stat
from dataclasses import dataclass
from pathlib import Path

from certified import encode
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID

from lclstream.config_file import ConfigError
from lclstream.signer.errors import RefusedError

#: Clocks of machines differ: a certificate is valid from a little earlier on.
_CLOCKS_DIFFER = datetime.timedelta(minutes=5)
_CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)

PublicKey = ed25519.Ed25519PublicKey | ed448.Ed448PublicKey | ec.EllipticCurvePublicKey
_PrivateKey = ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey | ec.EllipticCurvePrivateKey


@dataclass(frozen=True)
class SentKey:
    """A user's public key.

    Attributes:
        key: the key.
        form: what it came in: ``request`` (its owner proved that he has the private key), ``certificate`` or ``key``.
    """

    key: PublicKey
    form: str

    @property
    def sha256(self) -> str:
        """Digest of the key (SubjectPublicKeyInfo), hexadecimal."""
        return _digest(self.key)


def read_key(pem: str) -> SentKey:
    """The public key in a certificate request, a certificate or a public key.

    Args:
        pem: PEM text.

    Raises:
        RefusedError: it is none of these, its signature is wrong, or its kind of key is not signed.
    """
    if "PRIVATE KEY" in pem:
        raise RefusedError(
            "private key",
            "this is a private key, which must never leave its folder: make a new one",
        )
    data = pem.encode()
    try:
        if "CERTIFICATE REQUEST" in pem:
            request = x509.load_pem_x509_csr(data)
            if not request.is_signature_valid:
                raise RefusedError("proof", "the request is not signed with the key it holds")
            key: object = request.public_key()
            form = "request"
        elif "BEGIN CERTIFICATE" in pem:
            key, form = x509.load_pem_x509_certificate(data).public_key(), "certificate"
        else:
            key, form = load_pem_public_key(data), "key"
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature, x509.InvalidVersion) as error:
        raise RefusedError("form", "no certificate request, certificate or public key (PEM) can be read") from error
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, _CURVES):
        return SentKey(key, form)
    if isinstance(key, (ed25519.Ed25519PublicKey, ed448.Ed448PublicKey)):
        return SentKey(key, form)
    raise RefusedError("kind of key", "only Ed25519, Ed448 and elliptic-curve keys (P-256, P-384, P-521) are signed")


def read_certificate(path: Path) -> str:
    """A certificate (PEM) in a file.

    Raises:
        ConfigError: there is none.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes()).public_bytes(Encoding.PEM).decode()
    except (OSError, ValueError, x509.InvalidVersion) as error:
        raise ConfigError(f"services_issuer: {path} cannot be read as a certificate (PEM): {error}") from error


class Authority:
    """The signing key.

    Args:
        folder: holds ``CA.crt`` and ``CA.key``, as ``certified init`` makes them.

    Raises:
        ConfigError: they are missing, do not fit each other, can be read by others, or sign nothing.
    """

    def __init__(self, folder: Path) -> None:
        certificate, key = folder / "CA.crt", folder / "CA.key"
        try:
            mode = stat.S_IMODE(key.stat().st_mode)
            if mode & 0o077:
                raise ConfigError(f"{key} has mode {mode:04o}: others can read it; run `chmod 600 {key}`")
            self.certificate = x509.load_pem_x509_certificate(certificate.read_bytes())
            private = load_pem_private_key(key.read_bytes(), None)
        except OSError as error:
            raise ConfigError(
                f"authority {folder}: {error.strerror}: {error.filename}; "
                f"make one with `certified init --config {folder}`"
            ) from error
        except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"authority {folder}: CA.crt or CA.key cannot be read: {error}") from error
        if not isinstance(private, (ed25519.Ed25519PrivateKey, ed448.Ed448PrivateKey, ec.EllipticCurvePrivateKey)):
            raise ConfigError(f"{key}: only Ed25519, Ed448 and elliptic-curve keys sign here")
        if _digest(private.public_key()) != _digest(self.certificate.public_key()):
            raise ConfigError(f"{certificate} and {key} do not belong together")
        if not encode.get_is_ca(self.certificate):
            raise ConfigError(f"{certificate} may not sign others: it is no CA certificate")
        self._private: _PrivateKey = private

    @property
    def name(self) -> str:
        """The issuer's name (RFC 4514), as identities have it."""
        return self.certificate.subject.rfc4514_string()

    @property
    def pem(self) -> str:
        """The signing certificate."""
        return self.certificate.public_bytes(Encoding.PEM).decode()

    def sign(self, sent: SentKey, login: str, hours: float, *, now: datetime.datetime) -> x509.Certificate:
        """A certificate for a login: for clients only, with no name but the login.

        Without host names it cannot pose as a service of the site, whatever its owner does with it.

        Raises:
            RefusedError: the authority itself has expired.
        """
        end = min(now + datetime.timedelta(hours=hours), self.certificate.not_valid_after_utc)
        if end <= now:
            raise RefusedError(
                "authority", f"the signer's own certificate expired at {end.isoformat()}: tell its operator"
            )
        if sent.sha256 == _digest(self.certificate.public_key()):
            raise RefusedError("key", "this is the signer's own key")
        subject_key = x509.SubjectKeyIdentifier.from_public_key(sent.key)
        builder = (
            x509.CertificateBuilder()
            .subject_name(encode.person_name(login, uname=login))
            .issuer_name(self.certificate.subject)
            .public_key(sent.key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(max(now - _CLOCKS_DIFFER, self.certificate.not_valid_before_utc))
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(
                x509.KeyUsage(
                    digital_signature=True,
                    content_commitment=False,
                    key_encipherment=False,
                    data_encipherment=False,
                    key_agreement=False,
                    key_cert_sign=False,
                    crl_sign=False,
                    encipher_only=False,
                    decipher_only=False,
                ),
                critical=True,
            )
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
            .add_extension(subject_key, critical=False)
            .add_extension(encode.get_aki(self.certificate), critical=False)
        )
        algorithm = None
        if isinstance(self._private, ec.EllipticCurvePrivateKey):
            algorithm = hashes.SHA256() if self._private.curve.key_size <= 256 else hashes.SHA512()
        return builder.sign(self._private, algorithm)


def _digest(key: object) -> str:
    return hashlib.sha256(
        key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)  # type: ignore[attr-defined]
    ).hexdigest()
