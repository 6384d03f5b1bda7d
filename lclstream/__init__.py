"""The control plane: what starts, follows and ends a stream, and the clients that talk to it."""

from importlib.metadata import version

__version__ = version("lclstream")
