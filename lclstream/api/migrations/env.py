"""How Alembic runs the changes: over the connection it is given (:mod:`lclstream.api.database`), in one transaction."""

from alembic import context

from lclstream.api.tables import Base

connection = context.config.attributes.get("connection")
if connection is None:
    raise SystemExit("run `python -m lclstream.api.database URL`: it opens the database as the service does")
context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
