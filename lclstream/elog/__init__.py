"""The electronic logbook: what a run is, who is told when it starts and ends, and which workflows belong to it.

===================  ==================================================================================
:mod:`.models`       runs, files, workflow definitions and jobs, as the logbook writes them
:mod:`.client`       typed clients for its REST interface, blocking and asynchronous
:mod:`.calls`        the calls themselves, as data: both clients send the same
:mod:`.service`      the stand-in: the REST interface over SQL, for tests, demonstrations and small sites
:mod:`.outbox`       its Kafka messages, kept until the broker has them
===================  ==================================================================================

The messages and calls are those of the logbook of LCLS, so either side can be exchanged for the real one.
"""
