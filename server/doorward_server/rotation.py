"""Rotation: how a secret takes the place of another, both valid for a while. Imports `models`."""

from datetime import datetime, timedelta

import peewee

from doorward_server.models import ApplicationSecret, ClientSecret, SigningSecret


def retire(
    model: type[ApplicationSecret | ClientSecret | SigningSecret],
    owned: peewee.Expression,
    overlap: timedelta,
    now: datetime,
) -> datetime:
    """End the secret before the newest after `overlap`, and any older one now; returns when the former ends.

    `owned` tells whose secrets; there are two at least. Inside the caller's transaction.
    """
    *older, previous, _newest = model.select().where(owned).order_by(model.id)
    ends_at: datetime = min(now + overlap, previous.expires_at or now + overlap)
    model.update(expires_at=ends_at).where(model.id == previous.id).execute()
    model.delete().where(model.id.in_([one.id for one in older])).execute()
    return ends_at
