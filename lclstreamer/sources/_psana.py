"""Importing psana2, and what has to be arranged around it.

psana asks for Kerberos tickets by `krtc`, only to *write* calibration constants; where `krtc` is not installed a
stand-in takes its place that refuses when it is asked for a ticket.
"""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import os
import sys
import time
import types
import warnings
from functools import cache
from typing import Any

from lclstreamer.errors import ConfigurationError

#: How long to wait for a monitoring server.
MONITOR_S = 60.0
_QUEUE = "/PdsFromMonitorDiscovery_{}"


class _NoTicket:
    """Stands for `krtc.KerberosTicket`."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise RuntimeError(
            "a Kerberos ticket is needed, and the package lcls-krtc is not installed: pip install lcls-krtc "
            "(it needs the GSSAPI headers, e.g. libkrb5-dev). Reading data does not need it"
        )


def _krtc() -> None:
    if "krtc" in sys.modules or importlib.util.find_spec("krtc") is not None:
        return
    module = types.ModuleType("krtc", "Stand-in of lclstreamer for lcls-krtc, which is not installed.")
    module.KerberosTicket = _NoTicket  # type: ignore[attr-defined]
    sys.modules["krtc"] = module


@cache
def psana2() -> Any:
    """The package `psana` of LCLS-II.

    Raises:
        ConfigurationError: it is not installed, or what is installed is psana of LCLS-I.
    """
    if importlib.util.find_spec("psana") is None:
        raise ConfigurationError(
            "psana (LCLS-II) is not installed: pip install 'lclstream[psana]', or, without a compiler, "
            "pip install 'lclstream[psana-offline]' && pip install --no-deps psana"
        )
    _krtc()
    if "psana" not in sys.modules:
        # Divides events by itself when it sees MPI, with two ranks that only organise; we divide them.
        os.environ.setdefault("PS_PARALLEL", "none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import psana
            import psana.dgramedit
        except ImportError as error:
            if error.name and error.name.partition(".")[0] == "mpi4py":
                raise ConfigurationError(
                    "psana needs mpi4py, which cannot be imported: pip install 'lclstream[mpi]' (brings MPI as well)"
                ) from error
            raise ConfigurationError(
                f"psana is installed but cannot be imported ({error}); for LCLS-II data psana 4.3 or later is needed"
            ) from error
    return psana


def await_monitor(tag: str, timeout: float) -> bool:
    """Wait for the message queue by which a monitoring server announces its shared memory; whether it came in time.

    psana itself waits for it without bound, and in compiled code, where no signal ends it.
    """
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "mq_open"):  # in an older glibc
        library = ctypes.CDLL("librt.so.1", use_errno=True)
    deadline = time.monotonic() + timeout
    while True:
        queue = library.mq_open(_QUEUE.format(tag).encode(), os.O_WRONLY | os.O_NONBLOCK)
        if queue >= 0:
            library.mq_close(queue)
            return True
        if ctypes.get_errno() != errno.ENOENT:
            return True  # it is there, and psana will say what is wrong with it
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)


def divide_by_psana() -> None:
    """Let psana divide the events over the MPI ranks; to be called before :func:`psana2`.

    Raises:
        ConfigurationError: psana was imported already, with its division off.
    """
    if "psana" in sys.modules and os.environ.get("PS_PARALLEL") == "none":
        raise ConfigurationError("event_source.division: psana was already imported without its division of events")
    os.environ["PS_PARALLEL"] = "mpi"
