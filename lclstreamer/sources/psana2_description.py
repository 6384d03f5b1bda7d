"""What is in an LCLS-II run, for people and programs that write configurations."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import numpy as np

from lclstreamer import identifiers
from lclstreamer.errors import SourceError
from lclstreamer.models import Psana2EventSource as Options
from lclstreamer.sources.base import SourceContext
from lclstreamer.sources.psana2 import Psana2EventSource

#: How many events are looked at for a value of each field.
_LOOK_AT = 20
#: Never called: settings, and what needs calibration constants.
_NOT_READ = {"config", "calib", "image"}


def describe(source: str) -> dict[str, Any]:
    """Describe the first run of a psana2 source, e.g. ``files=run7.xtc2``.

    Returns:
        ``experiment``, ``run``, ``events`` (their number), ``detectors``: a list of ``name``, ``type``, ``algorithm``
        and ``fields`` (``name``, ``shape``, ``dtype`` of those that give an array), and ``epics``: names of variables.

    Raises:
        SourceError: the data cannot be opened.
    """
    try:
        identifiers.parse_psana2(source)
    except ValueError as error:
        raise SourceError(str(error)) from None
    options = Options(type="Psana2EventSource", calibration="none", use_logbook=None, division="index")
    # psana prints to stdout; ours must hold nothing but the answer.
    with contextlib.redirect_stdout(sys.stderr):
        reader = Psana2EventSource(options, SourceContext(source, {}))
        reader.open()
        return _run(reader.run)


def _run(run: Any) -> dict[str, Any]:
    types = {name: kind for name, kind, _, _ in run.xtcinfo}
    found: dict[tuple[str, str], dict[str, Any]] = {key: {} for key in sorted(run.detinfo)}
    interfaces = {name: run.Detector(name) for name, _ in found}
    count = 0
    for event in run.events():
        count += 1
        if count <= _LOOK_AT:
            for (name, algorithm), fields in found.items():
                _look(getattr(interfaces[name], algorithm, None), run.detinfo[name, algorithm], fields, event)
    return {
        "experiment": str(run.expt or ""),
        "run": int(run.runnum or 0),
        "events": count,
        "detectors": [
            {"name": name, "type": types.get(name, ""), "algorithm": algorithm, "fields": list(fields.values())}
            for (name, algorithm), fields in found.items()
        ],
        "epics": sorted(name for name, _ in run.epicsinfo),
    }


def _look(interface: Any, names: Any, fields: dict[str, Any], event: Any) -> None:
    for name in names if isinstance(names, list) else ():
        if name in _NOT_READ or name in fields:
            continue
        try:
            value = getattr(interface, name)
            value = value(event) if callable(value) else value
        except Exception:  # noqa: S112 - any detector's code: a field that fails is not listed
            continue
        if value is None or isinstance(value, dict):
            continue
        array = np.asarray(value)
        if array.dtype.kind in "biufcSU":
            fields[name] = {"name": name, "shape": list(array.shape), "dtype": str(array.dtype)}
