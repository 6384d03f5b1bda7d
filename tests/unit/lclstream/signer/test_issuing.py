"""Promises about which keys are signed, and what a certificate says."""

from __future__ import annotations

import base64
import datetime
from pathlib import Path

import pytest
from certified import encode
from certified.ca import CA
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa, x25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lclstream.config_file import ConfigError
from lclstream.security.identity import Identity
from lclstream.signer.errors import RefusedError
from lclstream.signer.issuing import Authority, SentKey, read_key


def public_pem(key: object) -> str:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()  # type: ignore[attr-defined]


def request_pem(key: ed25519.Ed25519PrivateKey, *, login: str = "root") -> str:
    builder = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(encode.person_name(login, uname=login))
        .add_extension(x509.BasicConstraints(ca=True, path_length=3), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("api.s3df.example")]), critical=False)
    )
    return builder.sign(key, None).public_bytes(Encoding.PEM).decode()


KEY = ed25519.Ed25519PrivateKey.generate()
NOW = datetime.datetime.now(datetime.UTC).replace(microsecond=0)


@pytest.mark.parametrize(
    "key",
    [
        KEY,
        ed448.Ed448PrivateKey.generate(),
        ec.generate_private_key(ec.SECP256R1()),
        ec.generate_private_key(ec.SECP384R1()),
        ec.generate_private_key(ec.SECP521R1()),
    ],
)
def test_the_usual_kinds_of_keys_are_signed(key: object, authority_folder: Path) -> None:
    sent = read_key(public_pem(key))
    assert sent.form == "key"
    certificate = Authority(authority_folder).sign(sent, "ada", 12, now=NOW)
    assert certificate.public_key() == key.public_key()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "key",
    [
        rsa.generate_private_key(65537, 2048),
        ec.generate_private_key(ec.SECP256K1()),
        x25519.X25519PrivateKey.generate(),
    ],
)
def test_other_kinds_of_keys_are_refused(key: object) -> None:
    with pytest.raises(RefusedError, match="Ed25519") as refused:
        read_key(public_pem(key))
    assert refused.value.rule == "kind of key"


def test_the_same_key_is_found_in_a_request_a_certificate_and_alone(authority_folder: Path) -> None:
    certificate = Authority(authority_folder).sign(SentKey(KEY.public_key(), "key"), "ada", 1, now=NOW)
    forms = [
        read_key(pem) for pem in (request_pem(KEY), certificate.public_bytes(Encoding.PEM).decode(), public_pem(KEY))
    ]
    assert [sent.form for sent in forms] == ["request", "certificate", "key"]
    assert len({sent.sha256 for sent in forms}) == 1


def test_nothing_of_a_request_but_its_key_gets_into_the_certificate(authority_folder: Path) -> None:
    certificate = Authority(authority_folder).sign(read_key(request_pem(KEY, login="root")), "ada", 12, now=NOW)
    identity = Identity.of_certificate(certificate.public_bytes(Encoding.DER))
    assert identity.login == "ada"
    assert "root" not in identity.subject
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    with pytest.raises(x509.ExtensionNotFound):
        certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert not certificate.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign


def test_a_certificate_is_valid_for_the_hours_and_from_a_little_earlier(authority_folder: Path) -> None:
    authority = Authority(authority_folder)
    certificate = authority.sign(read_key(public_pem(KEY)), "ada", 1.5, now=NOW)
    assert certificate.not_valid_after_utc == NOW + datetime.timedelta(hours=1.5)
    assert certificate.not_valid_before_utc >= authority.certificate.not_valid_before_utc
    later = NOW + datetime.timedelta(days=1)
    assert authority.sign(read_key(public_pem(KEY)), "ada", 1, now=later).not_valid_before_utc < later


def test_a_certificate_does_not_outlive_its_issuer(authority_folder: Path) -> None:
    authority = Authority(authority_folder)
    end = authority.certificate.not_valid_after_utc
    certificate = authority.sign(read_key(public_pem(KEY)), "ada", 12, now=end - datetime.timedelta(hours=1))
    assert certificate.not_valid_after_utc == end
    with pytest.raises(RefusedError, match="expired") as refused:
        authority.sign(read_key(public_pem(KEY)), "ada", 12, now=end)
    assert refused.value.rule == "authority"


def test_a_private_key_is_refused_and_never_repeated() -> None:
    pem = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    with pytest.raises(RefusedError, match="never leave its folder") as refused:
        read_key(pem)
    assert pem.splitlines()[1] not in str(refused.value)


def test_a_request_that_its_key_did_not_sign_is_refused() -> None:
    good = x509.load_pem_x509_csr(request_pem(KEY).encode()).public_bytes(Encoding.DER)
    forged = x509.load_der_x509_csr(good[:-1] + bytes([good[-1] ^ 1])).public_bytes(Encoding.PEM).decode()
    with pytest.raises(RefusedError) as refused:
        read_key(forged)
    assert refused.value.rule == "proof"


def test_the_signers_own_key_is_not_signed(authority_folder: Path) -> None:
    authority = Authority(authority_folder)
    with pytest.raises(RefusedError, match="own key"):
        authority.sign(read_key(authority.pem), "ada", 1, now=NOW)


@settings(max_examples=150, deadline=None)
@given(
    st.text(max_size=200)
    | st.builds(
        lambda kind, body: f"-----BEGIN {kind}-----\n{body}\n-----END {kind}-----\n",
        st.sampled_from(["CERTIFICATE", "CERTIFICATE REQUEST", "NEW CERTIFICATE REQUEST", "PUBLIC KEY", "X"]),
        st.binary(max_size=100).map(lambda data: data.hex()) | st.text(max_size=50),
    )
)
def test_any_text_is_a_key_or_refused(text: str) -> None:
    with pytest.raises(RefusedError):
        read_key(text)


@settings(max_examples=150, deadline=None)
@example(place=8, value=9)  # a version that no request has
@given(st.integers(0, 10_000), st.integers(0, 255))
def test_a_damaged_request_is_refused_or_holds_a_key_it_proves(place: int, value: int) -> None:
    der = bytearray(x509.load_pem_x509_csr(request_pem(KEY).encode()).public_bytes(Encoding.DER))
    der[place % len(der)] = value
    pem = f"-----BEGIN CERTIFICATE REQUEST-----\n{base64.encodebytes(der).decode()}-----END CERTIFICATE REQUEST-----\n"
    try:
        sent = read_key(pem)
    except RefusedError:
        return
    assert sent.key == KEY.public_key()


# --- the signing key


def test_an_authority_with_an_open_key_is_refused(authority_folder: Path) -> None:
    (authority_folder / "CA.key").chmod(0o640)
    with pytest.raises(ConfigError, match=r"mode 0640.*chmod 600"):
        Authority(authority_folder)


def test_an_authority_that_is_missing_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="certified init"):
        Authority(tmp_path)


def test_a_key_of_another_authority_is_refused(authority_folder: Path) -> None:
    (authority_folder / "CA.key").unlink()
    (authority_folder / "CA.crt").rename(authority_folder / "kept.crt")
    CA.new(encode.org_name("other", "users")).save(authority_folder / "CA")
    (authority_folder / "kept.crt").replace(authority_folder / "CA.crt")
    with pytest.raises(ConfigError, match="do not belong together"):
        Authority(authority_folder)


def test_a_user_certificate_signs_nobody(tmp_path: Path, authority_folder: Path) -> None:
    leaf = CA.load(authority_folder / "CA").leaf_cert(
        encode.person_name("ada", uname="ada"), encode.SAN(hosts=["localhost"])
    )
    (tmp_path / "leaf").mkdir()
    leaf.save(tmp_path / "leaf/CA")
    with pytest.raises(ConfigError, match="no CA certificate"):
        Authority(tmp_path / "leaf")


def test_a_damaged_authority_is_refused(authority_folder: Path) -> None:
    (authority_folder / "CA.crt").write_text("nonsense")
    with pytest.raises(ConfigError, match="cannot be read"):
        Authority(authority_folder)


def test_an_authority_on_an_elliptic_curve_signs_too(tmp_path: Path) -> None:
    folder = tmp_path / "curve"
    folder.mkdir()
    CA.new(encode.org_name("s3df", "users"), key_type=encode.KeyType.secp384r1).save(folder / "CA")
    authority = Authority(folder)
    certificate = authority.sign(read_key(public_pem(KEY)), "ada", 1, now=NOW)
    certificate.verify_directly_issued_by(authority.certificate)
    assert isinstance(certificate.signature_hash_algorithm, hashes.SHA512)
