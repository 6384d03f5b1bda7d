"""Who may push into and pull from a transfer's buffers."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; the transfers there are go on without lists, as they began."""
    op.add_column("transfers", sa.Column("access", sa.JSON(), nullable=True))
