"""The run that is streamed: made for the occasion, or the user's file; and the configuration that streams it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from lclstream.demo.processes import Child, Children, DemoError

#: Experiment and run number of the synthetic run.
EXPERIMENT = "mfxdemo26"
RUN = 7


class Field(BaseModel):
    """One value of a detector: its name, its shape in one event, its dtype."""

    model_config = ConfigDict(extra="ignore")

    name: str
    shape: tuple[int, ...] | None = None
    dtype: str | None = None


class Detector(BaseModel):
    """One detector of a run."""

    model_config = ConfigDict(extra="ignore")

    name: str
    type: str
    algorithm: str
    fields: list[Field] = []

    def chain(self, field: Field) -> str:
        """The dotted name under which the engine finds a value: ``raw.milliJoulesPerPulse``."""
        return f"{self.algorithm}.{field.name}"


class RunDescription(BaseModel):
    """What `lclstreamer --describe` says about a run."""

    model_config = ConfigDict(extra="ignore")

    experiment: str
    run: int
    events: int
    detectors: list[Detector]

    def image(self) -> tuple[Detector, Field] | None:
        """The largest value with two or more axes: an area detector."""
        return self._largest(2, 4)

    def waveform(self) -> tuple[Detector, Field] | None:
        """The largest value with one axis: a digitizer."""
        return self._largest(1, 1)

    def scalar(self) -> tuple[Detector, Field] | None:
        """A pulse energy, or any other number of a beam detector."""
        scalars = [
            (detector, field)
            for detector in self.detectors
            for field in detector.fields
            if field.shape == () and field.dtype and field.dtype.startswith("float")
        ]
        return next((pair for pair in scalars if "milliJoules" in pair[1].name), scalars[0] if scalars else None)

    def _largest(self, least_axes: int, most_axes: int) -> tuple[Detector, Field] | None:
        def size(field: Field) -> int:
            product = 1
            for length in field.shape or ():
                product *= length
            return product

        arrays = [
            (detector, field)
            for detector in self.detectors
            for field in detector.fields
            if field.shape and least_axes <= len(field.shape) <= most_axes and size(field) > 1
        ]
        return max(arrays, key=lambda pair: size(pair[1]), default=None)


def simulate(children: Children, path: Path, events: int) -> Child:
    """Start writing a synthetic run; `Children.finish` waits for it."""
    module = "lclstreamer.sources.psana2_simulator"
    options = ["--out", str(path), "--events", str(events), "--experiment", EXPERIMENT, "--run", str(RUN)]
    return children.start("data", [sys.executable, "-m", module, *options], ends=True)


def describe(children: Children, path: Path) -> RunDescription:
    """Ask the engine what is in a file.

    Raises:
        DemoError: it cannot be read, or has neither an area detector nor a digitizer.
    """
    output = children.run("describe", ["lclstreamer", "--describe", f"files={path}"], timeout=120)
    description = RunDescription.model_validate(json.loads(output))
    if description.image() is None and description.waveform() is None:
        found = ", ".join(detector.name for detector in description.detectors) or "none"
        raise DemoError(f"{path}: no area detector and no digitizer to stream; detectors in it: {found}")
    return description


def stream_configuration(description: RunDescription, path: Path) -> dict[str, Any]:
    """An engine configuration that streams a run's main detector, its pulse energy and its timestamps."""
    main = description.image() or description.waveform()
    assert main is not None, "describe() has refused such a file"
    detector, value = main
    sources: dict[str, Any] = {
        "timestamp": {"type": "Psana2Timestamp"},
        "detector_data": {
            "type": "Psana2DetectorInterface",
            "psana_name": detector.name,
            "psana_fields": detector.chain(value),
            "dtype": "native",
        },
    }
    fields = {"timestamp": "/timestamp", "detector_data": "/data"}
    scalar = description.scalar()
    if scalar is not None:
        sources["pulse_energy"] = {
            "type": "Psana2DetectorInterface",
            "psana_name": scalar[0].name,
            "psana_fields": scalar[0].chain(scalar[1]),
        }
        # The detector's own words tell a reader the unit.
        fields["pulse_energy"] = f"/{scalar[0].name}/{scalar[1].name}"
    return {
        "source_identifier": f"files={path}",
        # A message with a gap is better than a lost event: missing values arrive as NaN and are counted.
        "skip_incomplete_events": False,
        "event_source": {"type": "Psana2EventSource"},
        "data_sources": sources,
        "processing_pipeline": {"type": "BatchProcessingPipeline", "batch_size": 5},
        "data_serializer": {
            "type": "HDF5BinarySerializer",
            "compression": "bitshuffle_with_lz4",
            "fields": fields,
        },
        "data_handlers": [],
    }
