"""The page explains every argument of the operators for jobs, and shows the example as it is."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from airflow.dag_processing.dagbag import DagBag

pytest.importorskip("lclstream.superfacility.client", reason="needs pip install 'lclstream[superfacility]'")

from lclstream_airflow.operators.jid import JIDSlurmOperator
from lclstream_airflow.operators.slurm import SlurmOperator
from lclstream_airflow.operators.superfacility import SuperfacilityOperator

DOCS = Path(__file__).resolve().parents[3] / "docs"


@pytest.mark.parametrize("operator", [SuperfacilityOperator, SlurmOperator, JIDSlurmOperator])
def test_every_argument_is_explained_on_the_page(operator: type[Any]) -> None:
    page = (DOCS / "airflow.md").read_text()
    section = page.partition(f"### `{operator.__name__}`")[2].partition("\n### ")[0]
    for name in inspect.signature(operator.__init__).parameters:
        if name not in ("self", "kwargs"):
            assert f"`{name}`" in section, name


@pytest.mark.parametrize("operator", [SuperfacilityOperator, SlurmOperator, JIDSlurmOperator])
def test_every_template_field_is_an_argument(operator: type[Any]) -> None:
    given = {"task_id": "x"}
    if operator is not JIDSlurmOperator:
        given["script"] = "#!/bin/sh"
    if operator is SuperfacilityOperator:
        given["folder"] = "/x"
    made = operator(**given)
    for name in operator.template_fields:
        assert hasattr(made, name), name


def test_the_example_is_valid_and_is_what_the_page_shows() -> None:
    example = DOCS / "examples" / "airflow_two_centres.py"
    bag = DagBag(dag_folder=str(example))
    assert bag.import_errors == {}
    assert bag.dag_ids == ["two_centres"]
    assert example.read_text().strip() in (DOCS / "airflow.md").read_text()
