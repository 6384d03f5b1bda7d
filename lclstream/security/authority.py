"""A site that vouches for its own services and users: one signing key, and a `certified` folder for each of them.

Used by the demonstration and by tests; a real site does the same steps with the `certified` command. The folders it
makes are those of a member of an organisation (`certified set-org`): the site signs, members hold no signing key.
"""

from __future__ import annotations

from pathlib import Path

from certified import encode
from certified.blob import PublicBlob
from certified.ca import CA
from certified.cert import Certified
from certified.cert_info import CertInfo
from certified.models import TrustedService
from certified.serial import cert_to_b64
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from lclstream.security.credentials import Credentials
from lclstream.security.identity import Identity

#: Names under which services of a site on one machine are reached.
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")


class SiteAuthority:
    """The signing key of a site, kept in ``folder/authority``.

    Args:
        folder: where the site's folders lie; made when missing.
        site: the site's name, such as ``s3df``.
    """

    def __init__(self, folder: Path, site: str) -> None:
        self.folder = folder
        self.site = site
        base = folder / "authority" / "CA"
        if not base.with_suffix(".crt").exists():
            base.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            name = encode.append_pseudonym(encode.org_name(site, "lclstream"), "Signing Certificate")
            CA.new(name).save(base)
        self._authority = CA.load(base)

    @property
    def certificate_pem(self) -> bytes:
        """The site's signing certificate (PEM): whoever holds it trusts everybody the site signed."""
        return PublicBlob(self._authority.certificate).bytes()

    def member(self, login: str, *, hosts: tuple[str, ...] = LOOPBACK_HOSTS) -> Credentials:
        """The certificate folder of a user or service of this site; made at the first call.

        Args:
            login: user or service name; it becomes the certificate's UID and common name.
            hosts: host names and addresses under which a service is reached.
        """
        folder = self.folder / login
        if not (folder / "id.crt").exists():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            leaf = self._authority.leaf_cert(encode.person_name(login, uname=login), encode.SAN(hosts=list(hosts)))
            leaf.save(folder / "id")
            for side in ("known_clients", "known_servers"):
                (folder / side).mkdir(exist_ok=True)
                (folder / side / "org.crt").write_bytes(self.certificate_pem)
        return Credentials(folder)

    def introduce(self, stranger: Credentials, *, service: str, url: str) -> None:
        """Sign another site's member for our services (as `certified introduce` and `add-intro` do).

        The member's own site, or he himself, chose what is in his certificate. Only his key is taken from it as it is:
        here he is ``login@site``, which none of our own logins is, and he can pose as no service.

        Args:
            stranger: the folder of the other site's member; it gets a certificate signed by us.
            service: name under which the member lists our service.
            url: where that service is.
        """
        member = Certified(stranger.folder)
        certificate = x509.load_pem_x509_certificate(stranger.certificate.read_bytes())
        signed = self._authority.issue_cert(
            CertInfo(_guest_name(certificate), None, CertInfo.load(certificate).pubkey, is_ca=False)
        )
        member.add_identity(signed, self._authority.certificate, overwrite=True)
        issuer = encode.rfc4514name(self._authority.certificate.subject)
        entry = TrustedService(url=url, cert=cert_to_b64(self._authority.certificate), auths=[issuer])
        member.add_service(service, entry, overwrite=True)


def _guest_name(certificate: x509.Certificate) -> x509.Name:
    """The subject's name with the login ``login@site``: we vouch for it, and another site's `ada` is not our `ada`."""
    login = Identity.of_certificate(certificate.public_bytes(Encoding.DER)).login
    issuer = certificate.issuer
    named = issuer.get_attributes_for_oid(NameOID.ORGANIZATION_NAME) or issuer.get_attributes_for_oid(
        NameOID.COMMON_NAME
    )
    site = str(named[0].value) if named else issuer.rfc4514_string()
    others = [attribute for attribute in certificate.subject if attribute.oid != NameOID.USER_ID]
    return x509.Name([*others, x509.NameAttribute(NameOID.USER_ID, f"{login}@{site}")])
