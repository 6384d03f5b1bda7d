"""Who sent a callback: its sender may repeat it when the answer was lost."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns; of the callbacks that were accepted before, the sender is not known."""
    op.add_column("callbacks", sa.Column("login", sa.String(255)))
    op.add_column("callbacks", sa.Column("issuer", sa.String(1024)))
