"""From type names to classes, those of other packages included."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel, ConfigDict

from lclstreamer import config, models, registry
from lclstreamer.engine import Engine
from lclstreamer.errors import ConfigurationError
from lclstreamer.events import Event
from lclstreamer.listing import listing
from lclstreamer.pipelines.base import Pipeline


@pytest.mark.parametrize(
    ("section", "name"), [(section, model.__name__) for section, found in models.COMPONENTS.items() for model in found]
)
def test_every_type_of_the_configuration_has_its_class(section: str, name: str) -> None:
    component, _ = registry.resolve(section, models.model_of(section, name).model_construct(type=name))  # type: ignore[union-attr]
    assert component.__name__ == name


class DoublePipeline(Pipeline):
    """Of another package: multiplies `random`."""

    class Options(BaseModel):
        model_config = ConfigDict(extra="forbid")
        type: str
        factor: float

    def process(self, event: Event) -> Iterable[Event]:
        event.values["scaled"] = event.values["random"] * np.float32(self.parameters.factor)
        return (event,)


@pytest.fixture
def third_party(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = types.ModuleType("beamline_extras")
    module.DoublePipeline = DoublePipeline  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "beamline_extras", module)
    found = {"DoublePipeline": "beamline_extras:DoublePipeline", "GonePipeline": "not_installed:Gone"}
    monkeypatch.setattr(models, "announced", lambda: found)
    return


@pytest.mark.usefixtures("third_party")
def test_a_component_of_another_package_works_like_ours(
    internal: dict[str, Any], tmp_path: Path, datasets: Any
) -> None:
    internal["processing_pipeline"] = [{"type": "DoublePipeline", "factor": 2.0}, internal["processing_pipeline"]]
    internal["data_serializer"]["fields"] = {"random": "/random", "scaled": "/scaled"}
    internal["data_handlers"][0]["write_directory"] = str(tmp_path)
    engine = Engine(config.from_mapping(internal))
    engine.open()
    engine.run()
    found = datasets((tmp_path / "r0_0.h5").read_bytes())
    assert np.array_equal(found["/scaled"], 2 * found["/random"])
    assert "DoublePipeline (beamline_extras:DoublePipeline)" in listing()


@pytest.mark.usefixtures("third_party")
def test_its_own_model_checks_its_options(internal: dict[str, Any]) -> None:
    internal["processing_pipeline"] = [{"type": "DoublePipeline", "faktor": 2.0}]
    with pytest.raises(ConfigurationError, match=r"processing_pipeline: DoublePipeline refuses its options"):
        Engine(config.from_mapping(internal))


@pytest.mark.usefixtures("third_party")
def test_a_package_that_cannot_be_imported_is_named(internal: dict[str, Any]) -> None:
    internal["processing_pipeline"] = [{"type": "GonePipeline"}]
    with pytest.raises(ConfigurationError, match="GonePipeline is in not_installed, which cannot be used here"):
        Engine(config.from_mapping(internal))


def test_the_list_has_every_option_with_its_default() -> None:
    text = listing()
    for expected in ("batch_size (int, required)", "role (server|client, default server)", "FexPipeline:"):
        assert expected in text
