"""Who may ask for which data: members for their experiment's, operators and services for files."""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lclstream.api import launch, wanted
from lclstream.api.client import TransferClient
from lclstream.api.config import ApiConfig
from lclstream.security.errors import ServiceError
from lclstream.security.identity import Identity
from lclstream.security.roles import NOBODY, Roles

S3DF, OLCF = "CN=s3df", "CN=olcf"
ROLES = Roles.model_validate(
    {
        "issuers": {"s3df": S3DF, "olcf": OLCF},
        "home": "s3df",
        "operators": ["oscar"],
        "services": ["airflow"],
        "experiments": {"tmox42619": ["ada", "carol@olcf"], "closed": []},
    }
)
OPEN = (Path("/data/open"),)


def person(login: str, issuer: str = S3DF) -> Identity:
    return Identity(login=login, issuer=issuer, subject="", serial="3f9c")


@pytest.fixture
def wants(settings: Callable[..., ApiConfig], configuration: dict[str, Any]) -> Callable[..., wanted.Wanted]:
    def make(identifier: str, kind: str = "Psana2EventSource") -> wanted.Wanted:
        document = {**configuration, "source_identifier": identifier, "event_source": {"type": kind}}
        if kind == "InternalEventSource":
            document["event_source"] = {"type": kind, "number_of_events_to_generate": 1}
        return wanted.wanted(launch.checked(document, settings())[0])

    return make


@pytest.mark.parametrize(
    ("kind", "identifier", "expected"),
    [
        ("InternalEventSource", "exp=tmox42619,run=7", wanted.Wanted(("tmox42619",))),
        ("InternalEventSource", "files=/data/exp=1/x.xtc2", wanted.Wanted()),
        ("Psana2EventSource", "run=7,exp=tmox42619", wanted.Wanted(("tmox42619",))),
        ("Psana2EventSource", "exp=mine,run=7,exp=tmox42619", wanted.Wanted(("tmox42619",))),
        ("Psana2EventSource", "exp=mine,run=7,dir=/data/x", wanted.Wanted(("mine",), ("/data/x",))),
        ("Psana2EventSource", "files=/a.xtc2; /b/*.xtc2", wanted.Wanted((), ("/a.xtc2", "/b/*.xtc2"))),
        ("Psana2EventSource", "shmem=tmo", wanted.Wanted(live="shmem=")),
        ("Psana2EventSource", "drp=tmo", wanted.Wanted(live="drp=")),
        ("HDF5EventSource", "files=/a.h5;/b", wanted.Wanted((), ("/a.h5", "/b"))),
        ("Psana1EventSource", "exp=xpptut15:run=54:smd", wanted.Wanted(("xpptut15",))),
        ("Psana1EventSource", "exp=xpp/xpptut15:run=54", wanted.Wanted(("xpptut15",))),
        ("Psana1EventSource", "exp=mine:run=1:dir=/data/x", wanted.Wanted(("mine",), ("/data/x",))),
        ("Psana1EventSource", "exp=mine:run=1:exp=tmox42619", wanted.Wanted(("mine", "tmox42619"))),
        ("Psana1EventSource", "shmem=psana.0:stop=no", wanted.Wanted(live="shmem=")),
    ],
)
def test_what_a_source_names_is_found_as_the_engine_reads_it(
    wants: Callable[..., wanted.Wanted], kind: str, identifier: str, expected: wanted.Wanted
) -> None:
    assert wants(identifier, kind) == expected


def test_data_of_two_experiments_are_of_neither() -> None:
    assert wanted.Wanted(("a", "b")).experiment is None
    assert wanted.Wanted(("a", "a")).experiment == "a"


@pytest.mark.parametrize(
    ("who", "allowed"),
    [
        (person("ada"), True),
        (person("carol", OLCF), True),
        (person("oscar"), True),
        (person("airflow"), True),
        (person("eve"), False),
        (person("ada", OLCF), False),
        (person("oscar", OLCF), False),
    ],
)
@pytest.mark.parametrize("experiment", ["tmox42619", "TMOX42619"])
def test_an_experiment_is_for_its_members_operators_and_services(who: Identity, allowed: bool, experiment: str) -> None:
    ruling = wanted.ruling(who, wanted.Wanted((experiment,)), ROLES, ())
    assert bool(ruling) is allowed
    if not allowed:
        for word in (f"exp={experiment}", "certificate 3f9c", who.login, who.issuer, "(rule: request)"):
            assert word in ruling.rule


@pytest.mark.parametrize(
    ("identifier", "kind", "allowed"),
    [
        ("exp=unlisted,run=1", "Psana2EventSource", True),
        ("exp=closed,run=1", "Psana2EventSource", False),
        ("exp=tmox42619,run=1", "Psana2EventSource", True),
        ("exp=tmox42619,run=1,dir=/data/open/x", "Psana2EventSource", True),
        ("exp=tmox42619,run=1,dir=/data/others", "Psana2EventSource", False),
        ("files=/data/open/a.xtc2", "Psana2EventSource", True),
        ("files=/data/open", "HDF5EventSource", True),
        ("files=/data/opened/a.h5", "HDF5EventSource", False),
        ("files=/data/open/a.h5;/data/others/b.h5", "HDF5EventSource", False),
        ("files=/data/open/../others/b.h5", "HDF5EventSource", False),
        ("files=~/b.h5", "HDF5EventSource", False),
        ("files=data/open/b.h5", "HDF5EventSource", False),
        ("exp=tmox42619:run=1:exp=closed", "Psana1EventSource", False),
        ("exp=amo/closed:run=1", "Psana1EventSource", False),
        ("exp=1234:run=1", "Psana1EventSource", False),
        ("exp=tmox42619:run=1:dir=/data/others", "Psana1EventSource", False),
        ("shmem=tmo", "Psana2EventSource", False),
        ("shmem=psana.0:stop=no", "Psana1EventSource", False),
        ("", "InternalEventSource", True),
    ],
)
def test_files_and_live_data_are_for_operators_and_services_but_for_open_folders(
    wants: Callable[..., wanted.Wanted], identifier: str, kind: str, allowed: bool
) -> None:
    what = wants(identifier, kind)
    ruling = wanted.ruling(person("ada"), what, ROLES, OPEN)
    assert bool(ruling) is allowed, ruling.rule
    assert wanted.ruling(person("oscar"), what, ROLES, ())
    assert wanted.ruling(person("airflow"), what, ROLES, ())
    assert wanted.ruling(person("eve"), what, NOBODY, ()), "without experiments in a roles file nothing is forbidden"


def test_whoever_is_no_member_is_refused_and_nothing_is_started(
    serving: Callable[[ApiConfig], str],
    settings: Callable[..., ApiConfig],
    sites: dict[str, Any],
    world: Any,
    configuration: dict[str, Any],
    tmp_path: Path,
) -> None:
    world.engine_waits = True
    issuer = Identity.of_certificate(
        ssl.PEM_cert_to_DER_cert((sites["s3df"].member("alice").folder / "id.crt").read_text())
    ).issuer
    document = {"issuers": {"s3df": issuer}, "home": "s3df", "experiments": {"tmox42619": ["alice"]}}
    document |= {"operators": ["root"], "services": ["airflow"]}
    (tmp_path / "roles.yaml").write_text(json.dumps(document))
    url = serving(settings(roles=str(tmp_path / "roles.yaml"), open_folders=["/data/open"]))
    configuration["source_identifier"] = "exp=tmox42619,run=1"
    files = {**configuration, "event_source": {"type": "Psana2EventSource"}}
    with TransferClient(url, sites["s3df"].member("eve")) as eve:
        for ask in (eve.request, eve.plan):
            with pytest.raises(ServiceError, match=r"exp=tmox42619: to request this.* names eve, issued by") as error:
                ask(configuration)
            assert error.value.status == 403
        with pytest.raises(ServiceError, match=r"/etc/x\.xtc2 is below no folder .*open_folders: /data/open"):
            eve.request({**files, "source_identifier": "files=/etc/x.xtc2"})
        eve.cancel(eve.request({**files, "source_identifier": "files=/data/open/x.xtc2"}).id)
        assert len(eve.list()) == 1
    for login in ("alice", "root", "airflow"):
        with TransferClient(url, sites["s3df"].member(login)) as client:
            client.cancel(client.request(configuration).id)
