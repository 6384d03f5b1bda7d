"""The pydantic models of the configuration's sections: every component type with its options.

Only pydantic and the standard library are imported, so that services can check a configuration without the engine's
libraries. The class names in ``type:`` are the interface; their options are those of the original engine, new ones are
optional.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from lclstreamer.pipeline_models import (
    BatchProcessingPipeline,
    BinningPipeline,
    CropPipeline,
    ElectronCountingPipeline,
    FexPipeline,
    HitFilterPipeline,
    MaskPipeline,
    PeaknetPreprocessingPipeline,
    ThresholdPipeline,
)
from lclstreamer.section import DtypeName, Section

#: Packages of others announce components here: ``TypeName = "package.module:Class"``.
ENTRY_POINT_GROUP = "lclstreamer.components"


class ThirdParty(BaseModel):
    """A component of another package, announced by an entry point; its own class checks the options."""

    model_config = ConfigDict(extra="allow")
    type: str


# ---------------------------------------------------------------------------------------------------- event sources


class InternalEventSource(Section):
    """Makes events by itself, for tests and demonstrations. Other keys are tolerated, as in the original."""

    model_config = ConfigDict(extra="allow")
    type: Literal["InternalEventSource"]
    number_of_events_to_generate: int = Field(ge=0, description="events in all, divided over the ranks")


class Psana1EventSource(Section):
    """LCLS-I runs, read with psana1; `source_identifier` is ``exp=E:run=N`` (`:smd` is added) or ``shmem=…``."""

    type: Literal["Psana1EventSource"]


class Psana2EventSource(Section):
    """LCLS-II runs, read with psana2.

    `source_identifier` is a list of ``key=value`` joined by commas: ``exp=E,run=N`` (with ``dir=PATH`` for files
    elsewhere), ``files=PATH`` (a file, a folder, a pattern, or several joined by ``;``), ``shmem=TAG``, ``drp=TAG``,
    and ``max_events=N``.
    """

    type: Literal["Psana2EventSource"]
    calibration: str = Field(
        "auto",
        description="auto: constants are asked from the database only for detectors of which calibrated fields are "
        "read · none: never · database: for all · a path: the pickle file with the constants",
    )
    use_logbook: bool | None = Field(
        None,
        description="ask the logbook which files a run has; default: only when `dir=` is not given",
    )
    division: Literal["index", "psana"] = Field(
        "index",
        description="index: every rank reads its share of the events, any number of ranks · psana: psana's own "
        "division, "
        "exp= only, at least 3 ranks of which 2 only organise (for runs with very many events)",
    )


class HDF5EventSource(Section):
    """Archived runs in HDF5 or NeXus files.

    `source_identifier` is ``files=PATH``: a file, a folder, a pattern, or several of these joined by ``;``.
    """

    type: Literal["HDF5EventSource"]
    experiment: str | None = Field(None, description="default: the files' root attribute `experiment`")
    run: int | None = Field(None, ge=0, description="default: the files' root attribute `run`")


# ----------------------------------------------------------------------------------------------------- data sources


class Psana1Timestamp(Section):
    """Time of the event: float64 seconds since 1970, and exact integer nanoseconds where the format has room."""

    type: Literal["Psana1Timestamp"]


class Psana2Timestamp(Section):
    """Time of the event: psana's 64-bit number as float64, and exact integer nanoseconds where the format has room."""

    type: Literal["Psana2Timestamp"]


class _DetectorInterface(Section):
    psana_name: str = Field(description="detector or EPICS variable (a name with `:`)")
    psana_fields: str | list[str] | None = Field(
        None,
        description="attributes joined by dots, e.g. raw.raw; a list is stacked; not needed for an EPICS variable",
    )
    dtype: DtypeName = Field("float64", description="numpy dtype of the result; native keeps the detector's own")

    @model_validator(mode="after")
    def _fields_or_variable(self) -> _DetectorInterface:
        if not self.psana_fields and ":" not in self.psana_name:
            raise ValueError(
                "psana_fields is missing: name what to read from the detector, e.g. `psana_fields: raw.raw` "
                "(only EPICS variables, whose names contain `:`, need none)"
            )
        return self

    @property
    def chains(self) -> list[str]:
        """The dotted chains to read, none for an EPICS variable."""
        if not self.psana_fields:
            return []
        return [self.psana_fields] if isinstance(self.psana_fields, str) else list(self.psana_fields)


class Psana1DetectorInterface(_DetectorInterface):
    """Any detector field or EPICS variable of an LCLS-I run (`eventCodes` become an integer array of 256)."""

    type: Literal["Psana1DetectorInterface"]


class Psana2DetectorInterface(_DetectorInterface):
    """Any detector field or EPICS variable of an LCLS-II run."""

    type: Literal["Psana2DetectorInterface"]


class Psana2RunInfo(Section):
    """Four strings: experiment, run timestamp, run number, source identifier."""

    type: Literal["Psana2RunInfo"]


class Psana2Waveforms(Section):
    """The waveforms of all channels of a digitizer, for the FEX pipeline."""

    type: Literal["Psana2Waveforms"]
    psana_name: str
    psana_fields: str = Field("raw.waveforms", description="a field that gives {segment: {channel: samples}}")

    @property
    def chains(self) -> list[str]:
        """The dotted chain to read."""
        return [self.psana_fields]


class HDF5Dataset(Section):
    """A dataset whose first axis is the event."""

    type: Literal["HDF5Dataset"]
    path: str = Field(description="of the dataset in the files, e.g. /entry/data/data")
    dtype: DtypeName = Field("native", description="numpy dtype of the result; native keeps the dataset's own")


class HDF5Timestamp(Section):
    """Times in a dataset, seconds as float64, and exact integer nanoseconds where the format has room."""

    type: Literal["HDF5Timestamp"]
    path: str = Field(description="of the dataset in the files, e.g. /data/timestamp_ns")
    unit: Literal["s", "ms", "us", "ns"] = "ns"
    epoch: float = Field(0.0, description="time of zero in the dataset, in seconds since 1970-01-01T00:00:00Z")


class GenericRandomNumpyArray(Section):
    """Random numbers: integers in [0, 255), floats in [0, 1)."""

    type: Literal["GenericRandomNumpyArray"]
    array_shape: str = Field(description='numbers joined by commas, e.g. "20,2"')
    array_dtype: DtypeName = Field(description="an integer or floating numpy dtype")

    @field_validator("array_shape", mode="before")
    @classmethod
    def _shape_text(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        elif isinstance(value, list):
            value = ",".join(str(part) for part in value)
        if isinstance(value, str):
            parts = [part.strip() for part in value.split(",")]
            if not all(part.isdigit() for part in parts):
                raise ValueError('a shape is whole numbers joined by commas, e.g. "512,1024"')
            value = ",".join(parts)
        return value

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape as numbers."""
        return tuple(int(part) for part in self.array_shape.split(","))


class FloatValue(Section):
    """A fixed float64."""

    type: Literal["FloatValue"]
    value: float


class IntValue(Section):
    """A fixed int64."""

    type: Literal["IntValue"]
    value: int = Field(ge=-(2**63), lt=2**63)


class SourceIdentifier(Section):
    """The configuration's `source_identifier` as a string."""

    type: Literal["SourceIdentifier"]


# ------------------------------------------------------------------------------------------------------ serializers


def dataset_place(path: str) -> str:
    """A dataset's path in one spelling."""
    return "/" + "/".join(part for part in path.split("/") if part)


HDF5Compression = Literal["gzip", "gzip_with_shuffle", "bitshuffle_with_lz4", "bitshuffle_with_zstd", "zfp"]


class HDF5BinarySerializer(Section):
    """Each message is an HDF5 file whose datasets have the event as first axis."""

    type: Literal["HDF5BinarySerializer"]
    fields: dict[str, str] = Field(description="data source name: dataset path")
    compression: HDF5Compression | None = None
    compression_level: int = Field(3, ge=0, le=22, description="gzip 0-9, zstd 1-22; not used by lz4 and zfp")
    compression_threads: int | None = Field(
        None, ge=1, description="threads that compress; default: the cores this rank may use, shared with the others"
    )
    zfp_accuracy: float | None = Field(
        None,
        gt=0,
        description="largest absolute error zfp may make; default: lossless (zfp's reversible mode)",
    )

    @field_validator("fields")
    @classmethod
    def _paths(cls, value: dict[str, str]) -> dict[str, str]:
        seen: dict[str, str] = {}
        for name, path in value.items():
            place = dataset_place(path)
            if place == "/":
                raise ValueError(f"{name}: {path!r} is not a dataset path; one is e.g. /data/{name}")
            for other, taken in seen.items():
                if place == taken or place.startswith(taken + "/") or taken.startswith(place + "/"):
                    raise ValueError(
                        f"{name} and {other} cannot both be stored: {place} and {taken} are in each other's way"
                    )
            seen[name] = place
        return value

    @model_validator(mode="after")
    def _options_fit(self) -> HDF5BinarySerializer:
        if self.zfp_accuracy is not None and self.compression != "zfp":
            raise ValueError("zfp_accuracy is an option of `compression: zfp` only")
        if self.compression in ("gzip", "gzip_with_shuffle") and self.compression_level > 9:
            raise ValueError(f"compression_level {self.compression_level}: gzip has levels 0 to 9")
        return self

    def collisions(self, timed: Iterable[str], ragged: Iterable[str], incomplete: bool) -> list[str]:
        """A sentence for each field at a path where the serializer stores something that belongs to another field.

        Args:
            timed: data sources that give the event's time.
            ragged: those of which every event may have another number of values.
            incomplete: whether values may be missing.
        """
        companions = [(name, "_ns", f"the nanoseconds of {name} are") for name in timed]
        companions += [(name, "_offsets", f"it is said which of {name} are of which event") for name in ragged]
        companions += [
            (name, "_missing", f"it is marked which values of {name} are missing") for name in self.fields if incomplete
        ]
        places = {name: dataset_place(path) for name, path in self.fields.items()}
        return [
            f"data_serializer.fields.{other}: {place} is where {what}; choose another path"
            for name, ending, what in companions
            if name in places
            for other, place in places.items()
            if f"{place}/".startswith(f"{places[name]}{ending}/")
        ]


class SimplonBinarySerializer(Section):
    """DECTRIS Simplon 1.8 messages: a start, an image for every event, a stop."""

    type: Literal["SimplonBinarySerializer"]
    data_source_to_serialize: str
    polarization_fraction: float
    polarization_axis: list[float]
    data_collection_rate: str
    detector_name: str
    detector_type: str


class SimplonV2Serializer(Section):
    """DECTRIS stream V2: CBOR messages `start`, `image` for every event, `end`."""

    type: Literal["SimplonV2Serializer"]
    data_source_to_serialize: str
    compression: Literal["bslz4"] | None = "bslz4"
    detector_name: str = ""
    detector_type: str = ""
    incident_energy: float | None = Field(None, gt=0, description="photon energy in eV, told in the start message")


# --------------------------------------------------------------------------------------------------------- handlers


class BinaryFileWritingDataHandler(Section):
    """Writes each message to a file of its own: ``[prefix_]r<rank>_<number>.<suffix>``."""

    type: Literal["BinaryFileWritingDataHandler"]
    file_prefix: str = ""
    file_suffix: str = "h5"
    write_directory: Path = Field(default_factory=Path.cwd, description="made when it is not there")
    fsync: bool = Field(False, description="wait for the disk after every file, so that a power cut loses none")


class TlsFiles(Section):
    """Certificates (PEM files) of an encrypted connection; both sides show one."""

    certificate: Path = Field(description="ours, with the issuers in between, if there are any")
    key: Path = Field(description="its key, mode 0600")
    ca: Path = Field(description="issuers of the other side's certificates")


class BinaryDataStreamingDataHandler(Section):
    """Sends each message to one of the sinks, as a ZeroMQ PUSH or an NNG Push0 socket does."""

    type: Literal["BinaryDataStreamingDataHandler"]
    urls: list[str] = Field(
        min_length=1, description="tcp://HOST:PORT, tls+tcp://HOST:PORT (encrypted, needs `tls`) or ipc:///PATH"
    )
    role: Literal["server", "client"] = Field(
        "server", description="server listens at the URLs, client connects to them"
    )
    library: Literal["zmq", "nng"] = Field("zmq", description="the protocol of the other side")
    socket_type: Literal["push"] = "push"
    connect_timeout_s: float = Field(60, gt=0, description="how long to wait for a sink when there is none")
    send_timeout_s: float = Field(300, gt=0, description="how long connected sinks may take nothing")
    drain_timeout_s: float = Field(60, gt=0, description="how long sinks may take to fetch the last messages")
    tls: TlsFiles | None = Field(None, description="certificates for tls+tcp:// URLs")

    @field_validator("urls")
    @classmethod
    def _schemes(cls, value: list[str]) -> list[str]:
        for url in value:
            scheme, _, rest = url.partition("://")
            if scheme == "ipc" and rest:
                continue
            host, _, port = rest.rpartition(":")
            if scheme not in ("tcp", "tls+tcp") or not host or not port.isdigit() or int(port) > 65535:
                raise ValueError(
                    f"{url!r} is not an address; valid are tcp://HOST:PORT, tls+tcp://HOST:PORT and ipc:///PATH"
                )
        return value

    @model_validator(mode="after")
    def _certificates(self) -> BinaryDataStreamingDataHandler:
        encrypted = [url for url in self.urls if url.startswith("tls+")]
        if encrypted and self.tls is None:
            raise ValueError(f"{encrypted[0]} needs certificates: give `tls: {{certificate: …, key: …, ca: …}}`")
        if self.tls is not None and not encrypted:
            raise ValueError("`tls` is given, but no URL begins with tls+tcp://")
        return self


# ----------------------------------------------------------------------------------------------- choosing by `type:`


@cache
def announced() -> dict[str, str]:
    """Components of other packages: type name to ``module:Class``."""
    return {point.name: point.value for point in entry_points(group=ENTRY_POINT_GROUP)}


def _choose(known: frozenset[str]) -> Callable[[Any], str]:
    def tag(value: Any) -> str:
        name = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
        if isinstance(name, str) and name not in known and name in announced():
            return "ThirdParty"
        return str(name)

    return tag


def _one_of(*models: type[BaseModel]) -> Any:
    names = frozenset(model.__name__ for model in models)
    members = [Annotated[model, Tag(model.__name__)] for model in models]
    members.append(Annotated[ThirdParty, Tag("ThirdParty")])
    return Annotated[Union[tuple(members)], Discriminator(_choose(names))]  # noqa: UP007


#: Section of the configuration to the component types it can name.
COMPONENTS: dict[str, tuple[type[BaseModel], ...]] = {
    "event_source": (InternalEventSource, Psana1EventSource, Psana2EventSource, HDF5EventSource),
    "data_sources": (
        Psana1Timestamp,
        Psana1DetectorInterface,
        Psana2Timestamp,
        Psana2DetectorInterface,
        Psana2RunInfo,
        Psana2Waveforms,
        HDF5Dataset,
        HDF5Timestamp,
        GenericRandomNumpyArray,
        FloatValue,
        IntValue,
        SourceIdentifier,
    ),
    "processing_pipeline": (
        BatchProcessingPipeline,
        PeaknetPreprocessingPipeline,
        CropPipeline,
        BinningPipeline,
        MaskPipeline,
        ThresholdPipeline,
        HitFilterPipeline,
        FexPipeline,
        ElectronCountingPipeline,
    ),
    "data_serializer": (HDF5BinarySerializer, SimplonBinarySerializer, SimplonV2Serializer),
    "data_handlers": (BinaryFileWritingDataHandler, BinaryDataStreamingDataHandler),
}

EventSourceSection = _one_of(*COMPONENTS["event_source"])
DataSourceSection = _one_of(*COMPONENTS["data_sources"])
PipelineSection = _one_of(*COMPONENTS["processing_pipeline"])
SerializerSection = _one_of(*COMPONENTS["data_serializer"])
HandlerSection = _one_of(*COMPONENTS["data_handlers"])


def model_of(section: str, name: str) -> type[BaseModel] | None:
    """The model of a component type, `None` when it is not one of ours."""
    return next((model for model in COMPONENTS.get(section, ()) if model.__name__ == name), None)


def nearest(word: str, words: list[str]) -> str:
    """A hint ``; did you mean X?`` when a word is close to a known one, else nothing."""
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""
