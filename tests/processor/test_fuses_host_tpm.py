"""Fuses sealed to the host's own TPM, here swtpm: opened by that TPM after that boot chain alone, and counted by it."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tpm2_pytss import (  # type: ignore[import-untyped]
    ESAPI,
    TPM2_ALG,
    TPM2B_NV_PUBLIC,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPMS_NV_PUBLIC,
    TSS2_Exception,
)

from spvtpm.processor.daemon import initialise
from spvtpm.processor.fuses import Fuses
from spvtpm.processor.fuses.host_tpm import host_tpm
from spvtpm.processor.fuses.keepers import HostTpm as SealedToTpm
from spvtpm.processor.fuses.keepers import burn_fuses, load_fuses
from spvtpm.processor.fuses.sealed_to_tpm import TpmCounter
from spvtpm.wire.errors import AlreadyInitialised, FusesError
from tests.harness import RunningSp
from tests.host_tpm import Bus, HostTpm, needs_swtpm
from tests.papers import put_chip_file

pytestmark = needs_swtpm

PCRS = (0, 2, 4, 7)


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a path short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="spvtpm-") as path:
        yield Path(path)


@pytest.fixture
def tpm(place: Path) -> Iterator[HostTpm]:
    """The host's TPM."""
    with HostTpm(place / "host") as running:
        yield running


def burnt(place: Path, tpm: HostTpm, name: str = "fuses") -> tuple[Path, Fuses]:
    """A new chip, sealed to this TPM."""
    put_chip_file(place / "chip-1")
    return place / name, burn_fuses(place / name, place / "chip-1", SealedToTpm(tpm.tcti, PCRS))


def secrets_of(fuses: Fuses) -> list[bytes]:
    key = fuses.endorsement.key.private_numbers().private_value.to_bytes(48, "big")
    return [fuses.storage_root_key, fuses.sp_secret.value, key]


def change_sealed(directory: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    """Changes fields of `sealed`, and puts the checksum right, as somebody who has the disk can."""
    path = directory / "sealed"
    fields = {name: base64.b64decode(value) for name, value in json.loads(path.read_bytes())["sealed"].items()}
    change(fields)
    content = json.dumps({name: base64.b64encode(value).decode() for name, value in fields.items()}).encode()
    path.write_bytes(
        b'{"format":1,"sealed":%b,"sha256":"%b"}' % (content, hashlib.sha256(content).hexdigest().encode())
    )


def run_spvtpm(*words: object) -> subprocess.CompletedProcess[str]:
    """Runs the command line."""
    command = [sys.executable, "-m", "spvtpm.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


# The chip


def test_a_chip_is_sealed_and_opened_again_in_every_boot_of_the_same_kind(place: Path, tpm: HostTpm) -> None:
    directory, fuses = burnt(place, tpm)
    assert not (place / "chip-1").exists()
    for _ in range(3):
        again = load_fuses(directory)
        assert (again.chip_id, again.certificates) == (fuses.chip_id, fuses.certificates)
        assert secrets_of(again) == secrets_of(fuses)
        tpm.reboot()


@pytest.mark.attack("A24")
def test_no_secret_of_the_chip_is_in_any_file(place: Path, tpm: HostTpm) -> None:
    directory, fuses = burnt(place, tpm)
    content = b"".join(path.read_bytes() for path in directory.iterdir())
    content += base64.b64decode(json.loads((directory / "sealed").read_bytes())["sealed"]["content"])
    for secret in secrets_of(fuses):
        for form in (secret, secret.hex().encode(), base64.b64encode(secret).rstrip(b"=")):
            assert form not in content
    assert {path.stat().st_mode & 0o077 for path in directory.iterdir()} == {0}


@pytest.mark.parametrize("pcr", PCRS)
def test_after_other_software_was_measured_the_chip_stays_shut_until_the_next_good_boot(
    place: Path, tpm: HostTpm, pcr: int
) -> None:
    directory, fuses = burnt(place, tpm)
    tpm.extend(pcr)
    for _ in range(2):
        with pytest.raises(FusesError, match="PCRs 0, 2, 4, 7 of the host's TPM are not as when the chip was sealed"):
            load_fuses(directory)
    tpm.reboot()
    assert load_fuses(directory).chip_id == fuses.chip_id


def test_a_pcr_that_was_not_chosen_may_change(place: Path, tpm: HostTpm) -> None:
    directory, fuses = burnt(place, tpm)
    tpm.extend(10)
    assert load_fuses(directory).chip_id == fuses.chip_id


@pytest.mark.attack("A01")
def test_another_policy_in_the_directory_opens_nothing(place: Path, tpm: HostTpm) -> None:
    directory, _fuses = burnt(place, tpm)
    tpm.extend(7)
    keeper = json.loads((directory / "keeper.json").read_text()) | {"pcrs": [0, 2, 4]}
    (directory / "keeper.json").write_text(json.dumps(keeper))
    with pytest.raises(FusesError, match="are not as when"):
        load_fuses(directory)


def test_another_tpm_opens_nothing_and_says_that_it_is_another(place: Path, tpm: HostTpm) -> None:
    directory, _fuses = burnt(place, tpm)
    with HostTpm(place / "stolen") as other:
        keeper = (directory / "keeper.json").read_text().replace(tpm.tcti, other.tcti)
        (directory / "keeper.json").write_text(keeper)
        with pytest.raises(FusesError, match="another TPM than the one that the chip was sealed to"):
            load_fuses(directory)


def test_a_tpm_that_was_cleared_opens_nothing(place: Path, tpm: HostTpm) -> None:
    directory, _fuses = burnt(place, tpm)
    tpm.clear()
    with pytest.raises(FusesError, match="or it was cleared since"):
        load_fuses(directory)


def test_no_tpm_is_a_sentence(place: Path, tpm: HostTpm) -> None:
    directory, _fuses = burnt(place, tpm)
    (directory / "keeper.json").write_text(json.dumps({"type": "host-tpm", "tcti": "swtpm:path=/none", "pcrs": [0]}))
    with pytest.raises(FusesError, match="the host's TPM at swtpm:path=/none"):
        load_fuses(directory)


def test_fuses_are_burnt_once_and_a_refused_chip_leaves_nothing_in_the_tpm(place: Path, tpm: HostTpm) -> None:
    directory, fuses = burnt(place, tpm)
    before = tpm.nv_indices()
    with pytest.raises(AlreadyInitialised):
        burnt(place, tpm)
    assert load_fuses(directory).chip_id == fuses.chip_id

    (place / "full").mkdir()
    (place / "full" / "keeper.json").mkdir()
    (place / "chip-1").unlink()
    with pytest.raises(FusesError):
        burnt(place, tpm, "full")
    assert (place / "chip-1").exists()
    assert tpm.nv_indices() == before


def test_a_tpm_without_sha256_registers_is_refused_and_has_its_memory_back(place: Path, tpm: HostTpm) -> None:
    tpm.drop_sha256_bank()
    with pytest.raises(FusesError, match="the host's TPM has no PCR 0 in a SHA-256 bank"):
        burnt(place, tpm)
    assert (place / "chip-1").exists()
    assert tpm.nv_indices() == []


# Who has the disk


@pytest.mark.attack("A15")
@pytest.mark.parametrize("name", ["sealed", "keeper.json"])
def test_a_missing_file_is_refused(place: Path, tpm: HostTpm, name: str) -> None:
    directory, _fuses = burnt(place, tpm)
    (directory / name).unlink()
    with pytest.raises(FusesError, match=str(directory)):
        load_fuses(directory)


@pytest.mark.attack("A15")
def test_a_flipped_bit_anywhere_is_refused_or_harmless_whatever_the_checksum_says(place: Path, tpm: HostTpm) -> None:
    directory, fuses = burnt(place, tpm)
    good = (directory / "sealed").read_bytes()
    for field in ("parent", "public", "private", "content"):
        size = len(base64.b64decode(json.loads(good)["sealed"][field]))
        for at in range(0, size, max(1, size // 24)):

            def flip(fields: dict[str, bytes], field: str = field, at: int = at) -> None:
                changed = bytearray(fields[field])
                changed[at] ^= 1 << at % 8
                fields[field] = bytes(changed)

            (directory / "sealed").write_bytes(good)
            change_sealed(directory, flip)
            with pytest.raises(FusesError):
                load_fuses(directory)
    (directory / "sealed").write_bytes(good)
    assert load_fuses(directory).chip_id == fuses.chip_id


@pytest.mark.attack("A15")
@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 4000, b'{"format":1}', b"\xff\xfe", b"x" * 100_000])
@pytest.mark.parametrize("name", ["sealed", "keeper.json"])
def test_something_else_in_a_files_place_is_refused(place: Path, tpm: HostTpm, name: str, content: bytes) -> None:
    directory, _fuses = burnt(place, tpm)
    (directory / name).write_bytes(content)
    with pytest.raises(FusesError, match=str(directory / name)):
        load_fuses(directory)


@pytest.mark.attack("A15")
def test_blobs_of_another_chip_of_this_tpm_do_not_mix(place: Path, tpm: HostTpm) -> None:
    directory, _fuses = burnt(place, tpm)
    other, _other = burnt(place, tpm, "other")
    theirs = {
        name: base64.b64decode(value) for name, value in json.loads((other / "sealed").read_bytes())["sealed"].items()
    }
    change_sealed(directory, lambda fields: fields.update(public=theirs["public"], private=theirs["private"]))
    with pytest.raises(FusesError, match="altered"):
        load_fuses(directory)


# The counter


def test_the_counter_of_a_new_chip_is_0_and_outlives_boots(place: Path, tpm: HostTpm) -> None:
    directory, fuses = burnt(place, tpm)
    assert fuses.counter.read() == 0
    for number in range(1, 4):
        assert load_fuses(directory).counter.increment() == number
        tpm.reboot()
        assert fuses.counter.read() == number
    _later, second = burnt(place, tpm, "second")
    assert (second.counter.read(), second.counter.increment(), fuses.counter.read()) == (0, 1, 3)


@pytest.mark.attack("A15")
def test_an_older_copy_of_the_directory_does_not_set_the_counter_back(place: Path, tpm: HostTpm) -> None:
    directory, fuses = burnt(place, tpm)
    shutil.copytree(directory, place / "copy")
    fuses.counter.increment()
    shutil.rmtree(directory)
    shutil.copytree(place / "copy", directory)
    assert load_fuses(directory).counter.read() == 1


@pytest.mark.attack("A15")
def test_a_counter_that_the_tpms_owner_removed_or_made_anew_is_refused(place: Path, tpm: HostTpm) -> None:
    directory, fuses = burnt(place, tpm)
    (index,) = tpm.nv_indices()
    with ESAPI(tpm.tcti) as esapi:
        public, _name = esapi.nv_read_public(esapi.tr_from_tpmpublic(index))
    fuses.counter.increment()
    assert isinstance(fuses.counter, TpmCounter)
    with host_tpm(tpm.tcti) as connection:
        highest = connection.read(fuses.counter.index)
    tpm.undefine(index)
    with pytest.raises(FusesError, match="counter is gone"):
        load_fuses(directory)

    same = TPMS_NV_PUBLIC(
        nvIndex=index, nameAlg=TPM2_ALG.SHA256, attributes=int(public.nvPublic.attributes) & ~(1 << 29), dataSize=8
    )
    with ESAPI(tpm.tcti) as esapi:
        esapi.nv_define_space(b"mine", TPM2B_NV_PUBLIC(nvPublic=same))
    with pytest.raises(FusesError, match="another counter is in the place"):
        load_fuses(directory)
    with ESAPI(tpm.tcti) as esapi:
        handle = esapi.tr_from_tpmpublic(index)
        esapi.tr_set_auth(handle, b"mine")
        esapi.nv_increment(handle, handle)
        started_at = int.from_bytes(bytes(esapi.nv_read(handle, 8, auth_handle=handle)), "big")
    assert started_at > highest, "a TPM never counts backwards"
    with pytest.raises(FusesError):  # by its name it is the chip's; it does not know the chip's secret
        fuses.counter.read()


def test_nobody_else_on_the_host_can_step_the_counter(place: Path, tpm: HostTpm) -> None:
    _directory, fuses = burnt(place, tpm)
    (index,) = tpm.nv_indices()
    for auth in (b"", b"guess"):
        with ESAPI(tpm.tcti) as esapi, pytest.raises(TSS2_Exception, match="auth"):
            handle = esapi.tr_from_tpmpublic(index)
            esapi.tr_set_auth(handle, auth)
            esapi.nv_increment(handle, handle)
    assert fuses.counter.read() == 0


# Who has the wires between host and TPM


KEY = bytes(range(100, 132))


@pytest.mark.attack("A24")
def test_nobody_on_the_bus_hears_the_key(place: Path, tpm: HostTpm) -> None:
    with Bus(place, tpm) as bus:
        with ESAPI(bus.tcti) as esapi:  # as one would do it without sessions
            parent = esapi.create_primary(None, "ecc")[0]
            content = TPM2B_SENSITIVE_CREATE()
            content.sensitive.data = KEY
            public = TPM2B_PUBLIC.parse("keyedhash", objectAttributes="fixedtpm|fixedparent|userwithauth")
            private, public, *_creation = esapi.create(parent, content, public)
            loaded = esapi.load(parent, private, public)
            assert bytes(esapi.unseal(loaded)) == KEY
            for handle in (loaded, parent):
                esapi.flush_context(handle)
        assert bus.heard.count(KEY) >= 2, "on the way in and on the way out"

        bus.heard = b""
        with host_tpm(bus.tcti) as connection:
            sealed = connection.seal(KEY, PCRS)
        with host_tpm(bus.tcti) as connection:
            assert connection.unseal(sealed, PCRS) == KEY
        assert sealed.private in bus.heard, "the search works"
        assert KEY not in bus.heard


@pytest.mark.attack("A15")
def test_nobody_on_the_bus_sets_the_counter_back(place: Path, tpm: HostTpm) -> None:
    with Bus(place, tpm) as bus:
        put_chip_file(place / "chip-1")
        fuses = burn_fuses(place / "fuses", place / "chip-1", SealedToTpm(bus.tcti, PCRS))
        fuses.counter.increment()
        numbers = [struct.pack(">HQ", 8, number) for number in range(8)]  # as TPM2_NV_Read gives them, length first
        bus.heard = b""
        assert fuses.counter.read() == 1
        (now,) = (number for number in numbers if number in bus.heard)
        before = numbers[numbers.index(now) - 1]
        bus.change = lambda response: response.replace(now, before)
        with pytest.raises(FusesError):
            fuses.counter.read()
        bus.change = lambda response: response
        assert fuses.counter.read() == 1


# A whole secure processor


@pytest.mark.attack("A15")
def test_an_older_copy_of_a_whole_secure_processor_is_refused(place: Path, tpm: HostTpm) -> None:
    state = place / "sp"
    put_chip_file(place / "chip-1")
    initialise(state, place / "chip-1", SealedToTpm(tpm.tcti, PCRS))
    with RunningSp(state) as sp:
        assert sp.stop() == 0
        shutil.copytree(state, place / "copy")
        sp.start()
        sp.launch()
        assert sp.stop() == 0
    shutil.rmtree(state)
    shutil.copytree(place / "copy", state)
    refused = run_spvtpm("sp", "run", state)
    assert refused.returncode == 4
    assert "older" in refused.stderr


def test_a_secure_processor_runs_on_it_and_certifies_its_channel(place: Path, tpm: HostTpm) -> None:
    state = place / "sp"
    put_chip_file(place / "chip-1")
    made = run_spvtpm("sp", "init", state, "--chip", place / "chip-1", "--seal-to-tpm", tpm.tcti, "--pcrs", "0,7")
    assert (made.returncode, made.stderr) == (0, "")
    with RunningSp(state) as sp:
        vm_id = sp.launch()
        assert sp.stop() == 0
        tpm.reboot()
        sp.start()
        assert sp.vm(vm_id).state == "stopped"
        assert sp.stop() == 0
    tpm.extend(7)
    refused = run_spvtpm("sp", "run", state)
    assert refused.returncode == 4
    assert "PCRs 0, 7 of the host's TPM are not as when the chip was sealed" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert "WARNING:esys" not in refused.stderr
