"""Signatures of the job service's callbacks: an HMAC over the raw body, with a secret that only one job knows."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets

HEADER = "x-hub-signature-256"
_FORM = re.compile(r"sha256=([0-9a-f]{64})")


def new_secret() -> str:
    """A secret for one job's callbacks."""
    return secrets.token_urlsafe(32)


def signature(secret: str, body: bytes) -> str:
    """The header's value for a body."""
    return "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


def is_signed(secret: str, body: bytes, header: str | None) -> bool:
    """Whether that header was made with that secret for exactly these bytes."""
    match = _FORM.fullmatch(header or "")
    return match is not None and hmac.compare_digest(f"sha256={match[1]}", signature(secret, body))
