"""The transfer service: a REST request becomes a buffer and an MPI engine job, and a URI to pull events from.

================  ========================================================================================
:mod:`.models`    the documents of the REST interface
:mod:`.client`    blocking and async clients (these two import nothing of the server)
:mod:`.states`    the state machine, as a table without any I/O
:mod:`.config`    the service's configuration file
:mod:`.launch`    a transfer's engine configuration and its two job specifications
:mod:`.tables`    the rows a transfer is kept in
:mod:`.database`  opening the database, and changes of its layout
:mod:`.store`     everything durable: transfers, jobs, ports, leases, log
:mod:`.ports`     which ports are free
:mod:`.callbacks` signatures of the job service's callbacks
:mod:`.supervisor` all drivers, and who owns what
:mod:`.driver`    does what the state machine asks for one transfer, and follows its jobs and buffers
:mod:`.status`    a buffer's status over mutual TLS
:mod:`.service`   the FastAPI application
:mod:`.cli`       `lclstream api`
================  ========================================================================================

Nothing is imported here, because an Airflow worker, which needs the client, has no server installed.
"""
