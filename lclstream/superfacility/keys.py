"""A client's two halves of a key: the secret one in the form the published client reads, the other for the service."""

from __future__ import annotations

import os
import secrets
import string
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

#: The published client takes ids of this length only.
ID_LENGTH = 13
_BITS = 2048


def make_client(folder: Path, name: str) -> tuple[str, Path, Path]:
    """Make a client: a random id and a new key.

    Args:
        folder: where both halves are written; made when it is missing.
        name: file name without its end.

    Returns:
        The client's id; ``NAME.pem`` (mode 0600: the id in the first line, then the secret key); ``NAME.pub``.

    Raises:
        FileExistsError: there is such a client; nothing is overwritten.
        OSError: the folder cannot be written.
    """
    alphabet = string.ascii_lowercase + string.digits
    client_id = "".join(secrets.choice(alphabet) for _ in range(ID_LENGTH))
    key = rsa.generate_private_key(public_exponent=65537, key_size=_BITS)
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    paths = folder / f"{name}.pem", folder / f"{name}.pub"
    for path, mode, data in zip(paths, (0o600, 0o644), (client_id.encode() + b"\n" + secret, public), strict=True):
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
    return client_id, *paths
