"""Signatures of callbacks: ``x-hub-signature-256: sha256=<HMAC of the raw body>``."""

from __future__ import annotations

import hashlib
import hmac


def sign(body: bytes, secret: str) -> str:
    """Value of ``x-hub-signature-256`` for a body."""
    return "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


def is_signed(body: bytes, secret: str, signature: str | None) -> bool:
    """Whether a body came with the right signature."""
    return signature is not None and hmac.compare_digest(sign(body, secret).encode(), signature.encode())
