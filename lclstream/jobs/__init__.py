"""Batch jobs as Psi-k describes them: one folder a job, REST with certificates, states that are the truth.

====================  ==================================================================================
:mod:`.models`        what travels: job specifications, states, history, callbacks
:mod:`.client`        typed clients of a job service, ours or the published psik-api
:mod:`.config`        the service's configuration file
:mod:`.machine`       the job state machine, a pure table
:mod:`.folders`       a job's folder on disk, in the layout of the published psik
:mod:`.confined`      opening files inside a folder and nowhere else
:mod:`.runner`        the process that runs one script, bounds it, and writes down how it ended
:mod:`.backends`      where jobs run: this machine, a Slurm cluster, another site's job service
:mod:`.job`           a job as the engine holds it in memory
:mod:`.leases`        jobs that end when nobody looks after them any more
:mod:`.pruning`       which finished jobs' folders are removed
:mod:`.outbox`        callbacks: in order, repeated until they arrive
:mod:`.signatures`    how callbacks are signed
:mod:`.engine`        the owner of all jobs: starts, follows, cancels, and reconciles after a restart
:mod:`.app`           the REST routes
:mod:`.cli`           ``lclstream jobs``
====================  ==================================================================================

Nothing is imported by name here: an Airflow worker uses the client and has no server installed.
"""
