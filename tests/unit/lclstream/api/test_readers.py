"""Who may push and pull: the owner, his experiment's members, those the request and the site name, and the engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lclstream.api import launch, readers
from lclstream.api.config import BUFFER_SCRIPT, ApiConfig
from lclstream.api.tables import TransferRow
from lclstream.config_file import ConfigError
from lclstream.security.identity import Identity
from lclstream.security.roles import NOBODY, Roles

S3DF, OLCF = "2.5.4.65=Signing Certificate,OU=lclstream,O=s3df", "2.5.4.65=Signing Certificate,OU=lclstream,O=olcf"
ROLES = Roles.model_validate(
    {
        "issuers": {"s3df": S3DF, "olcf": OLCF},
        "home": "s3df",
        "operators": ["oscar"],
        "experiments": {"tmox42619": ["ada", "carol@olcf"], "other": ["eve"]},
    }
)
BOB = Identity(login="bob", issuer=OLCF, subject="", serial="1")


@pytest.fixture
def service(settings: Callable[..., ApiConfig], sites: dict[str, Any]) -> Callable[..., ApiConfig]:
    def make(**ports: Any) -> ApiConfig:
        engine = {"credentials": str(sites["s3df"].member("engine").folder)}
        return settings(ports={"first": 21000, "last": 21999, "scheme": "tls+tcp", **ports}, engine=engine)

    return make


def pulling(access: readers.Access | None) -> set[tuple[str, str]]:
    assert access is not None
    assert access["consumers"] is not None
    return {(each["login"], each["issuer"]) for each in access["consumers"]}


def test_the_owner_and_the_members_of_his_experiment_may_pull_and_nobody_else(
    service: Callable[..., ApiConfig],
) -> None:
    assert pulling(readers.access(BOB, None, (), ROLES, service())) == {("bob", OLCF)}
    members = {("bob", OLCF), ("ada", S3DF), ("carol", OLCF)}
    assert pulling(readers.access(BOB, "tmox42619", (), ROLES, service())) == members
    assert pulling(readers.access(BOB, "unheard_of", (), ROLES, service())) == {("bob", OLCF)}


def test_a_login_the_request_names_is_of_the_owners_issuer_and_one_the_site_names_of_the_sites(
    service: Callable[..., ApiConfig],
) -> None:
    config = service(readers=["analysis", "batch@olcf"])
    expected = {("bob", OLCF), ("dan", OLCF), ("fay", S3DF), ("gus", "CN=elsewhere")}
    expected |= {("analysis", S3DF), ("batch", OLCF)}
    assert pulling(readers.access(BOB, None, ["dan", "fay@s3df", "gus@CN=elsewhere"], ROLES, config)) == expected
    # Without a roles file the site's own issuer is that of the service's certificate.
    assert pulling(readers.access(BOB, None, (), NOBODY, service(readers=["analysis"]))) == {
        ("bob", OLCF),
        ("analysis", S3DF),
    }


def test_an_issuer_nobody_knows_is_told_with_those_there_are(service: Callable[..., ApiConfig]) -> None:
    with pytest.raises(ValueError, match=r"'dan@nersc': 'nersc' is no short name of an issuer \(s3df, olcf\)"):
        readers.access(BOB, None, ["dan@nersc"], ROLES, service())
    with pytest.raises(ConfigError, match=r"ports.readers: 'dan@nersc': .*none is listed in a roles file"):
        readers.check(service(readers=["dan@nersc"]), NOBODY)


def test_only_the_engine_may_push_whoever_may_pull(service: Callable[..., ApiConfig]) -> None:
    access = readers.access(BOB, None, (), ROLES, service(readers="anyone-trusted"))
    assert access == {"producers": [{"login": "engine", "issuer": S3DF}], "consumers": None}


def test_an_engine_whose_certificate_is_not_on_this_machine_must_be_named(
    settings: Callable[..., ApiConfig], tmp_path: Path
) -> None:
    engine = {"credentials": str(tmp_path / "elsewhere")}
    with pytest.raises(ConfigError, match=r"id.crt cannot be read here .*engine: \{identity: LOGIN\}"):
        readers.check(settings(ports={"scheme": "tls+tcp"}, engine=engine), ROLES)
    named = settings(ports={"scheme": "tls+tcp"}, engine={**engine, "identity": "engine@olcf"})
    access = readers.access(BOB, None, (), ROLES, named)
    assert access is not None
    assert access["producers"] == [{"login": "engine", "issuer": OLCF}]


def test_plain_sockets_have_no_list_and_a_script_that_would_drop_it_is_refused(
    settings: Callable[..., ApiConfig],
) -> None:
    assert readers.access(BOB, None, ["dan"], ROLES, settings()) is None
    script = BUFFER_SCRIPT.replace("{access}", "")
    settings(buffer={"script": script})
    with pytest.raises(ValidationError, match=r"buffer.script has no \{access\}"):
        settings(ports={"scheme": "tls+tcp"}, buffer={"script": script})


def test_the_buffer_job_gets_its_lists_in_a_file_and_not_on_the_command_line(service: Callable[..., ApiConfig]) -> None:
    config = service()
    endpoint = {"input": "tls+tcp://h:1", "output": "tls+tcp://h:2", "status": "https://h:3"}
    row = TransferRow(id=7, ranks=1, producers=1, endpoints=[endpoint], sentinel=0)
    row.access = readers.access(BOB, None, (), ROLES, config)
    assert "--config access.json" in launch.buffer_job(row, 0, config).script
    assert "bob" not in launch.buffer_job(row, 0, config).script
    lists = json.loads(launch.buffer_files(row)["access.json"])["tls"]
    assert lists == {
        "producers": [{"login": "engine", "issuer": S3DF}],
        "consumers": [{"login": "bob", "issuer": OLCF}],
    }
    row.access = None
    assert launch.buffer_files(row) == {}
    assert "--config" not in launch.buffer_job(row, 0, config).script
