"""The signer: short-lived certificates for the users of a machine, by the login its kernel reports.

A user's program connects to a UNIX socket; the kernel says who it is (`SO_PEERCRED`), and nothing in the request can
say otherwise. The signer signs the user's public key for that login and a few hours, writes it into a table first, and
can be asked whether a certificate was revoked. The private key is made in the user's folder and never leaves it.

===============  ===============================================================
:mod:`.config`   where the socket, the signing key and the table are; the rules
:mod:`.wire`     what travels over the socket: one JSON line each way
:mod:`.peer`     who is at the other end of a UNIX socket
:mod:`.issuing`  which public keys are signed, and what the certificate says
:mod:`.store`    the table of signatures and revocations
:mod:`.service`  what is answered to whom
:mod:`.server`   the socket
:mod:`.client`   asking, and installing the answer into a `certified` folder
:mod:`.cli`      ``lclstream signer``
===============  ===============================================================
"""
