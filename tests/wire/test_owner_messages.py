"""What an owner and a secure processor may say is never longer than what the other side takes."""

from __future__ import annotations

import uuid

from spvtpm.wire.instance_content import MAX_CHIPS, MAX_LABEL_CHARACTERS, MAX_PCR_BANKS, Policy
from spvtpm.wire.owner_messages import (
    MAX_EVENTS,
    MAX_OWNER_MESSAGE_BYTES,
    PAGE_MY_VMS,
    Event,
    Events,
    MyVm,
    MyVms,
    encode_owner_message,
    parse_owner_reply,
)

WIDE = "\U0001f510"
POLICY = Policy(
    migration_allowed=True,
    chips=frozenset(number.to_bytes(16, "big") for number in range(MAX_CHIPS)),
    minimum_firmware=(1 << 32) - 1,
    direct_path_only=True,
    pcr_banks=frozenset(f"bank_{number:011}" for number in range(MAX_PCR_BANKS)),
)


def test_a_full_page_of_vms_with_the_longest_policies_and_labels_fits() -> None:
    vms = [
        MyVm(
            vm_id=uuid.UUID(int=number),
            state="hibernated",
            boots=(1 << 63) - 1,
            label=WIDE * MAX_LABEL_CHARACTERS,
            vtpm_id=uuid.uuid4(),
            residency="active",
            version=(1 << 63) - 1,
            policy=POLICY,
        )
        for number in range(PAGE_MY_VMS)
    ]
    encoded = encode_owner_message(MyVms(vms=vms, more=True))
    assert len(encoded) <= MAX_OWNER_MESSAGE_BYTES
    assert parse_owner_reply(encoded) == MyVms(vms=vms, more=True)


def test_all_events_at_their_longest_fit() -> None:
    events = [Event(time_s=253_402_300_799, what="x" * 32, detail=WIDE * 256) for _ in range(MAX_EVENTS)]
    encoded = encode_owner_message(Events(events=events))
    assert len(encoded) <= MAX_OWNER_MESSAGE_BYTES
    assert parse_owner_reply(encoded) == Events(events=events)
