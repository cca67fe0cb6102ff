"""The keyring: private, whole or not at all, one writer at a time, and no secret of it anywhere else."""

from __future__ import annotations

import hashlib
import multiprocessing
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from msgspec.structs import replace

from spvtpm.terminal import keyring_file
from spvtpm.terminal.keyring import Keyring, read_passphrase
from spvtpm.terminal.keyring_file import (
    MAX_VTPMS,
    Content,
    ListSeen,
    PassphraseKey,
    encode_clear,
    encode_sealed,
    new_passphrase_key,
    parse_clear,
    parse_sealed,
    passphrase_key_of,
)
from spvtpm.terminal.whereabouts import AtChip, Destroyed, Exporting, Importing, InFile, Known, Place
from spvtpm.wire.errors import (
    AlreadyExists,
    CertificateError,
    KeyringError,
    ResourceError,
    RevocationUnknown,
    SpvtpmError,
    StorageError,
    UsageError,
    WrongPassphrase,
)
from tests.papers import NOW, der, new_papers, papers

PASSPHRASE = b"correct horse"
CHIP, SHA256 = b"chip of 16 bytes", b"sha-256 has a size of 32 bytes !"
PLACES: tuple[Place, ...] = (
    AtChip(CHIP),
    InFile(3, SHA256, "/tmp/file"),
    Exporting(CHIP, 3, SHA256, "/tmp/file"),
    Importing(CHIP, 3, SHA256, InFile(3, SHA256, "")),
    Importing(CHIP, 3, SHA256, None),
    Destroyed(),
)


def never() -> bytes:
    raise AssertionError("a keyring without a passphrase asks for none")


def quick_key(passphrase: bytes = PASSPHRASE) -> PassphraseKey:
    """Weaker than those of real keyrings, as weak as a reader takes."""
    return keyring_file._derive(passphrase, 14, 8, 1, bytes(32))


def known(place: Place) -> Known:
    return Known(uuid.uuid4(), uuid.uuid4(), "a label", 3, place)


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    return Keyring.create(tmp_path / "own")


@pytest.fixture
def content(keyring: Keyring) -> Content:
    return replace(keyring.content, vtpms=tuple(map(known, PLACES)), lists_seen=(ListSeen(bytes(20), 7),))


# Made and opened


def test_a_new_keyring_is_private_and_opens_again(keyring: Keyring) -> None:
    again = Keyring.open(keyring.directory, never)

    assert again.content == keyring.content
    assert keyring.directory.stat().st_mode & 0o777 == 0o700
    assert (keyring.directory / "keyring").stat().st_mode & 0o777 == 0o600
    assert len(keyring.content.user_secrets) == 1
    assert keyring.content.load_key().key_size == 384


def test_a_keyring_is_never_replaced_by_a_new_one(keyring: Keyring) -> None:
    before = keyring.content
    with pytest.raises(AlreadyExists):
        Keyring.create(keyring.directory)
    assert keyring.content == before


def test_an_init_that_died_before_the_file_was_there_can_be_repeated(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir(mode=0o700)
    assert Keyring.create(tmp_path / "own").content.user_secrets


@pytest.mark.parametrize("mode", [0o701, 0o710, 0o750, 0o777])
def test_a_directory_that_others_can_enter_is_refused(keyring: Keyring, mode: int) -> None:
    keyring.directory.chmod(mode)
    with pytest.raises(KeyringError, match="is not private"):
        Keyring.open(keyring.directory, never)
    with pytest.raises(KeyringError, match="is not private"):
        Keyring.create(keyring.directory)


@pytest.mark.parametrize("mode", [0o604, 0o620, 0o640, 0o666])
def test_a_file_that_others_can_read_or_write_is_refused(keyring: Keyring, mode: int) -> None:
    (keyring.directory / "keyring").chmod(mode)
    with pytest.raises(KeyringError, match="can be read by others"):
        Keyring.open(keyring.directory, never)


def test_no_keyring(tmp_path: Path) -> None:
    with pytest.raises(KeyringError, match="there is no keyring"):
        Keyring.open(tmp_path / "none", never)
    (tmp_path / "empty").mkdir(mode=0o700)
    with pytest.raises(KeyringError, match="no keyring: cannot open"):
        Keyring.open(tmp_path / "empty", never)


# Passphrase


def test_a_passphrase_protects_what_is_in_the_file(tmp_path: Path) -> None:
    keyring = Keyring.create(tmp_path / "own", PASSPHRASE)
    secrets = (keyring.content.user_secrets[0], keyring.content.owner_key[-32:])
    keyring.remember(known(AtChip(CHIP)))
    file = (keyring.directory / "keyring").read_bytes()

    assert Keyring.open(keyring.directory, lambda: PASSPHRASE).content == keyring.content
    with pytest.raises(WrongPassphrase):
        Keyring.open(keyring.directory, lambda: PASSPHRASE + b" ")
    assert not [secret for secret in secrets if secret in file]
    assert b"a label" not in file


def test_every_writing_has_a_nonce_of_its_own(content: Content) -> None:
    key = quick_key()
    assert len({encode_sealed(content, key)[48:60] for _ in range(50)}) == 50


def test_a_keyring_costs_whoever_guesses_128_mib_for_each_guess() -> None:
    key = new_passphrase_key(PASSPHRASE)
    assert (1 << key.log_n) * key.r * 128 == 128 << 20


def test_a_passphrase_file_is_private_and_its_last_newline_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "passphrase"
    path.touch(mode=0o600)
    path.write_bytes(PASSPHRASE + b"\n")
    assert read_passphrase(path) == PASSPHRASE
    path.write_bytes(b"\n")
    with pytest.raises(UsageError):
        read_passphrase(path)
    path.chmod(0o644)
    with pytest.raises(StorageError):
        read_passphrase(path)


def test_a_passphrase_that_was_changed_meanwhile_is_told(tmp_path: Path, content: Content) -> None:
    keyring = Keyring.create(tmp_path / "sealed", PASSPHRASE)
    (keyring.directory / "keyring").write_bytes(encode_sealed(content, quick_key()))
    with pytest.raises(KeyringError, match="another passphrase meanwhile"):
        _ = keyring.content


# Damage


def readers(content: Content) -> list[tuple[bytes, Callable[[bytes], Content]]]:
    key = quick_key()

    def read_sealed(file: bytes) -> Content:
        return parse_sealed(file, key)

    return [(encode_clear(content), parse_clear), (encode_sealed(content, key), read_sealed)]


def test_both_forms_give_back_what_was_put_in(content: Content) -> None:
    for file, read in readers(content):
        assert read(file) == content


@pytest.mark.attack("A06")
def test_every_flipped_bit_is_noticed(content: Content) -> None:
    for file, read in readers(content):
        for bit in range(len(file) * 8):
            damaged = bytearray(file)
            damaged[bit // 8] ^= 1 << bit % 8
            with pytest.raises(KeyringError):
                read(bytes(damaged))


def test_every_cut_is_noticed(content: Content) -> None:
    for file, read in readers(content):
        for end in range(len(file)):
            with pytest.raises(KeyringError):
                read(file[:end])
        with pytest.raises(KeyringError):
            read(file + b"\0")


def test_an_altered_file_with_a_checksum_made_anew_is_refused(content: Content) -> None:
    """The checksum is against damage; under a passphrase, AES-GCM is against attackers."""
    key = quick_key()
    body = bytearray(encode_sealed(content, key)[:-32])
    body[-20] ^= 1
    with pytest.raises(WrongPassphrase):
        parse_sealed(bytes(body) + hashlib.sha256(body).digest(), key)


@pytest.mark.parametrize(("offset", "value"), [(10, 13), (10, 21), (11, 7), (11, 9), (12, 0), (12, 5)])
@pytest.mark.attack("A26")
def test_a_header_that_asks_for_too_little_or_too_much_work_is_refused(
    content: Content, offset: int, value: int
) -> None:
    body = bytearray(encode_sealed(content, quick_key())[:-32])
    body[offset] = value
    with pytest.raises(KeyringError, match="asks for scrypt with"):
        passphrase_key_of(bytes(body) + hashlib.sha256(body).digest(), PASSPHRASE)


@pytest.mark.attack("A26")
def test_another_format_version_is_refused(content: Content) -> None:
    with pytest.raises(KeyringError):
        parse_clear(encode_clear(content).replace(b'"format":2', b'"format":1', 1))
    body = bytearray(encode_sealed(content, quick_key())[:-32])
    body[9] = 1
    with pytest.raises(KeyringError, match="format 1"):
        passphrase_key_of(bytes(body) + hashlib.sha256(body).digest(), PASSPHRASE)


@pytest.mark.attack("A24")
def test_no_repr_and_no_error_shows_a_secret(content: Content) -> None:
    secret, key = content.user_secrets[0], quick_key()
    shown = [repr(content), repr(key), str(content.__rich_repr__())]
    for file in (encode_clear(content)[:-1], encode_clear(content).replace(b"vm_id", b"wm_id")):
        with pytest.raises(KeyringError) as caught:
            parse_clear(file)
        shown.append(str(caught.value))
        assert caught.value.__cause__ is None
    for text in shown:
        assert secret.hex() not in text and repr(secret) not in text and repr(key.key) not in text


def test_a_certificate_of_another_key_is_noticed(keyring: Keyring, tmp_path: Path) -> None:
    other = Keyring.create(tmp_path / "other").content
    with pytest.raises(KeyringError, match="another key"):
        replace(keyring.content, certificate=other.certificate).load_key()


# Changes


def test_a_change_is_there_for_everybody_and_the_old_file_is_gone(keyring: Keyring) -> None:
    one = known(AtChip(CHIP))
    keyring.remember(one)
    assert Keyring.open(keyring.directory, never).known(one.vtpm_id) == one
    keyring.remember(replace(one, place=Destroyed()))
    assert keyring.content.vtpms == (replace(one, place=Destroyed()),)
    assert keyring.forget(one.vtpm_id)
    assert not keyring.forget(one.vtpm_id)
    assert not keyring.content.vtpms


def test_what_a_terminal_left_that_died_while_it_wrote_is_removed(keyring: Keyring) -> None:
    left = keyring.directory / ".keyring.12345678"
    left.write_bytes(b"half a keyring")
    keyring.add_user_secret()
    assert not left.exists()


def test_a_change_that_fails_changes_nothing(keyring: Keyring) -> None:
    before = (keyring.directory / "keyring").read_bytes()

    def fail(_content: Content) -> Content:
        raise ResourceError("no")

    with pytest.raises(ResourceError):
        keyring.update(fail)
    assert (keyring.directory / "keyring").read_bytes() == before


def _add_secrets(directory: Path, count: int) -> None:
    keyring = Keyring.open(directory, never)
    for _ in range(count):
        keyring.add_user_secret()


def test_two_writers_lose_nothing_of_each_other(keyring: Keyring) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_add_secrets, args=(keyring.directory, 20)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert len(set(keyring.content.user_secrets)) == 41


def test_the_newest_secret_is_first_and_the_older_ones_stay(keyring: Keyring) -> None:
    (first,) = keyring.content.user_secrets
    second = keyring.add_user_secret()
    assert keyring.content.user_secrets == (second, first)


def test_a_full_keyring_drops_nothing(keyring: Keyring, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spvtpm.terminal.keyring.MAX_SECRETS", 1)
    monkeypatch.setattr("spvtpm.terminal.keyring.MAX_VTPMS", 1)
    monkeypatch.setattr("spvtpm.terminal.keyring.MAX_ROOTS", 1)
    monkeypatch.setattr("spvtpm.terminal.keyring.MAX_LISTS", 1)
    keyring.remember(known(AtChip(CHIP)))
    keyring.trust_root(der(papers().root.certificate))
    keyring.saw_list(ListSeen(bytes(20), 1))
    full = keyring.content
    attempts: list[Callable[[], object]] = [
        keyring.add_user_secret,
        lambda: keyring.remember(known(AtChip(CHIP))),
        lambda: keyring.trust_root(der(new_papers().root.certificate)),
        lambda: keyring.saw_list(ListSeen(bytes([1] * 20), 1)),
    ]
    for attempt in attempts:
        with pytest.raises(ResourceError):
            attempt()
    assert keyring.content == full


# Trust


def test_only_a_root_certificate_is_trusted(keyring: Keyring) -> None:
    keyring.trust_root(der(papers().root.certificate))
    keyring.trust_root(der(papers().root.certificate))
    assert keyring.content.roots == (der(papers().root.certificate),)
    with pytest.raises(CertificateError):
        keyring.trust_root(papers().chip_chain[1])


def test_a_revocation_list_older_than_one_that_has_told_of_a_chip_is_refused(keyring: Keyring) -> None:
    newer, older = papers().revocation_list(number=5), papers().revocation_list(number=4)
    issuer = keyring_issuer(keyring, newer.encode())
    keyring.put_revocation_list(older.encode())  # nobody has verified anything by the newer one yet
    keyring.put_revocation_list(newer.encode())
    keyring.saw_list(ListSeen(issuer, 5))
    keyring.saw_list(ListSeen(issuer, 3))

    with pytest.raises(RevocationUnknown, match="number 4, and number 5 was seen"):
        keyring.put_revocation_list(older.encode())
    assert [listed.number for listed in keyring.revocation_lists()] == [5]
    keyring.put_revocation_list(papers().revocation_list(number=5, at=NOW + timedelta(days=1)).encode())
    with pytest.raises(SpvtpmError):
        keyring.put_revocation_list(b"no list")


def keyring_issuer(keyring: Keyring, encoded: bytes) -> bytes:
    keyring.put_revocation_list(encoded)
    (path,) = keyring.directory.glob("revoked-*.der")
    return bytes.fromhex(path.stem.removeprefix("revoked-"))


def test_lists_of_several_vendors_stand_beside_each_other(keyring: Keyring) -> None:
    for vendor in (papers(), new_papers("Another")):
        keyring.put_revocation_list(vendor.revocation_list().encode())
    assert len(keyring.revocation_lists()) == 2


def test_a_keyring_is_never_written_longer_than_it_can_be_read(tmp_path: Path) -> None:
    keyring = Keyring.create(tmp_path / "keyring")
    secrets = keyring.content.user_secrets
    many = [Known(uuid.uuid4(), uuid.uuid4(), "\U0001f510" * 256, 1, AtChip(CHIP)) for _ in range(MAX_VTPMS)]
    with pytest.raises(ResourceError, match="room"):
        keyring.remember(*many)
    assert Keyring.open(tmp_path / "keyring", never).content.user_secrets == secrets


def test_the_file_of_an_import_whose_answer_was_lost_goes_once_the_chip_has_told(keyring: Keyring) -> None:
    path = keyring.instances() / "web-3.vtpm"
    path.write_bytes(b"void, if it was taken")
    home = InFile(3, bytes(32), str(path))
    coming = known(Importing(bytes(16), 3, bytes(32), home))
    keyring.remember(coming)

    keyring.remember(replace(coming, place=home))  # it never came
    assert path.exists()
    keyring.remember(coming)
    keyring.remember(replace(coming, place=AtChip(bytes(16))))
    assert not path.exists()
