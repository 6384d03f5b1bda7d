"""Asking the signer, and installing its answer into a `certified` folder.

The private key is made here, in the user's folder, with mode 0600, and is used once more to sign the request. What is
installed is checked first: the certificate must be for our key and our login, and signed by the issuer that came along.
"""

from __future__ import annotations

import datetime
import logging
import os
import pwd
import socket
import stat
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from certified import encode
from certified.models import TrustedService
from certified.serial import cert_to_b64
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from pydantic import ValidationError

from lclstream.security.errors import AuthenticationError, CredentialsError, UnreachableError
from lclstream.security.identity import Identity
from lclstream.signer.errors import RefusedError
from lclstream.signer.peer import peer_of
from lclstream.signer.wire import ANSWER_BYTES, Answer, Request, Sign

log = logging.getLogger(__name__)

#: Seconds an answer may take.
TIMEOUT_S = 15.0

_PrivateKey = ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey | ec.EllipticCurvePrivateKey


def ask(path: Path, request: Request, *, timeout: float = TIMEOUT_S) -> Answer:
    """Send one request to the signer at a socket and return its answer.

    Raises:
        UnreachableError: nobody listens there, or does not answer in time.
        AuthenticationError: somebody listens there who is not trusted: neither root nor the owner of the folder, or
            others can write to the folder.
        RefusedError: the signer does not do it.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(timeout)
        try:
            connection.connect(str(path))
            _trusted(path, connection)
            connection.sendall(request.model_dump_json().encode() + b"\n")
            received = bytearray()
            while not received.endswith(b"\n"):
                data = connection.recv(65536)
                if not data or len(received) > ANSWER_BYTES:
                    raise UnreachableError(f"signer at {path}: closed the connection before it answered")
                received += data
        except UnreachableError:
            raise
        except AuthenticationError:
            raise
        except TimeoutError as error:
            raise UnreachableError(f"signer at {path}: no answer within {timeout:g} s") from error
        except OSError as error:
            raise UnreachableError(
                f"signer at {path}: {error.strerror or error}. Is it running (`lclstream signer serve`), "
                "and is this its socket (--socket)?"
            ) from error
    try:
        answer = Answer.model_validate_json(bytes(received))
    except ValidationError as error:
        raise UnreachableError(f"signer at {path}: its answer cannot be read; is it of another version?") from error
    if not answer.ok:
        raise RefusedError(answer.rule, answer.detail)
    return answer


def _trusted(path: Path, connection: socket.socket) -> None:
    folder = path.parent.stat()
    if stat.S_IMODE(folder.st_mode) & 0o022:
        raise AuthenticationError(f"{path.parent}: others can write there, so that anybody could pose as the signer")
    uid = peer_of(connection).uid
    if uid not in (0, folder.st_uid):
        raise AuthenticationError(
            f"signer at {path}: run by user {uid}, who is neither root nor the owner of {path.parent}: not trusted"
        )


@dataclass(frozen=True)
class Installed:
    """What was installed.

    Attributes:
        certificate: path of the certificate.
        serial: its serial number.
        login: whose it is.
        until: when it expires.
        services: files that name services.
        notes: what the user should know.
    """

    certificate: Path
    serial: str
    login: str
    until: datetime.datetime
    services: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def remaining(folder: Path) -> datetime.timedelta:
    """For how long the certificate in a folder is still valid; nothing when there is none, or no key for it."""
    try:
        certificate = x509.load_pem_x509_certificate((folder / "id.crt").read_bytes())
        key = _load(folder / "id.key")
    except (OSError, ValueError, x509.InvalidVersion):
        return datetime.timedelta()
    if _public(certificate.public_key()) != _public(key.public_key()):
        return datetime.timedelta()
    return max(datetime.timedelta(), certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC))


def request_certificate(
    socket_path: Path, folder: Path, *, hours: float | None = None, new_key: bool = False
) -> Installed:
    """Have a key signed and install the certificate.

    A folder whose certificate was signed by somebody else keeps it: ours is then installed beside it, as an
    introduction (``id/<issuer>.crt``).

    Args:
        socket_path: the signer's socket.
        folder: a `certified` folder; it is made when missing.
        hours: how long the certificate shall be valid; the signer's usual time when None.
        new_key: make a new private key; else the folder's is used when it has one.

    Raises:
        UnreachableError, AuthenticationError, RefusedError: as :func:`ask`.
        CredentialsError: the folder cannot be used, or the answer does not fit what was asked.
    """
    folder = folder.expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        introductions = sorted((folder / "id").glob("*.crt"))
        fresh = new_key or not (folder / "id.key").exists()
        if fresh and introductions:
            raise CredentialsError(
                f"{introductions[0]}: introductions belong to the present key and would be of no use with a new one: "
                "move them away first, or keep the key"
            )
        key: _PrivateKey = ed25519.Ed25519PrivateKey.generate() if fresh else _load(folder / "id.key")
        login = pwd.getpwuid(os.geteuid()).pw_name
        answer = ask(socket_path, Sign(key=_request(key, login), hours=hours))
        certificate, issuer = _checked(answer, key, login)
        return _install(folder, key if fresh else None, certificate, issuer, answer)
    except KeyError as error:
        raise CredentialsError(f"user {os.geteuid()} has no login on this machine") from error
    except UnreachableError:
        raise
    except AuthenticationError:
        raise
    except OSError as error:
        raise CredentialsError(f"{error.filename or folder}: {error.strerror}") from error


def _request(key: _PrivateKey, login: str) -> str:
    builder = x509.CertificateSigningRequestBuilder().subject_name(encode.person_name(login, uname=login))
    algorithm = hashes.SHA256() if isinstance(key, ec.EllipticCurvePrivateKey) else None
    return builder.sign(key, algorithm).public_bytes(Encoding.PEM).decode()


def _checked(answer: Answer, key: _PrivateKey, login: str) -> tuple[x509.Certificate, x509.Certificate]:
    try:
        certificate = x509.load_pem_x509_certificate(answer.certificate.encode())
        issuer = x509.load_pem_x509_certificate(answer.issuer.encode())
        certificate.verify_directly_issued_by(issuer)
        identity = Identity.of_certificate(certificate.public_bytes(Encoding.DER))
        if answer.services_issuer:
            x509.load_pem_x509_certificate(answer.services_issuer.encode())
    except (ValueError, TypeError, InvalidSignature, x509.InvalidVersion) as error:
        raise CredentialsError(f"the signer's answer cannot be used: {error}; nothing was changed") from error
    if _public(certificate.public_key()) != _public(key.public_key()):
        raise CredentialsError("the signer signed another key than ours; nothing was changed")
    if identity.login != login:
        raise CredentialsError(f"the signer signed for {identity.login!r}, and we are {login!r}; nothing was changed")
    return certificate, issuer


def _install(
    folder: Path, fresh: _PrivateKey | None, certificate: x509.Certificate, issuer: x509.Certificate, answer: Answer
) -> Installed:
    pem = certificate.public_bytes(Encoding.PEM)
    target, auths, notes = folder / "id.crt", [], []
    if fresh is None and target.exists() and not _issued_by(target, issuer):
        name = encode.rfc4514name(issuer.subject)
        target, auths = folder / "id" / f"{name}.crt", [name]
        notes.append(f"{folder / 'id.crt'} was signed by somebody else and is kept; the new one is an introduction")
    for side in {folder / "known_servers", target.parent}:
        side.mkdir(exist_ok=True, mode=0o700)
    if fresh is not None:
        # Both are ready before the first is put in place: between the two lies no more than a moment.
        key_pem = fresh.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        ready = [(_ready(folder / "id.key", key_pem, 0o600), folder / "id.key"), (_ready(target, pem, 0o644), target)]
        for beside, final in ready:
            os.replace(beside, final)
    else:
        os.replace(_ready(target, pem, 0o644), target)
    vouches = x509.load_pem_x509_certificate(answer.services_issuer.encode()) if answer.services_issuer else issuer
    mark = vouches.fingerprint(hashes.SHA256()).hex()[:12]
    trusted = folder / "known_servers" / f"signer-{mark}.crt"
    os.replace(_ready(trusted, vouches.public_bytes(Encoding.PEM), 0o644), trusted)
    services = []
    for name, url in sorted(answer.services.items()):
        path = folder / "known_servers" / f"{Path(name).name}.yaml"
        entry = TrustedService(url=url, cert=cert_to_b64(vouches), auths=auths).model_dump()
        if path.exists() and _url_in(path) != url:
            notes.append(f"{path} names another address than the signer ({url}) and is kept")
            continue
        os.replace(_ready(path, yaml.safe_dump(entry).encode(), 0o644), path)
        services.append(path)
    return Installed(
        certificate=target,
        serial=f"{certificate.serial_number:x}",
        login=Identity.of_certificate(certificate.public_bytes(Encoding.DER)).login,
        until=certificate.not_valid_after_utc,
        services=services,
        notes=notes,
    )


def _issued_by(path: Path, issuer: x509.Certificate) -> bool:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes()).issuer == issuer.subject
    except (ValueError, x509.InvalidVersion):
        # Damaged: nothing is lost by replacing it.
        return True


def _url_in(path: Path) -> str | None:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError):
        return None
    return str(document.get("url")) if isinstance(document, dict) else None


def _ready(path: Path, content: bytes, mode: int) -> Path:
    """The content in a new file beside `path`, with its mode from the first moment on, ready to replace it."""
    number, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.")
    with os.fdopen(number, "wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return Path(name)


def _load(path: Path) -> _PrivateKey:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise CredentialsError(f"key {path} has mode {mode:04o}: others can read it; run `chmod 600 {path}`")
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise CredentialsError(f"key {path} cannot be read: {error}; --new-key makes another one") from error
    if not isinstance(key, (ed25519.Ed25519PrivateKey, ed448.Ed448PrivateKey, ec.EllipticCurvePrivateKey)):
        raise CredentialsError(f"key {path} is of a kind that is not signed: --new-key makes another one")
    return key


def _public(key: object) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)  # type: ignore[attr-defined, no-any-return]
