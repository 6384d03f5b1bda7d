"""The first layout: transfers, their jobs, what is still to be done for them, their log, callbacks and ports."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make all tables."""
    # SQLite numbers rows by itself only in a column of exactly this type.
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "transfers",
        sa.Column("id", number, primary_key=True),
        sa.Column("owner", sa.String(255), nullable=False, index=True),
        sa.Column("issuer", sa.String(1024), nullable=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("experiment", sa.String(64)),
        sa.Column("key", sa.String(255)),
        sa.Column("request_sha256", sa.String(64), nullable=False),
        sa.Column("config", sa.JSON(), nullable=False),
        sa.Column("ranks", sa.Integer(), nullable=False),
        sa.Column("producers", sa.Integer(), nullable=False),
        sa.Column("endpoints", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(32), nullable=False, index=True),
        sa.Column("info", sa.Text(), nullable=False),
        sa.Column("jobndx", sa.Integer(), nullable=False),
        sa.Column("created", sa.Double(), nullable=False),
        sa.Column("changed", sa.Double(), nullable=False),
        sa.Column("deadline", sa.Double()),
        sa.Column("lease_expires", sa.Double()),
        sa.Column("buffers", sa.JSON(), nullable=False),
        sa.Column("released", sa.Boolean(), nullable=False, index=True),
        sa.UniqueConstraint("owner", "issuer", "key", name="transfers_key"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "jobs",
        sa.Column("id", number, primary_key=True),
        sa.Column("transfer", number, _of("transfers.id"), nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("key", sa.String(255), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("jobid", sa.String(64), index=True),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("jobndx", sa.Integer(), nullable=False),
        sa.Column("info", sa.Text(), nullable=False),
        sa.Column("started", sa.Boolean(), nullable=False),
        sa.UniqueConstraint("transfer", "role", "position", name="jobs_role"),
    )
    op.create_table(
        "effects",
        sa.Column("id", number, primary_key=True),
        sa.Column("transfer", number, _of("transfers.id"), nullable=False, index=True),
        sa.Column("kind", sa.String(32), nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "log",
        sa.Column("id", number, primary_key=True),
        sa.Column("transfer", number, _of("transfers.id"), nullable=False, index=True),
        sa.Column("job", number, _of("jobs.id")),
        sa.Column("time", sa.Double(), nullable=False),
        sa.Column("client", sa.String(16), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("info", sa.Text(), nullable=False),
        sa.Column("jobndx", sa.Integer(), nullable=False),
    )
    op.create_index("log_job", "log", ["job", "jobndx", "state"])
    op.create_table(
        "callbacks",
        sa.Column("job", number, _of("jobs.id"), primary_key=True),
        sa.Column("sha256", sa.String(64), primary_key=True),
    )
    op.create_table(
        "ports",
        sa.Column("host", sa.String(255), primary_key=True),
        sa.Column("port", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("transfer", number, _of("transfers.id"), nullable=False, index=True),
        sa.Column("leased", sa.Double(), nullable=False),
    )


def _of(column: str) -> sa.ForeignKey:
    return sa.ForeignKey(column, ondelete="CASCADE")
