"""Fuses in a PKCS#11 token, here SoftHSM: the chip certifies inside it, and its other secrets open with its key alone."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pkcs11
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from pkcs11 import ObjectClass
from pkcs11.util.ec import decode_ec_private_key

from spvtpm.processor.fuses import Fuses
from spvtpm.processor.fuses.keepers import Pkcs11Token, burn_fuses, load_fuses
from spvtpm.wire.certificate_policies import TrustedRoots
from spvtpm.wire.certificates import parse_chain
from spvtpm.wire.errors import AlreadyInitialised, FusesError
from tests.harness import RunningSp
from tests.papers import channel_certificate, papers, put_chip_file, todays_papers

MODULE = Path("/usr/lib/softhsm/libsofthsm2.so")  # where Debian and Ubuntu have it
PIN = "4711-pin-of-the-user"

pytestmark = pytest.mark.skipif(
    not MODULE.exists() or shutil.which("softhsm2-util") is None, reason="softhsm2 is not installed"
)


@pytest.fixture(scope="module", autouse=True)
def tokens() -> Iterator[Path]:
    """Two tokens, "chips" and "others". A process reads SoftHSM's configuration once: they are there for all tests."""
    with tempfile.TemporaryDirectory(prefix="spvtpm-") as path, pytest.MonkeyPatch.context() as patch:
        directory = Path(path)
        (directory / "tokens").mkdir()
        configuration = directory / "softhsm2.conf"
        configuration.write_text(f"directories.tokendir = {directory / 'tokens'}\nlog.level = ERROR\n")
        patch.setenv("SOFTHSM2_CONF", str(configuration))
        for label in ("chips", "others"):
            subprocess.run(
                ["softhsm2-util", "--init-token", "--free", "--label", label, "--so-pin", "12345678", "--pin", PIN],
                check=True,
                stdout=subprocess.DEVNULL,
                timeout=60,
            )
        yield directory / "tokens"


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a path short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="spvtpm-") as path:
        put_private(Path(path) / "pin", f"{PIN}\n")
        yield Path(path)


def put_private(path: Path, content: str) -> None:
    path.touch(mode=0o600)
    path.write_text(content)


def keeper(place: Path) -> Pkcs11Token:
    return Pkcs11Token(str(MODULE), "chips", str(place / "pin"))


def change_keeper(directory: Path, **changes: str) -> None:
    path = directory / "keeper.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def burnt(place: Path) -> Fuses:
    """A new chip, moved into the token; its fuses are in `place / "fuses"`."""
    put_chip_file(place / "chip-1")
    return burn_fuses(place / "fuses", place / "chip-1", keeper(place))


@contextmanager
def token(label: str = "chips") -> Iterator[pkcs11.Session]:
    """A token in the hands of whoever has the PIN."""
    with pkcs11.lib(str(MODULE)).get_token(token_label=label).open(user_pin=PIN, rw=True) as session:
        yield session


def objects(label: str = "chips") -> set[bytes]:
    """The ids of all that a token keeps."""
    with token(label) as session:
        return {kept[pkcs11.Attribute.ID] for kept in session.get_objects()}


# The chip


def test_a_chip_is_moved_into_the_token_and_is_the_same_chip(place: Path) -> None:
    chip = put_chip_file(place / "chip-1")
    burn_fuses(place / "fuses", place / "chip-1", keeper(place))
    assert not (place / "chip-1").exists()
    fuses = load_fuses(place / "fuses")
    assert (fuses.chip_id, fuses.storage_root_key, fuses.certificates) == (
        chip.chip_id,
        chip.storage_root_key,
        chip.certificates,
    )
    assert (fuses.sp_secret.fleet_id, fuses.sp_secret.generation, fuses.sp_secret.value) == (
        chip.fleet_id,
        chip.generation,
        chip.sp_secret,
    )


def test_the_token_certifies_and_others_believe_it(burnt: Fuses, place: Path) -> None:
    fuses = load_fuses(place / "fuses")
    now = datetime.now(UTC)
    made = channel_certificate(fuses.endorsement, fuses.chip_id, start=now)
    chain = parse_chain((made, *fuses.certificates))
    TrustedRoots([todays_papers().root.certificate]).verify(chain)
    # A signature is over the content that it was asked for, and no other.
    key = fuses.endorsement.key
    signature = key.sign(b"content", ec.ECDSA(SHA384()))
    key.public_key().verify(signature, b"content", ec.ECDSA(SHA384()))
    with pytest.raises(InvalidSignature):
        key.public_key().verify(signature, b"another", ec.ECDSA(SHA384()))


def test_many_threads_certify_at_once(burnt: Fuses) -> None:
    def certify(number: int) -> bytes:
        content = b"%d" % number
        signature = burnt.endorsement.key.sign(content, ec.ECDSA(SHA384()))
        burnt.endorsement.key.public_key().verify(signature, content, ec.ECDSA(SHA384()))
        return signature

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(certify, range(64)))) == 64


@pytest.mark.attack("A24")
def test_no_secret_is_in_a_file_and_the_endorsement_key_is_not_even_in_the_process(place: Path) -> None:
    chip = put_chip_file(place / "chip-1")
    private = chip.issuer().key.private_numbers().private_value.to_bytes(48, "big")
    assert private in chip.endorsement_key, "the search works"
    fuses = burn_fuses(place / "fuses", place / "chip-1", keeper(place))
    content = b"".join(path.read_bytes() for path in (place / "fuses").iterdir())
    content += base64.b64decode(json.loads((place / "fuses" / "sealed").read_bytes())["sealed"]["content"])
    for secret in (private, chip.storage_root_key, chip.sp_secret, PIN.encode()):
        for form in (secret, secret.hex().encode(), base64.b64encode(secret).rstrip(b"=")):
            assert form not in content
    assert {path.stat().st_mode & 0o077 for path in (place / "fuses").iterdir()} == {0}
    key = fuses.endorsement.key
    for take in (
        key.private_numbers,
        lambda: key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()),
        lambda: key.exchange(ec.ECDH(), key.public_key()),
    ):
        with pytest.raises(NotImplementedError):
            take()


@pytest.mark.attack("A24")
def test_the_token_gives_its_keys_to_nobody_who_has_the_pin(burnt: Fuses) -> None:
    with token() as session:
        open_key: Any = session.generate_key(
            pkcs11.KeyType.AES, 256, template={pkcs11.Attribute.EXTRACTABLE: True, pkcs11.Attribute.SENSITIVE: False}
        )
        assert len(open_key[pkcs11.Attribute.VALUE]) == 32, "the way to take a key out works"
        kept = list(session.get_objects({pkcs11.Attribute.ID: burnt.chip_id}))
        assert {one.object_class for one in kept} == {ObjectClass.PRIVATE_KEY, ObjectClass.SECRET_KEY}
        for one in kept:
            with pytest.raises(pkcs11.AttributeSensitive):
                _ = one[pkcs11.Attribute.VALUE]
            with pytest.raises(pkcs11.PKCS11Error):
                open_key.wrap_key(one, mechanism=pkcs11.Mechanism.AES_KEY_WRAP_PAD)
            with pytest.raises(pkcs11.PKCS11Error):
                one[pkcs11.Attribute.EXTRACTABLE] = True


def test_fuses_are_burnt_once_and_a_refused_chip_leaves_nothing_in_the_token(place: Path, burnt: Fuses) -> None:
    before = objects()
    put_chip_file(place / "chip-1")
    with pytest.raises(AlreadyInitialised):
        burn_fuses(place / "fuses", place / "chip-1", keeper(place))
    (place / "full").mkdir()
    (place / "full" / "sealed").symlink_to("nowhere")
    with pytest.raises(AlreadyInitialised):
        burn_fuses(place / "full", place / "chip-1", keeper(place))
    assert (place / "chip-1").exists()
    assert objects() == before


def test_a_copy_of_a_chip_file_does_not_take_the_running_chips_keys(place: Path) -> None:
    put_chip_file(place / "chip-1")
    shutil.copy(place / "chip-1", place / "copy")
    fuses = burn_fuses(place / "fuses", place / "chip-1", keeper(place))
    with pytest.raises(FusesError, match="holds keys of chip"):
        burn_fuses(place / "second", place / "copy", keeper(place))
    assert load_fuses(place / "fuses").chip_id == fuses.chip_id


# What is wrong


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"token": "nobody"}, "there is no token nobody"),
        ({"token": "others"}, "the token others has not the chip's keys"),
        ({"module": "/none.so"}, "/none.so is no PKCS#11 module"),
        ({"pin_file": "/none.pin"}, "no PIN: cannot open /none.pin"),
        ({"module": ""}, "names nothing that could keep a chip"),
    ],
)
def test_what_cannot_open_the_fuses_is_named(place: Path, burnt: Fuses, changes: dict[str, str], said: str) -> None:
    change_keeper(place / "fuses", **changes)
    with pytest.raises(FusesError, match=re.escape(said)):
        load_fuses(place / "fuses")


def test_a_wrong_pin_is_told_and_not_shown(place: Path, burnt: Fuses) -> None:
    (place / "pin").write_text("not-the-pin")
    with pytest.raises(FusesError, match="refuses the PIN") as caught:
        load_fuses(place / "fuses")
    assert "not-the-pin" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.attack("A24")
def test_a_pin_that_others_can_read_is_refused(place: Path, burnt: Fuses) -> None:
    (place / "pin").chmod(0o640)
    with pytest.raises(FusesError, match="can be read by others"):
        load_fuses(place / "fuses")


@pytest.mark.parametrize("kind", [ObjectClass.PRIVATE_KEY, ObjectClass.SECRET_KEY])
def test_a_token_that_lost_a_key_says_so(place: Path, burnt: Fuses, kind: ObjectClass) -> None:
    with token() as session:
        session.get_key(kind, id=burnt.chip_id).destroy()
    with pytest.raises(FusesError, match="has not the chip's keys"):
        load_fuses(place / "fuses")


@pytest.mark.attack("A01")
def test_another_key_in_the_endorsement_keys_place_is_refused(place: Path, burnt: Fuses) -> None:
    other = papers().made.issuer().key
    der = other.private_bytes(Encoding.DER, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    with token() as session:
        session.get_key(ObjectClass.PRIVATE_KEY, id=burnt.chip_id).destroy()
        session.create_object(
            decode_ec_private_key(der)
            | {pkcs11.Attribute.ID: burnt.chip_id, pkcs11.Attribute.TOKEN: True, pkcs11.Attribute.SIGN: True}
        )
    with pytest.raises(FusesError, match="not that of the chip's certificate"):
        load_fuses(place / "fuses")


@pytest.mark.attack("A15")
def test_a_flipped_bit_is_refused_whatever_the_checksum_says(place: Path, burnt: Fuses) -> None:
    path = place / "fuses" / "sealed"
    good = {name: base64.b64decode(value) for name, value in json.loads(path.read_bytes())["sealed"].items()}
    for name, content in good.items():
        for at in range(0, len(content), max(1, len(content) // 40)):
            bad = bytearray(content)
            bad[at] ^= 1 << at % 8
            fields = {field: base64.b64encode(value).decode() for field, value in (good | {name: bytes(bad)}).items()}
            sealed = json.dumps(fields).encode()
            digest = hashlib.sha256(sealed).hexdigest().encode()
            path.write_bytes(b'{"format":1,"sealed":%b,"sha256":"%b"}' % (sealed, digest))
            with pytest.raises(FusesError):
                load_fuses(place / "fuses")


@pytest.mark.attack("A15")
@pytest.mark.parametrize("name", ["sealed", "counter", "keeper.json"])
def test_a_missing_file_is_refused(place: Path, burnt: Fuses, name: str) -> None:
    (place / "fuses" / name).unlink()
    with pytest.raises(FusesError, match=str(place / "fuses")):
        load_fuses(place / "fuses")


def test_the_counter_is_a_file_that_only_grows(place: Path, burnt: Fuses) -> None:
    assert burnt.counter.read() == 0
    assert burnt.counter.increment() == 1
    assert load_fuses(place / "fuses").counter.read() == 1


# A whole secure processor


def test_a_secure_processor_runs_on_it_and_certifies_its_channel(place: Path) -> None:
    state = place / "sp"
    put_chip_file(place / "chip-1")
    options = ["--pkcs11-module", MODULE, "--token", "chips", "--pin-file", place / "pin"]
    command = [sys.executable, "-m", "spvtpm.cli", "sp", "init", state, "--chip", place / "chip-1", *options]
    made = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)
    assert (made.returncode, made.stderr) == (0, "")
    with RunningSp(state) as sp:
        vm_id = sp.launch()
        assert sp.stop() == 0
        sp.start()
        assert sp.vm(vm_id).state == "stopped"
        sp.new_vm()
