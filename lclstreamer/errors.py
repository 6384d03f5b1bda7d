"""The errors of the engine.

EngineError
├── ConfigurationError   the file, a key or a value is wrong: exit code 2, repeating does not help
│   └── SourceError      the data named by the configuration is not there, or not as it says: exit code 2
├── ConnectError         an address cannot be listened at: exit code 3
├── HandlerError         a sink or disk stopped taking messages: exit code 1
└── ComponentError       a component failed while working: exit code 1
"""

from __future__ import annotations


class EngineError(Exception):
    """What the engine tells its user; the text names what is wrong and what to do. `exit_code` is the program's."""

    exit_code = 1


class ConfigurationError(EngineError, ValueError):
    """The configuration is not valid: file, place in it, value, and what would be valid."""

    exit_code = 2


class SourceError(ConfigurationError):
    """A file, run, detector or field that the configuration names is not in the data."""


class ConnectError(EngineError):
    """An address cannot be listened at or is not an address."""

    exit_code = 3


class HandlerError(EngineError):
    """A data handler cannot deliver: no sink, a sink that left, a full disk."""


class ComponentError(EngineError):
    """A component of the engine failed on data it should have handled."""
