"""How long a lease is, and when the service was there last."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add both; a lease there is keeps what is left of it until it is renewed."""
    op.add_column("transfers", sa.Column("lease_s", sa.Double(), nullable=True))
    op.create_table(
        "service",
        sa.Column("id", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("seen", sa.Double(), nullable=False),
    )
