"""Time in which the service, or its database, was away: it counts against nobody's lease and no time limit.

While it was away nobody could renew a lease, and what jobs and buffers did was not seen. The service writes down every
few seconds that it is there; the gap in these marks is how long it was not.
"""

from __future__ import annotations

from sqlalchemy import func, update
from sqlalchemy.orm import Session

from lclstream.api.states import LIVING
from lclstream.api.tables import ServiceRow, TransferRow

#: Without a mark for longer than this, in seconds, the service was away although no mark was seen to fail.
AWAY_S = 15.0


def mark(session: Session, now: float, *, returned: bool) -> float:
    """Write down that the service is there.

    Args:
        session: a transaction.
        now: seconds since 1970.
        returned: it was away until now, however short: time limits move by as much, and leases begin anew.

    Returns:
        Seconds it was away, 0 when it was not.
    """
    # This row is locked before those of transfers, here and wherever else both are.
    row = session.get(ServiceRow, 1, with_for_update=True)
    gap = 0.0 if row is None else max(0.0, now - row.seen)
    if row is None:
        session.add(ServiceRow(id=1, seen=now))
    else:
        row.seen = now
    if not returned and gap <= AWAY_S:
        return 0.0
    living = TransferRow.state.in_([state.value for state in LIVING])
    session.execute(update(TransferRow).where(living).values(deadline=TransferRow.deadline + gap))
    # A lease from before its length was kept goes on with what was left of it.
    anew = func.coalesce(now + TransferRow.lease_s, TransferRow.lease_expires + gap)
    leased = TransferRow.lease_expires.is_not(None)
    session.execute(update(TransferRow).where(living, leased).values(lease_expires=anew))
    return gap
