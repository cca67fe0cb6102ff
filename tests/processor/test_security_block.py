"""The VM security block: every state and every command against one table; what is stored comes back, what is damaged does not."""

from __future__ import annotations

import io
import uuid
from collections.abc import Callable
from contextlib import suppress
from itertools import product
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.pretty import pprint

from spvtpm.processor.arrival import Arrival
from spvtpm.processor.ownership import Ownership
from spvtpm.processor.security_block import VmSecurityBlock, VmState
from spvtpm.wire.errors import AlreadyExists, IntegrityError, SpvtpmError, WrongState
from spvtpm.wire.instance_content import Policy
from spvtpm.wire.mailbox import derive_boot_key
from spvtpm.wire.owner_messages import MAX_EVENTS, Event
from tests.owner import ANYTHING

VM = uuid.UUID("11111111-1111-4111-8111-111111111111")
VTPM = uuid.UUID("22222222-2222-4222-8222-222222222222")
OTHER_VTPM = uuid.UUID("33333333-3333-4333-8333-333333333333")
OWNERSHIP = Ownership(
    owner=b"o" * 32, user_secret=b"u" * 32, vm_key=b"k" * 32, policy=ANYTHING, label="mail server", inject_key=True
)

ARRIVAL = Arrival(
    handoff=bytes(16),
    source=bytes(16),
    commit_sha256=bytes(32),
    abort_sha256=bytes(32),
    receipt=bytes(32),
    stop_nonce=b"s" * 32,
)

RUNNING, STOPPED, FAILED, HIBERNATED = VmState.RUNNING, VmState.STOPPED, VmState.FAILED, VmState.HIBERNATED
LEAVING, ARRIVING = VmState.LEAVING, VmState.ARRIVING

COMMANDS: dict[str, Callable[[VmSecurityBlock], VmSecurityBlock]] = {
    "launch": VmSecurityBlock.launch,
    "start": VmSecurityBlock.start,
    "stop": VmSecurityBlock.stop,
    "hibernate": VmSecurityBlock.hibernate,
    "fail": lambda block: block.fail("its worker died"),
    "bind": lambda block: block.bind(OTHER_VTPM),
    "export": VmSecurityBlock.begin_export,
    "rotate": lambda block: block.rotate(b"n" * 32),
    "leave": VmSecurityBlock.leave,
    "stay": VmSecurityBlock.stay,
    "go live": lambda block: block.go_live(None, running=False),
}

Life = tuple[VmState, bool, bool]
"""A block's state, whether it has a vTPM, whether it was ever launched here."""

LIVES: list[Life] = [
    (STOPPED, False, False),
    (STOPPED, True, False),  # imported
    (HIBERNATED, True, False),  # imported
    *product((RUNNING, STOPPED, FAILED), (False, True), (True,)),
    (HIBERNATED, True, True),
    (LEAVING, True, True),
    (ARRIVING, True, True),
]

ALLOWED: dict[Life, dict[str, VmState]] = {
    # what is not here is refused
    (STOPPED, False, False): {"launch": RUNNING},
    (STOPPED, True, False): {"launch": RUNNING, "export": STOPPED},
    (HIBERNATED, True, False): {"launch": RUNNING, "export": HIBERNATED},
    (RUNNING, False, True): {"stop": STOPPED, "fail": FAILED, "bind": RUNNING},
    (RUNNING, True, True): {"stop": STOPPED, "fail": FAILED, "hibernate": HIBERNATED, "leave": LEAVING},
    (STOPPED, False, True): {"start": RUNNING},
    (STOPPED, True, True): {"start": RUNNING, "export": STOPPED},
    (FAILED, False, True): {"stop": STOPPED},
    (FAILED, True, True): {"stop": STOPPED},
    (HIBERNATED, True, True): {"start": RUNNING, "export": HIBERNATED},
    (LEAVING, True, True): {"stay": RUNNING},
    (ARRIVING, True, True): {"go live": HIBERNATED},
}


def outcome(life: Life, command: str) -> VmState | type[SpvtpmError]:
    """The new state, or why not."""
    state, bound, launched = life
    if command == "rotate":
        return state
    refusal = (
        AlreadyExists if (command, launched) == ("launch", True) or (command, bound) == ("bind", True) else WrongState
    )
    return ALLOWED[life].get(command, refusal)


def block_in(life: Life) -> VmSecurityBlock:
    """By commands alone, as it would come to be."""
    state, bound, launched = life
    if not launched:
        if not bound:
            return VmSecurityBlock.provision(VM, OWNERSHIP)
        return VmSecurityBlock.provision_imported(VM, OWNERSHIP, VTPM, 3, hibernated=state is HIBERNATED)
    block = VmSecurityBlock.provision(VM, OWNERSHIP).launch()
    if bound:
        block = block.bind(VTPM)
    to: dict[VmState, Callable[[], VmSecurityBlock]] = {
        RUNNING: lambda: block,
        STOPPED: block.stop,
        FAILED: lambda: block.fail("its worker died"),
        HIBERNATED: block.hibernate,
        LEAVING: block.leave,
        ARRIVING: lambda: VmSecurityBlock.arrive(VM, block.moving_part(bytes(16)), ARRIVAL, bytes(32)),
    }
    return to[state]()


def test_the_table_knows_every_life_that_commands_can_lead_to_and_every_state() -> None:
    assert ALLOWED.keys() == set(LIVES)
    assert {state for state, _bound, _launched in LIVES} == set(VmState)
    assert {command for row in ALLOWED.values() for command in row} | {"rotate"} == set(COMMANDS)
    for life, run in product(LIVES, COMMANDS.values()):
        with suppress(SpvtpmError):
            after = run(block_in(life))
            assert (after.state, after.vtpm_id is not None, after.boots > 0) in LIVES


@pytest.mark.claim("C2")
@pytest.mark.claim("C6a")
@pytest.mark.claim("C6b")
@pytest.mark.parametrize(("life", "command"), [*product(LIVES, COMMANDS)], ids=str)
def test_each_command_does_in_each_state_what_the_table_says(life: Life, command: str) -> None:
    block = block_in(life)
    before = msgspec.structs.asdict(block)
    wanted = outcome(life, command)

    if isinstance(wanted, VmState):
        after = COMMANDS[command](block)
        assert after.state is wanted
        assert len(after.events) == len(block.events) + (command not in ("bind", "leave")), "the owner can read of it"
    else:
        with pytest.raises(wanted, match=str(VM)):
            COMMANDS[command](block)
    assert msgspec.structs.asdict(block) == before, "a transition makes a new block"


def test_a_new_block_has_never_booted_and_has_no_vtpm() -> None:
    block = VmSecurityBlock.provision(VM, OWNERSHIP)
    assert (block.vm_id, block.ownership, block.state, block.boots) == (VM, OWNERSHIP, STOPPED, 0)
    assert (block.boot_id, block.vtpm_id, block.version) == (None, None, 0)


def test_an_imported_block_goes_on_with_the_files_version_and_state() -> None:
    for hibernated, state in ((False, STOPPED), (True, HIBERNATED)):
        block = VmSecurityBlock.provision_imported(VM, OWNERSHIP, VTPM, 7, hibernated=hibernated)
        assert (block.state, block.boots, block.vtpm_id, block.version) == (state, 0, VTPM, 7)
        assert block.begin_export().version == 8


@pytest.mark.attack("A13")
def test_a_start_is_a_new_boot_and_a_stop_or_hibernation_ends_it() -> None:
    first = block_in((RUNNING, True, True))
    assert first.boot_id is not None
    assert len(first.boot_id) == 16
    for rest in (first.stop(), first.hibernate()):
        second = rest.start()
        assert rest.boot_id is None
        assert second.boot_id != first.boot_id
        assert (first.boots, rest.boots, second.boots) == (1, 1, 2)
        assert second.boot_key() != first.boot_key(), "no frame of an earlier boot opens"


def test_the_boot_key_is_made_of_this_vms_key_id_and_boot() -> None:
    block = block_in((RUNNING, True, True))
    assert block.boot_id is not None
    assert block.boot_key() == derive_boot_key(b"k" * 32, VM.bytes, block.boot_id)


def test_a_failed_vm_has_the_boot_that_failed_until_it_is_stopped() -> None:
    running = block_in((RUNNING, True, True))
    assert running.fail("why").boot_id == running.boot_id
    assert running.fail("why").stop().boot_id is None


@pytest.mark.claim("C2")
@pytest.mark.attack("A10")
@given(st.lists(st.sampled_from(sorted(COMMANDS)), max_size=40))
def test_no_sequence_of_commands_changes_owner_or_binding_or_repeats_a_boot_or_version(commands: list[str]) -> None:
    block = VmSecurityBlock.provision(VM, OWNERSHIP)
    boots, versions = [], []
    for command in commands:
        try:
            after = COMMANDS[command](block)
        except SpvtpmError:
            continue
        assert (after.vm_id, after.ownership.owner, after.ownership.vm_key) == (VM, b"o" * 32, b"k" * 32)
        if command == "bind":
            assert (block.vtpm_id, after.vtpm_id) == (None, OTHER_VTPM)
        else:
            assert after.vtpm_id == block.vtpm_id
        assert (after.state in (STOPPED, HIBERNATED)) == (after.boot_id is None)
        if command in ("launch", "start"):
            boots.append(after.boot_id)
        if command == "export":
            versions.append(after.version)
        block = after
    assert block.boots == len(boots) == len(set(boots))
    assert versions == list(range(1, block.version + 1))


def test_a_new_secret_takes_the_old_ones_place_and_nothing_elses() -> None:
    block = block_in((STOPPED, True, True))
    rotated = block.rotate(b"n" * 32)
    assert rotated.ownership == msgspec.structs.replace(OWNERSHIP, user_secret=b"n" * 32)
    assert b"u" * 32 not in rotated.to_record()


@given(st.text(max_size=400))
def test_any_reason_becomes_an_event_that_can_be_stored_and_told(reason: str) -> None:
    block = block_in((RUNNING, True, True)).fail(reason)
    assert VmSecurityBlock.from_record(VM, block.to_record()).events == block.events


def test_the_newest_events_are_kept() -> None:
    block = block_in((RUNNING, True, True))
    for number in range(MAX_EVENTS + 5):
        block = block.noting("started", str(number))
    assert [event.detail for event in block.events] == [str(number) for number in range(5, MAX_EVENTS + 5)]


# What is shown

SECRETS = {
    "UserSecret": b"u-secret-" * 3 + b"-----",
    "VM key": b"k-secret-" * 3 + b"-----",
    "moves key": b"m-secret-" * 3 + b"-----",
}


def telling_block() -> VmSecurityBlock:
    ownership = Ownership(
        owner=b"o" * 32,
        user_secret=SECRETS["UserSecret"],
        vm_key=SECRETS["VM key"],
        policy=ANYTHING,
        label="",
        inject_key=False,
    )
    return msgspec.structs.replace(VmSecurityBlock.provision(VM, ownership), moves_key=SECRETS["moves key"]).launch()


def rich_output(value: object) -> str:
    written = io.StringIO()
    console = Console(file=written, width=200)
    pprint(value, console=console, expand_all=True)
    console.print(value)
    return written.getvalue()


@pytest.mark.attack("A24")
@pytest.mark.parametrize("show", [repr, str, rich_output, "{:}".format], ids=["repr", "str", "rich", "format"])
def test_no_secret_of_a_block_is_shown(show: Callable[[object], str]) -> None:
    block = telling_block()
    for value in (block, block.ownership, [block], {"ownership": block.ownership}):
        shown = show(value)
        assert "6f" * 32 in shown, "but whose it is"
        for name, secret in SECRETS.items():
            assert secret.decode() not in shown, name
            assert secret.decode() in show([secret]), "the search finds what is there"


@pytest.mark.attack("A24")
def test_no_error_of_a_block_or_of_a_damaged_record_quotes_a_secret() -> None:
    block = telling_block()
    told = []
    for run in COMMANDS.values():
        for each in (block, block.stop(), block.fail("why")):
            try:
                run(each)
            except SpvtpmError as error:
                told.append(f"{error!r} {error}")
    record = block.to_record()
    for bad in (record[:-1], record + b"\0", record.replace(b"user_secret", b"user_secrets"), record):
        with pytest.raises(IntegrityError) as caught:
            VmSecurityBlock.from_record(OTHER_VTPM, bad)
        told.append(f"{caught.value!r} {caught.value} {caught.value.__cause__}")
    assert len(told) > 10
    for secret in SECRETS.values():
        assert not any(secret.decode() in sentence for sentence in told)


# What is stored

keys = st.binary(min_size=32, max_size=32)
counts = st.integers(0, (1 << 63) - 1)
printable = st.text(st.characters(exclude_categories=("C", "Z")), max_size=64)
policies = st.builds(
    Policy,
    migration_allowed=st.booleans(),
    chips=st.none() | st.frozensets(st.binary(min_size=16, max_size=16), min_size=1, max_size=3),
    minimum_firmware=st.integers(0, (1 << 32) - 1),
    direct_path_only=st.booleans(),
    pcr_banks=st.frozensets(st.sampled_from(["sha1", "sha256", "sha384", "sha512"])),
)
ownerships = st.builds(Ownership, owner=keys, user_secret=keys, vm_key=keys, policy=policies, label=printable)
events = st.builds(
    Event, time_s=st.integers(0, 253_402_300_799), what=st.sampled_from(["started", "export-begun"]), detail=printable
)
blocks = st.builds(
    VmSecurityBlock,
    vm_id=st.uuids(),
    ownership=ownerships,
    state=st.sampled_from(VmState),
    boot_id=st.none() | st.binary(min_size=16, max_size=16),
    boots=counts,
    vtpm_id=st.none() | st.uuids(),
    version=counts,
    events=st.lists(events, max_size=MAX_EVENTS).map(tuple),
    emulated=st.booleans(),
)


@pytest.mark.claim("C6c")
@given(blocks)
def test_what_was_stored_comes_back_whole_and_at_rest(block: VmSecurityBlock) -> None:
    loaded = VmSecurityBlock.from_record(block.vm_id, block.to_record())
    at_rest = block.state if block.state in (HIBERNATED, ARRIVING) else STOPPED
    assert loaded == msgspec.structs.replace(block, state=at_rest, boot_id=None, emulated=False)
    assert {*msgspec.structs.asdict(loaded)} == {
        *("vm_id", "ownership", "state", "boot_id", "boots", "vtpm_id", "version", "events", "vm_uid"),
        *("moves_key", "arrival", "emulated"),
    }, "a new field needs a decision whether it outlives the process"


@given(blocks)
def test_the_boot_id_is_never_stored(block: VmSecurityBlock) -> None:
    assert block.to_record() == msgspec.structs.replace(block, boot_id=None).to_record()


@pytest.mark.attack("A10")
@given(blocks, st.uuids())
def test_a_record_is_good_for_its_own_vm_only(block: VmSecurityBlock, other: uuid.UUID) -> None:
    if other != block.vm_id:
        with pytest.raises(IntegrityError, match=str(other)):
            VmSecurityBlock.from_record(other, block.to_record())


@given(blocks, st.data())
def test_a_record_that_is_cut_off_or_longer_is_damaged(block: VmSecurityBlock, data: st.DataObject) -> None:
    record = block.to_record()
    damaged = record[: data.draw(st.integers(0, len(record) - 1))]
    for bad in (damaged, record + b"\0"):
        with pytest.raises(IntegrityError, match="is damaged"):
            VmSecurityBlock.from_record(block.vm_id, bad)


anything: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.text(max_size=40) | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)


@given(anything)
def test_something_else_than_a_record_is_damaged(content: object) -> None:
    with pytest.raises(IntegrityError, match="is damaged"):
        VmSecurityBlock.from_record(VM, msgspec.msgpack.encode(content))


def stored_fields() -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.msgpack.decode(block_in((RUNNING, True, True)).to_record())
    return fields


@pytest.mark.parametrize(
    "change",
    [
        {"format": 4},
        {"format": 6},
        {"boots": -1},
        {"boots": 1 << 63},
        {"boots": "1"},
        {"version": -1},
        {"version": 1 << 63},
        {"vtpm_id": "not a uuid"},
        {"vm_id": None},
        {"hibernated": 1},
        {"events": [{"time_s": 0, "what": "started", "detail": ""}] * (MAX_EVENTS + 1)},
        {"events": [{"time_s": 0, "what": "Two words", "detail": ""}]},
        {"events": [{"time_s": -1, "what": "started", "detail": ""}]},
        {"ownership": None},
        {"secret": "more"},
    ],
    ids=str,
)
def test_a_record_with_one_field_out_of_bounds_is_damaged(change: dict[str, object]) -> None:
    with pytest.raises(IntegrityError, match="is damaged"):
        VmSecurityBlock.from_record(VM, msgspec.msgpack.encode(stored_fields() | change))


@pytest.mark.parametrize(
    "change",
    [
        *({name: bytes(size)} for name in ("owner", "user_secret", "vm_key") for size in (0, 31, 33)),
        {"label": "x" * 257},
        {"label": "two\nlines"},
        {"policy": {}},
        {"more": None},
    ],
    ids=str,
)
def test_a_record_with_an_ownership_out_of_bounds_is_damaged(change: dict[str, object]) -> None:
    fields = stored_fields()
    fields["ownership"] |= change
    with pytest.raises(IntegrityError, match="is damaged"):
        VmSecurityBlock.from_record(VM, msgspec.msgpack.encode(fields))


def test_a_record_that_lacks_a_field_is_damaged() -> None:
    fields = stored_fields()
    for name in fields:
        less = {key: value for key, value in fields.items() if key != name}
        with pytest.raises(IntegrityError, match="is damaged"):
            VmSecurityBlock.from_record(VM, msgspec.msgpack.encode(less))
    for name in fields["ownership"]:
        less = {key: value for key, value in fields["ownership"].items() if key != name}
        with pytest.raises(IntegrityError, match="is damaged"):
            VmSecurityBlock.from_record(VM, msgspec.msgpack.encode(fields | {"ownership": less}))


@pytest.mark.attack("A30")
def test_memory_from_another_host_is_named_in_the_first_boot_alone() -> None:
    """In a later one, the VM has been running, and memory from before would be a way back in time."""
    leaving = msgspec.structs.replace(VmSecurityBlock.provision(VM, OWNERSHIP), vtpm_id=VTPM).launch().leave()
    arrived = VmSecurityBlock.arrive(VM, leaving.moving_part(bytes(16)), ARRIVAL, bytes(32))
    for first in (arrived.go_live(None, running=True), arrived.go_live(None, running=False).start()):
        named = first.launch_secret().memory
        assert named is not None and (named.handoff_id, named.stop_nonce) == (ARRIVAL.handoff, ARRIVAL.stop_nonce)
        for later in (first.stop().start(), first.hibernate().start()):
            assert later.launch_secret().memory is None
        untouched = first.hibernate(is_untouched=True)
        for _attempt in range(2):  # it goes on with that memory still, as often as nobody has taken its key
            assert untouched.start().launch_secret().memory == named
            untouched = untouched.start().hibernate(is_untouched=True)
        assert untouched.start().hibernate().start().launch_secret().memory is None
    assert leaving.launch_secret().memory is None
