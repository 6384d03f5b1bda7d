"""Who is who: certificates in `certified` folders, mutual TLS for clients and servers, identity of a peer.

Every connection between our programs is TLS 1.3 with a certificate on both sides. A program's certificate, key and the
issuers it trusts lie in one folder, in the layout of the published `certified` package, so that its commands
(`certified init`, `introduce`, `add-intro`, `add-service`) manage what we use.

==================  ======================================================================
:mod:`.credentials`  a `certified` folder made into TLS contexts
:mod:`.identity`     who the peer of a connection is, by its certificate
:mod:`.server`       an ASGI application served with mutual TLS, with an access log in JSON
:mod:`.http`         httpx clients that present our certificate and explain refusals
:mod:`.authority`    a site that signs certificates for its own services and users
==================  ======================================================================

Nothing here is imported by name from the package, because an Airflow worker has no server installed.
"""
