"""The held-out side: whole groups of near-duplicates, chosen by hash.

    group      texts linked by a chain of near-duplicates (:func:`kexa.data.duplicates.groups`)
    held out   when the last digits of the group's smallest hash, read as a fraction, are below
               the share

So no text and no near-duplicate of it stand on both sides, the order of the documents does not
matter, and a new document moves another only if it resembles it. chosen: all of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from kexa.data.document import Document
from kexa.data.duplicates import groups


def heldout(documents: Sequence[Document], share: float) -> list[bool]:
    """For each document whether it is held out.

    Args:
        share: expected share of groups that are held out.

    Raises:
        ValueError: a share outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"heldout_share={share} must lie in [0, 1]")
    smallest: dict[int, str] = {}
    members = groups(d.text for d in documents)
    for group, document in zip(members, documents, strict=True):
        smallest[group] = min(document.hash, smallest.get(group, document.hash))
    return [int(smallest[group][-13:], 16) / 16**13 < share for group in members]
