"""What a signer or its client can fail with.

::

    RefusedError (Exception)   the signer does not do what was asked; `rule` says by which rule

A configuration, a signing key or a socket's folder that cannot be used is a :class:`lclstream.config_file.ConfigError`.
"""

from __future__ import annotations


class RefusedError(Exception):
    """A request that is not fulfilled.

    Attributes:
        rule: short name of the rule that forbids it.
    """

    def __init__(self, rule: str, detail: str) -> None:
        super().__init__(detail)
        self.rule = rule
