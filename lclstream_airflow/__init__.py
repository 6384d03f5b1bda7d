"""The import package of the Airflow parts, whose folders stand at the top of the repository."""
