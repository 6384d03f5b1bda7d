-- The database `airflow` is made by the image; ours stand beside it.
CREATE DATABASE elog;
CREATE DATABASE transfers;
