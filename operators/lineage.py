"""What our tasks tell Airflow's assets and OpenLineage about streams and results.

*Assets*: a task whose `outlets` name an asset alias adds an event to the asset of its experiment, with facts about the
run. DAGs that are scheduled on the alias, or on one experiment's asset, follow it. *OpenLineage*: what a task reads and
writes as datasets; only where the provider `apache-airflow-providers-openlineage` is installed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from airflow.sdk import Asset, AssetAlias, BaseOperator

if TYPE_CHECKING:
    from airflow.providers.openlineage.extractors import OperatorLineage
    from airflow.sdk import Context

#: Events of this alias say that a stream can be pulled from.
STREAMS = "lclstream_streams"
#: Events of this alias say that a run has results in the logbook.
RESULTS = "lclstream_results"


def asset_of(alias: str, experiment: str) -> Asset:
    """The asset of an experiment: ``lclstream://results/EXPERIMENT`` for the alias ``lclstream_results``."""
    kind = alias.removeprefix("lclstream_")
    return Asset(name=f"{alias}_{experiment}", uri=f"lclstream://{kind}/{quote(experiment, safe='')}")


def announce(operator: BaseOperator, context: Context, experiment: str | None, facts: Mapping[str, Any]) -> None:
    """Add an event with these facts to the experiment's asset, for each alias among the task's `outlets`.

    :param experiment: whose data they are; None or empty: nobody can follow them, and no event is made
    :param facts: JSON values: names, ids, addresses, counts
    """
    for outlet in operator.outlets:
        if isinstance(outlet, AssetAlias) and experiment:
            asset = asset_of(outlet.name, experiment)
            context["outlet_events"][outlet].add(asset, extra={"experiment": experiment, **facts})


def lineage(inputs: Iterable[tuple[str, str]], outputs: Iterable[tuple[str, str]]) -> OperatorLineage[Any, Any]:
    """Datasets for OpenLineage, from pairs of namespace and name.

    Raises:
        ImportError: the provider is not installed; Airflow only asks where it is.
    """
    from airflow.providers.common.compat.openlineage.facet import Dataset
    from airflow.providers.openlineage.extractors import OperatorLineage

    def datasets(pairs: Iterable[tuple[str, str]]) -> list[Any]:
        return [Dataset(namespace=namespace, name=name) for namespace, name in pairs if namespace and name]

    return OperatorLineage(inputs=datasets(inputs), outputs=datasets(outputs))
