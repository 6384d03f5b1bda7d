"""TLS contexts for stream sockets from a certificate folder."""

from __future__ import annotations

import os
import ssl
from collections.abc import Sequence
from pathlib import Path

from lclstream.client.address import parse
from lclstream.client.errors import AddressError

CREDENTIALS_VARIABLE = "LCLSTREAM_CREDENTIALS"


def context_for(urls: Sequence[str], credentials: Path | None, *, listen: bool) -> ssl.SSLContext | None:
    """The context for ``tls+tcp`` addresses; None when no address is encrypted.

    Args:
        urls: the addresses; all encrypted ones are dialled with the same certificate.
        credentials: a `certified` folder; None: the one that the environment's ``LCLSTREAM_CREDENTIALS`` names.
        listen: whether we listen at them.

    Raises:
        AddressError: an encrypted address, and no folder.
        CredentialsError: the folder is incomplete or its key readable by others.
    """
    encrypted = [url for url in urls if parse(url, listen=listen).tls]
    if not encrypted:
        return None
    if credentials is None and os.environ.get(CREDENTIALS_VARIABLE):
        credentials = Path(os.environ[CREDENTIALS_VARIABLE])
    if credentials is None:
        raise AddressError(
            f"{encrypted[0]} is encrypted: name the folder of your certificate (--credentials FOLDER, or "
            f"{CREDENTIALS_VARIABLE} in the environment)"
        )
    from lclstream.security.credentials import Credentials

    folder = Credentials(credentials)
    return folder.server_context() if listen else folder.client_context(encrypted[0])
