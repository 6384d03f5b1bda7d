"""The Automated Run Processor: reads what the logbook says on Kafka and starts the DAG runs that its workflows ask for.

====================  ===================================================================================
:mod:`.config`        the configuration file
:mod:`.events`        Kafka messages read into events: a run, a file, a job asked for by hand
:mod:`.names`         the id of the DAG run for an event: a pure function, so the same event gives the same id
:mod:`.decisions`     which DAG runs an event asks for, and why not: pure, no I/O
:mod:`.definitions`   workflow definitions, from the logbook or from a file
:mod:`.airflow_rest`  Airflow's REST interface: token, DAG runs, and which failures are worth another attempt
:mod:`.processor`     the consumer: message, decision, DAG run, commit, in this order
:mod:`.observation`   counts, lag and ages, as JSON and for Prometheus
:mod:`.service`       the same over HTTPS
====================  ===================================================================================
"""
