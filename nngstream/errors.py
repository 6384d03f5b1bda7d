"""What can go wrong in the buffer.

- ``BufferProgramError``
    - ``ConfigurationError``: an option is wrong; nothing was started (exit 2)
    - ``ListenError``: an address cannot be listened at (exit 3)
    - ``WireError``: a peer does not speak our protocols, or broke them; it alone is cut off
        - ``OversizeError``: its message can never fit
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


class InterruptedWaitError(BufferProgramError):
    """The wait was given up, because the connection or the buffer ends."""
