"""What both sides of a handoff work on."""

from __future__ import annotations

from dataclasses import dataclass, field

from spvtpm.processor.admission import Admission
from spvtpm.processor.channel_identity import ChannelKeys
from spvtpm.processor.migration.departures import Departures
from spvtpm.processor.migration.peers import Peers
from spvtpm.processor.owner_commands import Estate
from spvtpm.processor.users import Users


@dataclass(frozen=True, slots=True)
class Realm:
    """What both sides of a handoff work on.

    Attributes:
        estate: blocks, vTPMs, NV.
        users: who may have what.
        admission: which VMs may come.
        departures: vTPMs that have left.
        keys: who this secure processor is.
        peers: which others are genuine.
        abort_key: from which abort tokens are derived, 32 bytes.
    """

    estate: Estate
    users: Users
    admission: Admission
    departures: Departures
    keys: ChannelKeys
    peers: Peers
    abort_key: bytes = field(repr=False)
