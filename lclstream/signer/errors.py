"""What a signer or its client can fail with.

::

    ConfigError (ValueError)   the signer's configuration or signing key cannot be used
    RefusedError (Exception)   the signer does not do what was asked; `rule` says by which rule
"""

from __future__ import annotations


class ConfigError(ValueError):
    """The signer's configuration, its signing key or its socket's folder cannot be used."""


class RefusedError(Exception):
    """A request that is not fulfilled.

    Attributes:
        rule: short name of the rule that forbids it.
    """

    def __init__(self, rule: str, detail: str) -> None:
        super().__init__(detail)
        self.rule = rule
