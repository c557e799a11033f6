"""How a peer stands, as its node's agent sees it and the directory tells every process of the node."""

from __future__ import annotations

from enum import IntEnum


class Standing(IntEnum):
    """The values are those in the directory's records."""

    NOBODY = 0  # the place in the directory is free
    CONNECTING = 1  # nothing was heard yet
    FOLLOWING = 2  # it answers, and tells what it has
    LIVE = 3  # what it has is known
    AWAY = 4  # it does not answer; tried again now and then
    LEFT = 5  # it said goodbye
    REFUSED = 6  # it speaks no version that this node speaks, or has no room
