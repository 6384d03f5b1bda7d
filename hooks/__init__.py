"""Airflow connections made into typed clients of the services; the only place that reads connections."""
