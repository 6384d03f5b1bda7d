#!/bin/sh
# First start: make the cluster, the user, the database, and run the SQL files. Then serve the compose network.
set -eu
as_postgres() { setpriv --reuid postgres --regid postgres --clear-groups "$@"; }
mkdir -p "$PGDATA"
chown postgres "$PGDATA"
if [ ! -e "$PGDATA/PG_VERSION" ]; then
  install -m 0600 -o postgres "$POSTGRES_PASSWORD_FILE" /tmp/password
  as_postgres initdb --encoding UTF8 --username "$POSTGRES_USER" --pwfile /tmp/password --auth-local trust --auth-host scram-sha-256
  rm /tmp/password
  echo "host all all all scram-sha-256" >> "$PGDATA/pg_hba.conf"
  as_postgres pg_ctl --wait --options "-c listen_addresses=''" start
  as_postgres psql --username "$POSTGRES_USER" --dbname postgres --command "CREATE DATABASE $POSTGRES_DB"
  for file in /docker-entrypoint-initdb.d/*.sql; do
    as_postgres psql --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" --file "$file"
  done
  as_postgres pg_ctl --wait stop
fi
exec setpriv --reuid postgres --regid postgres --clear-groups postgres -c listen_addresses='*'
