"""Tags, by which whoever asked for a transfer finds it again."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; the transfers there are have none."""
    op.add_column("transfers", sa.Column("tags", sa.JSON(), nullable=False, server_default="{}"))
