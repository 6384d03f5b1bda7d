"""Promises about who may do what."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lclstream.security.errors import CredentialsError
from lclstream.security.identity import Identity
from lclstream.security.roles import NOBODY, RULES, Action, Person, Role, Roles, RolesFile, load

S3DF = "2.5.4.65=Signing Certificate,OU=lclstream,O=s3df"
OLCF = "2.5.4.65=Signing Certificate,OU=lclstream,O=olcf"
DOCUMENT: dict[str, Any] = {
    "issuers": {"s3df": S3DF, "olcf": OLCF},
    "home": "s3df",
    "operators": ["oscar", "olga@olcf"],
    "services": ["jobs@olcf"],
    "experiments": {"tmox42619": ["ada", "carol@olcf"]},
}
ROLES = Roles.model_validate(DOCUMENT)
BOB = Person(login="bob", issuer=S3DF)


def caller(login: str, issuer: str = S3DF) -> Identity:
    return Identity(login=login, issuer=issuer, subject=f"UID={login}", serial="3f9c")


@pytest.mark.parametrize(
    ("who", "allowed"),
    [
        (caller("bob"), {Action.see, Action.read, Action.change, Action.cancel}),
        (caller("ada"), {Action.see, Action.read, Action.request}),
        (caller("carol", OLCF), {Action.see, Action.read, Action.request}),
        (caller("oscar"), {Action.see, Action.cancel, Action.request}),
        (caller("olga", OLCF), {Action.see, Action.cancel, Action.request}),
        (caller("jobs", OLCF), {Action.call_back, Action.request}),
        (caller("mallory"), set()),
    ],
)
def test_each_role_may_what_the_table_says(who: Identity, allowed: set[Action]) -> None:
    assert {a for a in Action if ROLES.may(who, a, owner=BOB, experiment="tmox42619")} == allowed


@pytest.mark.parametrize("login", ["bob", "ada", "oscar", "jobs"])
def test_the_same_login_of_another_issuer_is_somebody_else(login: str) -> None:
    other = "O=elsewhere"
    assert not any(ROLES.may(caller(login, other), a, owner=BOB, experiment="tmox42619") for a in Action)


def test_members_of_one_experiment_are_strangers_to_another() -> None:
    assert not ROLES.may(caller("ada"), Action.see, owner=BOB, experiment="xppx00000")
    assert not ROLES.may(caller("ada"), Action.see, owner=BOB)


def test_members_may_be_looked_up_elsewhere() -> None:
    def members(who: Identity, experiment: str) -> bool:
        return (who.login, experiment) == ("dora", "xppx00000")

    assert ROLES.may(caller("dora"), Action.read, owner=BOB, experiment="xppx00000", members=members)
    assert not ROLES.may(caller("dora"), Action.read, owner=BOB, experiment="tmox42619", members=members)


def test_a_ruling_says_who_and_by_which_rule() -> None:
    allowed = ROLES.may(caller("oscar"), Action.cancel, owner=BOB)
    assert "oscar" in allowed.rule
    assert "an operator" in allowed.rule
    refused = ROLES.may(caller("mallory"), Action.cancel, owner=BOB)
    for word in ("3f9c", "mallory", S3DF, "its owner or an operator", "rule: cancel"):
        assert word in refused.rule


def test_without_a_file_everybody_owns_his_own_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    roles = RolesFile(tmp_path / "roles.yaml").current
    assert "roles.yaml does not exist: nobody is operator" in caplog.text, "it may be a slip in the configuration"
    assert roles == NOBODY
    assert roles.may(caller("bob"), Action.cancel, owner=BOB)
    assert not roles.may(caller("oscar"), Action.see, owner=BOB)


def test_every_action_has_a_rule_and_every_role_a_use() -> None:
    assert set(RULES) == set(Action)
    assert set(itertools.chain.from_iterable(RULES.values())) == set(Role)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"operators": ["oscar@nowhere"]}, r"operators.*'nowhere' is not one of `issuers`: olcf, s3df"),
        ({"home": None}, r"operators.*'oscar' names no issuer.*`oscar@issuer`"),
        ({"home": "x"}, r"home: 'x' is not one of the issuers"),
        ({"experiments": {"tmo": "ada"}}, r"experiments\.tmo: a list of logins"),
        ({"experiments": ["tmo"]}, "experiments: a mapping"),
        ({"services": [17]}, "services: 17 is no login"),
        ({"services": ["@s3df"]}, "names no login"),
        ({"issuers": ["x"]}, "issuers: a mapping"),
        ({"admins": []}, "admins"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = tmp_path / "roles.yaml"
    path.write_text(yaml.safe_dump({**DOCUMENT, **change}))
    with pytest.raises(CredentialsError, match=rf"roles\.yaml.*{words}"):
        load(path)


def test_a_changed_file_counts_at_once_and_a_broken_one_not_at_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "roles.yaml"
    path.write_text(yaml.safe_dump(DOCUMENT))
    file = RolesFile(path)
    assert file.current.may(caller("oscar"), Action.cancel, owner=BOB)
    path.write_text(yaml.safe_dump({**DOCUMENT, "operators": ["eve"]}))
    assert not file.current.may(caller("oscar"), Action.cancel, owner=BOB)
    assert file.current.may(caller("eve"), Action.cancel, owner=BOB)
    with caplog.at_level(logging.ERROR):
        path.write_text("operators: [")
        assert file.current.may(caller("eve"), Action.cancel, owner=BOB)
    assert "stay in force" in caplog.text
    path.unlink()
    assert file.current.may(caller("eve"), Action.cancel, owner=BOB), "a removed file does not change the rules"
    assert "does not exist any more" in caplog.text
    path.write_text(yaml.safe_dump(DOCUMENT))
    assert file.current.may(caller("oscar"), Action.cancel, owner=BOB)


@settings(max_examples=300, deadline=None)
@given(document=st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from([*DOCUMENT, "x"]) | st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
))  # fmt: skip
def test_any_document_is_read_or_refused_with_words(document: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("roles") / "roles.yaml"
    path.write_text(yaml.safe_dump(document))
    try:
        roles = load(path)
    except CredentialsError as error:
        message = str(error)
    else:
        assert not roles.may(caller("mallory", "O=unknown to the file"), Action.see, owner=BOB)
        return
    assert message.startswith(str(path))
