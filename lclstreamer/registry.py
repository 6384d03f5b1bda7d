"""From a component's type name to the class that does its work; classes are imported when they are used."""

from __future__ import annotations

import importlib
from typing import Any

from pydantic import BaseModel, ValidationError

from lclstreamer import models
from lclstreamer.errors import ConfigurationError

_PLACES = {
    "InternalEventSource": "lclstreamer.sources.internal",
    "Psana2EventSource": "lclstreamer.sources.psana2",
    "Psana1EventSource": "lclstreamer.sources.psana1",
    "Psana1Timestamp": "lclstreamer.sources.psana1",
    "Psana1DetectorInterface": "lclstreamer.sources.psana1",
    "Psana2Waveforms": "lclstreamer.sources.psana2_data",
    "HDF5EventSource": "lclstreamer.sources.hdf5",
    "HDF5Dataset": "lclstreamer.sources.hdf5",
    "HDF5Timestamp": "lclstreamer.sources.hdf5",
    "CropPipeline": "lclstreamer.pipelines.reduction",
    "BinningPipeline": "lclstreamer.pipelines.reduction",
    "MaskPipeline": "lclstreamer.pipelines.reduction",
    "ThresholdPipeline": "lclstreamer.pipelines.reduction",
    "HitFilterPipeline": "lclstreamer.pipelines.hits",
    "FexPipeline": "lclstreamer.pipelines.fex",
    "ElectronCountingPipeline": "lclstreamer.pipelines.counting",
    "SimplonBinarySerializer": "lclstreamer.serializers.simplon",
    "SimplonV2Serializer": "lclstreamer.serializers.simplon_v2",
    "Psana2Timestamp": "lclstreamer.sources.psana2_data",
    "Psana2DetectorInterface": "lclstreamer.sources.psana2_data",
    "Psana2RunInfo": "lclstreamer.sources.psana2_data",
    "GenericRandomNumpyArray": "lclstreamer.sources.generic",
    "FloatValue": "lclstreamer.sources.generic",
    "IntValue": "lclstreamer.sources.generic",
    "SourceIdentifier": "lclstreamer.sources.generic",
    "BatchProcessingPipeline": "lclstreamer.pipelines.batch",
    "PeaknetPreprocessingPipeline": "lclstreamer.pipelines.peaknet",
    "HDF5BinarySerializer": "lclstreamer.serializers.hdf5",
    "BinaryFileWritingDataHandler": "lclstreamer.handlers.files",
    "BinaryDataStreamingDataHandler": "lclstreamer.handlers.streaming",
}


def resolve(place: str, section: BaseModel) -> tuple[Any, Any]:
    """The class of a component and its checked options.

    Args:
        place: where the component is named in the configuration, for errors.
        section: the component's section.

    Returns:
        The class, and the options as an instance of the class's own model.

    Raises:
        ConfigurationError: the class cannot be imported, or a component of another package refuses its options.
    """
    name = str(section.type)  # type: ignore[attr-defined]
    third_party = isinstance(section, models.ThirdParty)
    if third_party:
        module, _, attribute = models.announced()[name].partition(":")
    else:
        module, attribute = _PLACES[name], name
    try:
        found = importlib.import_module(module)
        component = getattr(found, attribute or name)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(
            f"{place}.type: {name} is in {module}, which cannot be used here: {error}. {_remedy(error)}"
        ) from error
    if third_party:
        options_model = getattr(component, "Options", None)
        if options_model is not None:
            try:
                return component, options_model.model_validate(section.model_dump())
            except ValidationError as error:
                raise ConfigurationError(f"{place}: {name} refuses its options: {error}") from error
    return component, section


_EXTRAS = {
    "mpi4py": "mpi",
    "psana": "psana",
    "h5py": "stream",
    "hdf5plugin": "stream",
    "numpy": "stream",
    "cbor2": "stream",
    "stempy": "counting",
}


def _remedy(error: Exception) -> str:
    missing = (getattr(error, "name", None) or "").partition(".")[0]
    if missing in _EXTRAS:
        return f"Install it with the `{_EXTRAS[missing]}` extra: pip install 'lclstream[{_EXTRAS[missing]}]'"
    return "Check the installation of the package"
