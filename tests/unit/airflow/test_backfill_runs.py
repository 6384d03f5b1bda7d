"""Which runs a backfill takes, asked from a real logbook."""

from __future__ import annotations

import pytest
import typer

from lclstream.backfill.cli import _chosen
from lclstream.elog.client import ElogClient
from lclstream.security.credentials import Credentials


def test_runs_are_chosen_by_what_the_logbook_knows(
    elog: ElogClient, elog_service: str, airflow_identity: Credentials
) -> None:
    experiment = "mfxbackfill"
    for energy in (9.5, 9.5, 12):
        elog.start_run(experiment, params={"photon_energy": energy})
    elog.new_elog_entry(experiment, "dark run", 2, tags=["DARK"])
    folder = airflow_identity.folder
    assert _chosen(experiment, [1, 2, 3, 4], elog_service, folder, [], None) == [1, 2, 3]
    assert _chosen(experiment, [1, 2, 3, 4], elog_service, folder, ["photon_energy=9.5"], None) == [1, 2]
    assert _chosen(experiment, [1, 2, 3, 4], elog_service, folder, ["photon_energy=9.5"], "DARK") == [2]
    assert _chosen(experiment, None, elog_service, folder, ["photon_energy=9.5"], None) == [1, 2]
    assert _chosen(experiment, None, elog_service, folder, [], None) == [1, 2, 3]
    with pytest.raises(typer.Exit) as refused:
        _chosen(experiment, [1], elog_service, folder, ["photon_energy"], None)
    assert refused.value.exit_code == 2
    with pytest.raises(typer.Exit) as away:
        _chosen(experiment, [1], "https://127.0.0.1:9", folder, [], None)
    assert away.value.exit_code == 3
