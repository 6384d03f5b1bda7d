"""The demonstration: from an empty folder to an analysed run, with every part of the product on one machine.

=====================  ==========================================================================
:mod:`.workspace`       the folder it works in: certificates, configuration, logs, results
:mod:`.processes`       the programs it starts, and how every one of them ends
:mod:`.airflow`         Airflow's four parts, and the few calls of its REST API that are needed
:mod:`.data`            the run that is streamed: made for the occasion, or the user's file
:mod:`.services`        the configuration of each of our services
:mod:`.story`           the loop itself, step by step
:mod:`.report`          what is measured, shown and written to ``summary.json``
=====================  ==========================================================================
"""
