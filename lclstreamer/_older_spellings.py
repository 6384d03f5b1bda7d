"""Configurations of earlier versions of the original engine, turned into the present form.

Four kinds are known: type names that were renamed; data source types that became `PsanaNDetectorInterface`; files in
which a `lclstreamer` section names the classes and each class has a sub-section with its options; and integers that are
none, of which the original leaves out what is behind the point.
"""

from __future__ import annotations

import copy
import math
from typing import Any

_RENAMED = {
    "data_serializer": {
        "HDF5Serializer": "HDF5BinarySerializer",
        "Hdf5Serializer": "HDF5BinarySerializer",
        "Hdf5BinarySerializer": "HDF5BinarySerializer",
    },
}
#: Older data source type: the fields it read from the detector (None: an EPICS variable; `psana_function` is put in
#: `{}`).
_DETECTORS = {
    "Psana1AssembledAreaDetector": "image",
    "Psana2AssembledAreaDetector": "raw.image",
    "Psana1PV": None,
    "Psana2PV": None,
    "Psana1EvrCodes": "eventCodes",
    "Psana2Camera": "raw.raw",
    "Psana2EBeam": "raw.{}",
    "Psana2Gmd": "raw.{}",
    "Psana2HsdDetector": "raw.{}",
}
_SECTIONS = ("event_source", "processing_pipeline", "data_serializer")


def modernise(data: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The configuration in its present form, and a sentence for each thing that was changed."""
    changes: list[str] = []
    if isinstance(data.get("lclstreamer"), dict):
        data = _without_sub_sections(data, changes)
    data = copy.copy(data)
    for section, names in _RENAMED.items():
        part = data.get(section)
        if isinstance(part, dict) and isinstance(part.get("type"), str) and part["type"] in names:
            new = names[part["type"]]
            changes.append(f"{section}.type: {part['type']} is now called {new}")
            data[section] = {**part, "type": new}
    pipeline = data.get("processing_pipeline")
    if isinstance(pipeline, dict) and pipeline.get("type") == "NoOpProcessingPipeline":
        changes.append(
            "processing_pipeline: NoOpProcessingPipeline is now `type: BatchProcessingPipeline` with `batch_size: 1`"
        )
        data["processing_pipeline"] = {"type": "BatchProcessingPipeline", "batch_size": 1}
    sources = data.get("data_sources")
    if isinstance(sources, dict):
        data["data_sources"] = {name: _detector(name, part, changes) for name, part in sources.items()}
    return data, changes


def _detector(name: str, part: Any, changes: list[str]) -> Any:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        return part
    kind = part["type"]
    if kind == "IntValue":
        return _integer(name, part, changes)
    family = kind[:6]
    options = {key: value for key, value in part.items() if key not in ("type", "calibration", "psana_function")}
    if kind in ("Psana1AreaDetector", "Psana2AreaDetector"):
        field = "calib" if part.get("calibration", True) else "raw"
        fields: str | None = field if family == "Psana1" else f"raw.{field}"
    elif kind in _DETECTORS:
        fields = _DETECTORS[kind]
        if fields is not None and "{}" in fields:
            if "psana_function" not in part:
                return part
            fields = fields.format(part["psana_function"])
    else:
        return part
    new = {"type": f"{family}DetectorInterface", **options}
    if fields is not None:
        new["psana_fields"] = fields
    shown = ", ".join(f"{key}: {value}" for key, value in new.items())
    changes.append(f"data_sources.{name}: {kind} is now written as {{{shown}}}")
    return new


def _integer(name: str, part: dict[str, Any], changes: list[str]) -> dict[str, Any]:
    value = part.get("value")
    if not isinstance(value, float) or not math.isfinite(value) or value.is_integer():
        return part
    changes.append(f"data_sources.{name}.value: {value} is no whole number and is taken as {int(value)}")
    return {**part, "value": int(value)}


def _without_sub_sections(data: dict[str, Any], changes: list[str]) -> dict[str, Any]:
    chosen = data["lclstreamer"]
    new = {key: value for key, value in data.items() if key != "lclstreamer"}
    for key, value in chosen.items():
        if key in _SECTIONS and isinstance(value, str):
            new[key] = {"type": value, **_options(data.get(key), value)}
        elif key == "data_handlers" and isinstance(value, list):
            handlers = []
            for name in value:
                options = _options(data.get(key), name)
                if "url" in options and "urls" not in options:
                    options["urls"] = [options.pop("url")]
                handlers.append({"type": name, **options})
            new[key] = handlers
        else:
            new[key] = value
    changes.append(
        "the `lclstreamer` section and the sub-sections named after classes are an older form: write "
        "`source_identifier` and `skip_incomplete_events` at the top, and in each section `type: CLASS` beside its "
        "options"
    )
    return new


def _options(section: Any, name: str) -> dict[str, Any]:
    part = section.get(name) if isinstance(section, dict) else None
    return dict(part) if isinstance(part, dict) else {}
