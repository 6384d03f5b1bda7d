"""Whether a transfer keeps in files what nobody pulls."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; the transfers there are wait for consumers, as they did."""
    op.add_column("transfers", sa.Column("spill", sa.Boolean(), nullable=False, server_default=sa.false()))
