"""A stand-in of NERSC's Superfacility API, as far as the published `sfapi_client` uses it.

Same paths, same documents, same tokens; the jobs run on this site's own Slurm (or as local processes). Nothing of
Airflow is in it.
"""
