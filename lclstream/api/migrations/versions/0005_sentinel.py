"""How many empty messages a transfer's ZeroMQ consumers get at the end."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; the transfers there are get one, as they did."""
    op.add_column("transfers", sa.Column("sentinel", sa.Integer(), nullable=False, server_default="1"))
