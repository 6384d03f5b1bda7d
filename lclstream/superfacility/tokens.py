"""Tokens for clients that sign an assertion with their key (RFC 7523, `private_key_jwt`), as NERSC's OIDC gives them.

A token is a random text that means something to this process only; what is kept of it is its hash. Nothing is written
to disk: after a restart clients ask again.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
#: An assertion that is good for longer than this would let who steals it ask for tokens for long, in seconds.
_LONGEST_S = 3900
#: How much clocks may differ, in seconds.
_LEEWAY_S = 60


class RefusedClientError(PermissionError):
    """No token for this client; the message says why."""


@dataclass(frozen=True)
class _Token:
    client: str
    ends: float


class Tokens:
    """The tokens that are good now.

    Args:
        keys: client id → its public key.
        audience: the address of the token route, as clients write it.
        lifetime_s: how long a token is good for, in seconds.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        keys: Mapping[str, RSAPublicKey],
        *,
        audience: str,
        lifetime_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._keys = keys
        self._audience = audience
        self._lifetime_s = lifetime_s
        self._clock = clock
        self._tokens: dict[str, _Token] = {}
        #: Ids of assertions that were used, until they expire by themselves.
        self._used: dict[tuple[str, str], float] = {}

    def issue(self, assertion: str) -> dict[str, Any]:
        """The answer for a client that signs well: ``{"access_token", "token_type", "expires_in", "scope"}``.

        Args:
            assertion: the signed JWT.

        Raises:
            RefusedClientError: the signature, a claim or a time is wrong, or the assertion was used before.
        """
        try:
            claimed = jwt.decode(assertion, options={"verify_signature": False}).get("sub")
            key = self._keys.get(claimed) if isinstance(claimed, str) else None
            if key is None:
                raise RefusedClientError("client: this service knows no such client")
            claims = jwt.decode(
                assertion,
                key,
                algorithms=["RS256"],
                audience=self._audience,
                issuer=claimed,
                leeway=_LEEWAY_S,
                options={"require": ["iss", "sub", "aud", "exp", "iat", "jti"]},
            )
        except jwt.InvalidTokenError as error:
            raise RefusedClientError(f"client_assertion: {error}") from error
        now = self._clock()
        if claims["exp"] - now > _LONGEST_S:
            raise RefusedClientError(f"client_assertion: exp is more than {_LONGEST_S} s away")
        self._tidy(now)
        use = (str(claimed), str(claims["jti"]))
        if use in self._used:
            raise RefusedClientError("client_assertion: it was used before (jti)")
        self._used[use] = claims["exp"] + _LEEWAY_S
        token = secrets.token_urlsafe(32)
        self._tokens[_digest(token)] = _Token(str(claimed), now + self._lifetime_s)
        return {
            "access_token": token,
            "token_type": "Bearer",
            "expires_in": int(self._lifetime_s),
            "scope": "",
        }

    def client_of(self, token: str) -> str | None:
        """The id of the client a token was given to; None when it is not good (any more)."""
        known = self._tokens.get(_digest(token))
        return known.client if known is not None and known.ends > self._clock() else None

    def _tidy(self, now: float) -> None:
        self._used = {use: ends for use, ends in self._used.items() if ends > now}
        self._tokens = {digest: token for digest, token in self._tokens.items() if token.ends > now}


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
