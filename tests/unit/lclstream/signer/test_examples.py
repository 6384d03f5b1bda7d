"""The examples in the documentation are read by the programs they are for."""

from __future__ import annotations

from pathlib import Path

import pytest

from lclstream.security import revocation, roles
from lclstream.signer import config

EXAMPLES = Path(__file__).resolve().parents[4] / "docs" / "examples"


@pytest.mark.parametrize("name", ["signer-minimal.yaml", "signer-site.yaml"])
def test_the_example_configurations_are_valid(name: str) -> None:
    assert config.load(EXAMPLES / name).authority == Path("/etc/lclstream/authority")


def test_the_example_with_every_setting_has_every_setting() -> None:
    assert config.load(EXAMPLES / "signer-site.yaml").model_fields_set == set(config.SignerConfig.model_fields)


def test_the_example_roles_and_revocations_are_valid() -> None:
    assert roles.load(EXAMPLES / "signer-roles.yaml").operators[1].login == "olga"
    assert revocation.load(EXAMPLES / "signer-revoked.yaml")[0].serial == "3f9c21a4"
