"""Archived runs by the hundred: one DAG run for each, through Airflow's REST interface.

Airflow's own `backfill` wants a DAG with a schedule. Ours makes DAG runs whose ids follow from experiment, run and
name, so that Airflow itself remembers what was done: started again, it goes on where it was.
"""
