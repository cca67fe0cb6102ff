"""A06: an instance file with flipped bits, cut short, with chunks swapped or doubled, or under another file's header.

First without the protection: the content in clear, and chunks that are each sealed for themselves. There the attack
succeeds, and what comes out is another vTPM. Then the same on the file.
"""

from __future__ import annotations

import os

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from spvtpm.wire.errors import InstanceDamaged, InstanceFileError, InstanceOverlong, InstanceTruncated, SpvtpmError
from spvtpm.wire.instance_content import decode_content, encode_content
from spvtpm.wire.instance_file import HEADER_BYTES, open_instance, parse_instance_header, seal_instance
from tests.wire.instances import SECRETS, instance

CHUNK_BYTES = 1 << 16
SEALED_BYTES = CHUNK_BYTES + 16
EXPORTED = instance(b"A" * CHUNK_BYTES + b"B" * CHUNK_BYTES + b"C" * 1000)


def _sealed_each_for_itself(key: bytes, content: bytes) -> list[bytes]:
    """Authentic chunks that know neither their place nor their file."""
    chunks = []
    for start in range(0, len(content), CHUNK_BYTES):
        nonce = os.urandom(12)
        chunks.append(nonce + AESGCM(key).encrypt(nonce, content[start : start + CHUNK_BYTES], None))
    return chunks


def _opened_each_for_itself(key: bytes, chunks: list[bytes]) -> bytes:
    return b"".join(AESGCM(key).decrypt(chunk[:12], chunk[12:], None) for chunk in chunks)


def _chunks(file: bytes) -> list[bytes]:
    return [file[start : start + SEALED_BYTES] for start in range(HEADER_BYTES, len(file), SEALED_BYTES)]


@pytest.mark.attack("A06")
def test_a_flipped_bit_in_clear_is_another_state_and_in_the_file_an_error() -> None:
    content = encode_content(EXPORTED)
    altered = content.replace(b"AAAA", b"AACA", 1)
    assert decode_content(EXPORTED.header, altered).permanent.startswith(b"AACA"), "the attack works in clear"

    file = seal_instance(EXPORTED, SECRETS)
    for place in range(HEADER_BYTES, len(file), 997):
        with pytest.raises(InstanceDamaged):
            open_instance(file[:place] + bytes([file[place] ^ 2]) + file[place + 1 :], SECRETS)


@pytest.mark.attack("A06")
def test_chunks_that_know_their_place_cannot_be_swapped_doubled_or_dropped() -> None:
    key, content = os.urandom(32), encode_content(EXPORTED)
    first, second, last = _sealed_each_for_itself(key, content)
    forgeries = (
        [second, first, last],
        [first, first, last],
        [first, second, second, last],
        [first, second],
        [second, last],
    )
    for forgery in forgeries:
        assert _opened_each_for_itself(key, list(forgery)) != content, "the attack works on chunks sealed one by one"

    file = seal_instance(EXPORTED, SECRETS)
    header, (first, second, last) = file[:HEADER_BYTES], _chunks(file)
    errors = (InstanceDamaged, InstanceDamaged, InstanceDamaged, InstanceTruncated, InstanceDamaged)
    forgeries = (
        [second, first, last],
        [first, first, last],
        [first, second, second, last],
        [first, second],
        [second, last],
    )
    for forgery, error in zip(forgeries, errors, strict=True):
        with pytest.raises(error):
            open_instance(header + b"".join(forgery), SECRETS)
    with pytest.raises(InstanceOverlong):
        open_instance(file + last, SECRETS)


@pytest.mark.attack("A06")
def test_chunks_of_two_files_cannot_be_mixed() -> None:
    key = os.urandom(32)
    other = instance(b"X" * CHUNK_BYTES + b"Y" * CHUNK_BYTES + b"Z" * 1000, version=2)
    ours, theirs = (_sealed_each_for_itself(key, encode_content(one)) for one in (EXPORTED, other))
    mixed = decode_content(EXPORTED.header, _opened_each_for_itself(key, [ours[0], *theirs[1:]]))
    assert mixed.permanent[:1] == b"A" and mixed.permanent[-1:] == b"Z", "the attack works on chunks sealed one by one"

    our_file, their_file = seal_instance(EXPORTED, SECRETS), seal_instance(other, SECRETS)
    ours, theirs = _chunks(our_file), _chunks(their_file)
    for taken in range(3):
        spliced = [*ours[:taken], theirs[taken], *ours[taken + 1 :]]
        with pytest.raises(InstanceDamaged):
            open_instance(our_file[:HEADER_BYTES] + b"".join(spliced), SECRETS)


@pytest.mark.attack("A06")
@pytest.mark.attack("A08")
def test_an_old_state_under_a_newer_files_header_is_refused() -> None:
    newer = seal_instance(instance(EXPORTED.permanent, version=2), SECRETS)
    file = seal_instance(EXPORTED, SECRETS)
    forged = newer[:HEADER_BYTES] + file[HEADER_BYTES:]
    assert parse_instance_header(forged).version == 2, "who believes the header alone is deceived"
    with pytest.raises(InstanceDamaged):
        open_instance(forged, SECRETS)

    raised = bytearray(file)
    raised[71] = 2
    assert parse_instance_header(bytes(raised)).version == 2
    with pytest.raises(InstanceDamaged):
        open_instance(bytes(raised), SECRETS)


@pytest.mark.attack("A06")
def test_a_hibernated_state_cannot_be_passed_off_as_shut_down() -> None:
    """Nor the reverse: a vTPM whose registers begin at zero, or go on, when the VM's do not."""
    for exported, kind in ((instance(b"p", b"v"), 0), (instance(b"p"), 1)):
        forged = bytearray(seal_instance(exported, SECRETS))
        forged[11] = kind
        assert parse_instance_header(bytes(forged)).hibernated is bool(kind), (
            "who believes the header alone is deceived"
        )
        with pytest.raises(InstanceDamaged):
            open_instance(bytes(forged), SECRETS)


@pytest.mark.attack("A06")
def test_no_part_of_the_state_is_given_out_of_a_file_that_is_bad_at_its_end() -> None:
    content = encode_content(EXPORTED)
    chunks = _sealed_each_for_itself(key := os.urandom(32), content)
    assert _opened_each_for_itself(key, chunks[:1]).endswith(b"A" * 1000), "who takes chunk by chunk has a part already"

    file = seal_instance(EXPORTED, SECRETS)
    with pytest.raises(SpvtpmError) as refused:
        open_instance(file[:-1] + bytes([file[-1] ^ 1]), SECRETS)
    assert isinstance(refused.value, InstanceFileError)
    assert b"AAAA" not in str(refused.value).encode()
