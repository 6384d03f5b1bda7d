"""What can go wrong in the buffer.

- ``BufferProgramError``
    - ``ConfigurationError``: an option is wrong; nothing was started (exit 2)
    - ``ListenError``: an address cannot be listened at (exit 3)
    - ``WireError``: a peer does not speak our protocols, or broke them; it alone is cut off
        - ``OversizeError``: its message can never fit
        - ``NotAllowedError``: its certificate is in order, and this stream is not for its owner
    - ``InterruptedWaitError``: the buffer stops while somebody waits
"""

from __future__ import annotations


class BufferProgramError(Exception):
    """Everything the buffer raises on purpose."""


class ConfigurationError(BufferProgramError, ValueError):
    """An option or a configuration file is wrong; the message names key, value and remedy."""


class ListenError(BufferProgramError, OSError):
    """An address cannot be listened at."""


class WireError(BufferProgramError, ValueError):
    """A peer sent what its protocol does not allow."""


class OversizeError(WireError):
    """A message is larger than the whole buffer."""


class NotAllowedError(WireError):
    """A peer whose certificate we trust, and whom the list of its side does not name.

    Attributes:
        login: whom its certificate names.
        issuer: who signed that (RFC 4514).
        rule: the list, as the configuration calls it.
    """

    def __init__(self, text: str, login: str, issuer: str, rule: str) -> None:
        super().__init__(text)
        self.login = login
        self.issuer = issuer
        self.rule = rule


class InterruptedWaitError(BufferProgramError):
    """The wait was given up, because the connection or the buffer ends."""
