"""The session against a secure processor that is genuine and answers nonsense, and against real ones with many VMs."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from spvtpm.terminal.desk import Desk
from spvtpm.terminal.exports import export_vtpm
from spvtpm.terminal.session import OwnerSession
from spvtpm.terminal.socket_relay import through_socket
from spvtpm.vendor.factory import ALL_FEATURES
from spvtpm.wire.certificate_building import Validity, build_channel_certificate
from spvtpm.wire.certificate_extensions import ChannelIdentity
from spvtpm.wire.channel import SecureChannel
from spvtpm.wire.errors import (
    ChannelError,
    FrameError,
    InstanceFileError,
    MessageError,
    NotFound,
    NotRunning,
    PeerError,
    SpvtpmError,
)
from spvtpm.wire.instance_header import MAX_FILE_BYTES
from spvtpm.wire.introductions import Introduce, Papers, encode_clear, parse_clear
from spvtpm.wire.messages import ErrorReply
from spvtpm.wire.owner_messages import (
    MAX_OWNER_MESSAGE_BYTES,
    PAGE_MY_VMS,
    Done,
    ExportBegins,
    ExportVtpm,
    Fate,
    ListMine,
    MyVm,
    MyVms,
    OwnerReply,
    OwnerRequest,
    Piece,
    encode_owner_message,
    parse_owner_request,
)
from tests.owner import ANYTHING
from tests.papers import DAY, der, todays_papers
from tests.relay import Relay, Side
from tests.terminal.estate import VM_KEY, Estate, new_keyring

VM, VTPM = uuid.UUID(int=7), uuid.UUID(int=8)


class ScriptedSp:
    """Genuine papers, a real channel, and for each request the answers that the test wants.

    Args:
        path: of its socket.
        answer: to one request.
    """

    def __init__(self, path: Path, answer: Callable[[OwnerRequest], list[OwnerReply]]) -> None:
        chip, self.key = todays_papers().made, ec.generate_private_key(ec.SECP256R1())
        identity = ChannelIdentity(chip.chip_id, 1, ALL_FEATURES)
        validity = Validity.lasting(datetime.now(UTC) - DAY, 7 * DAY)
        self.certificate = build_channel_certificate(chip.issuer(), self.key.public_key(), identity, validity)
        self.papers = Papers((der(self.certificate), *chip.certificates))
        self.answer = answer
        self.requests: list[OwnerRequest] = []
        self.relay = Relay(path, None, self._serve)

    def _serve(self, _side: Side, number: int, frame: bytes) -> list[bytes]:
        if number == 0:
            return [encode_clear(self.papers)]
        if number == 1:
            said = parse_clear(frame)
            assert isinstance(said, Introduce)
            self.channel = SecureChannel(
                self.key,
                self.certificate,
                said.certificate,
                is_server=True,
                max_message_bytes=MAX_OWNER_MESSAGE_BYTES,
            )
            return []
        try:
            for payload in self.channel.receive(frame):
                self.requests.append(parse_owner_request(payload))
                for reply in self.answer(self.requests[-1]):
                    self.channel.send(encode_owner_message(reply))
        except ChannelError:
            return []
        return self.channel.frames()


def vm(vm_id: uuid.UUID) -> MyVm:
    return MyVm(vm_id=vm_id, state="stopped", boots=0, label="", vtpm_id=None, residency="", version=0, policy=ANYTHING)


@pytest.fixture
def sp(tmp_path: Path) -> Iterator[ScriptedSp]:
    scripted = ScriptedSp(tmp_path / "sp", lambda _request: [Done()])
    with scripted.relay:
        yield scripted


@pytest.fixture
def desk(sp: ScriptedSp, tmp_path: Path) -> Desk:
    return Desk(new_keyring(tmp_path / "keyring"), through_socket(sp.relay.path), timeout_s=30)


def export_of(size_bytes: int, *pieces: int) -> list[OwnerReply]:
    begins = ExportBegins(vtpm_id=VTPM, version=1, size_bytes=size_bytes, hibernated=False)
    return [begins, *(Piece(data=bytes(size)) for size in pieces)]


NONSENSE: list[tuple[Callable[[OwnerSession], object], list[OwnerReply], type[SpvtpmError]]] = [
    (lambda session: session.list_mine(), [Done()], MessageError),
    (lambda session: session.destroy(VM), [MyVms(vms=[], more=False)], MessageError),
    (lambda session: session.ask_fate(VTPM), [Fate(vtpm_id=VM, state="here", version=1)], MessageError),
    (lambda session: session.provision_new(VM, bytes(32), VM_KEY, ANYTHING, ""), [vm(VTPM)], MessageError),
    (lambda session: session.list_mine(), [MyVms(vms=[vm(VTPM), vm(VM)], more=False)], MessageError),
    (lambda session: session.list_mine(), [MyVms(vms=[vm(VM), vm(VM)], more=False)], MessageError),
    (lambda session: session.list_mine(), [MyVms(vms=[vm(VM)], more=True)], MessageError),
    (lambda session: session.export(VM), export_of(100, 60, 60), InstanceFileError),
    (lambda session: session.export(VM), [*export_of(100, 60), Done()], MessageError),
    (lambda session: session.destroy(VM), [ErrorReply("not-found", "none")], NotFound),
]


@pytest.mark.attack("A25")
@pytest.mark.parametrize("number", range(len(NONSENSE)))
def test_an_answer_that_is_not_one_to_the_question_is_refused(sp: ScriptedSp, desk: Desk, number: int) -> None:
    ask, replies, kind = NONSENSE[number]
    sp.answer = lambda _request: replies
    with desk.connect() as session, pytest.raises(kind):
        ask(session)


@pytest.mark.attack("A25")
def test_a_page_that_promises_more_for_ever_ends(sp: ScriptedSp, desk: Desk) -> None:
    sp.answer = lambda _request: [MyVms(vms=[], more=True)]
    with desk.connect() as session:
        assert session.list_mine() == []


def test_a_size_beyond_any_instance_file_is_refused_when_announced(sp: ScriptedSp, desk: Desk) -> None:
    sp.answer = lambda _request: export_of(MAX_FILE_BYTES + 1)
    with desk.connect() as session, pytest.raises(MessageError):
        session.export(VM)


def test_an_error_in_the_channel_keeps_its_code_and_nothing_that_moves_a_cursor(sp: ScriptedSp, desk: Desk) -> None:
    sp.answer = lambda _request: [ErrorReply("not-found", "there is \x1b[2Jno VM\n")]
    with desk.connect() as session:
        with pytest.raises(NotFound) as caught:
            session.destroy(VM)
        assert session.has_refused
    assert "\x1b" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_not_what_was_announced_is_never_acknowledged(
    sp: ScriptedSp, desk: Desk, tmp_path: Path
) -> None:
    def answer(request: OwnerRequest) -> list[OwnerReply]:
        if isinstance(request, ListMine):
            return [MyVms(vms=[vm(VM)], more=False)]
        return export_of(1000, 1000)

    sp.answer = answer
    with pytest.raises(InstanceFileError):
        export_vtpm(desk, VM, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not desk.keyring.content.vtpms
    assert isinstance(sp.requests[-1], ExportVtpm)


def test_what_answers_is_no_channel(tmp_path: Path, desk: Desk) -> None:
    keyring = desk.keyring
    with pytest.raises(NotRunning):
        Desk(keyring, through_socket(tmp_path / "nobody")).list_mine()
    with pytest.raises(NotRunning):
        Desk(keyring, through_socket(tmp_path / ("long" * 100))).list_mine()
    noise = Relay(tmp_path / "noise", None, lambda _side, _number, _frame: [b"HTTP/1.1 400 Bad Request"])
    with noise, pytest.raises(PeerError):
        Desk(keyring, through_socket(noise.path), timeout_s=30).list_mine()
    silence = Relay(tmp_path / "silence", None, lambda _side, _number, _frame: [])
    with silence, pytest.raises(ChannelError, match="did not answer in time"):
        Desk(keyring, through_socket(silence.path), timeout_s=0.2).list_mine()


def test_a_frame_beyond_the_bound_is_refused_when_announced(tmp_path: Path, desk: Desk) -> None:
    long = Relay(tmp_path / "long", None, lambda _side, _number, _frame: [bytes((1 << 16) + 1)])
    with long, pytest.raises(FrameError, match="is no secure processor's channel"):
        Desk(desk.keyring, through_socket(long.path), timeout_s=30).list_mine()


def test_more_vms_than_a_page_holds_are_all_listed(estate: Estate) -> None:
    made = set()
    with estate.desk().connect() as session:
        for _ in range(PAGE_MY_VMS + 6):
            made.add(session.provision_new(uuid.uuid4(), bytes(32), VM_KEY, ANYTHING, "").vm_id)
    assert made <= {vm.vm_id for vm in estate.desk().list_mine()}


def test_an_owner_with_too_many_channels_is_told_so_in_the_channel(estate: Estate) -> None:
    sessions = [estate.desk().connect() for _ in range(8)]
    try:
        with pytest.raises(SpvtpmError, match="channels open already"):
            estate.desk().list_mine()
    finally:
        for session in sessions:
            session.close()
