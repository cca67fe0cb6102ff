"""A07: an instance file and the wrong secrets: of another user, fleet or generation; or two pairs at once."""

from __future__ import annotations

import hashlib
from functools import reduce

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from spvtpm.wire.errors import InstanceFileError, WrongInstanceKeys
from spvtpm.wire.instance_content import decode_content, encode_content
from spvtpm.wire.instance_file import InstanceSecrets, UserSecret, open_instance, seal_instance
from tests.vectors.instance_format import File
from tests.wire.instances import SECRETS, SP, USER, instance

OTHER = b"another secret of 32 bytes ......"[:32]


@pytest.mark.attack("A07")
@pytest.mark.claim("C4")
def test_each_wrong_secret_is_refused_and_without_the_secrets_there_is_nothing_to_read() -> None:
    exported = instance(b"seeds of a TPM")
    assert decode_content(exported.header, encode_content(exported)) == exported, "in clear it needs no secret"

    file = seal_instance(exported, SECRETS)
    assert open_instance(file, SECRETS) == exported
    assert exported.permanent not in file
    for user, sp in ((UserSecret(OTHER), SP), (USER, OTHER), (UserSecret(SP), USER.value)):
        with pytest.raises(WrongInstanceKeys):
            open_instance(file, InstanceSecrets(user, sp))


@pytest.mark.attack("A07")
def test_another_generation_or_fleet_in_the_header_does_not_lead_to_the_files_keys() -> None:
    """Whoever alters the header has the SP choose another secret, or the right one for other keys."""
    file = bytearray(seal_instance(instance(b"seeds of a TPM"), SECRETS))
    for place in (48, 83):  # fleet id, generation
        altered = bytearray(file)
        altered[place] ^= 1
        with pytest.raises(WrongInstanceKeys):
            open_instance(bytes(altered), SECRETS)


@pytest.mark.attack("A07")
def test_no_part_of_one_secret_can_be_moved_into_the_other() -> None:
    def joined(user: bytes, sp: bytes) -> bytes:
        return HKDF(SHA256(), 32, None, b"").derive(user + sp)

    both = USER.value + SP
    assert joined(both[:31], both[31:]) == joined(both[:33], both[33:]), (
        "the attack works on secrets that are just joined"
    )
    for size in (31, 33):
        with pytest.raises(ValueError, match="32 belong"):
            InstanceSecrets(UserSecret(both[:size]), both[size:])


# AES-GCM does not commit to its key. What follows is arithmetic in GF(2^128) as NIST SP 800-38D, 6.3 has it, with bit 0
# first.

_ONE = 1 << 127
_REDUCTION = 0xE1 << 120


def _times(one: int, other: int) -> int:
    product = 0
    for bit in range(127, -1, -1):
        if one >> bit & 1:
            product ^= other
        other = other >> 1 ^ (_REDUCTION if other & 1 else 0)
    return product


def _power(base: int, exponent: int) -> int:
    result = _ONE
    while exponent:
        if exponent & 1:
            result = _times(result, base)
        base, exponent = _times(base, base), exponent >> 1
    return result


def _encrypted_block(key: bytes, block: bytes) -> int:
    """One block under AES alone: the first of CTR mode."""
    return int.from_bytes(Cipher(AES256(key), CTR(block)).encryptor().update(bytes(16)), "big")


def _ghash(hash_key: int, blocks: list[int]) -> int:
    return reduce(lambda state, block: _times(state ^ block, hash_key), blocks, 0)


def _chunk_for_two_keys(keys: tuple[bytes, bytes], nonce: bytes, associated: bytes) -> bytes:
    """A ciphertext of one block, and a tag, authentic under both keys for AES-GCM; 32 bytes of associated data."""
    sizes = 256 << 64 | 128
    blocks = [int.from_bytes(associated[:16], "big"), int.from_bytes(associated[16:], "big"), 0, sizes]
    hash_keys = [_encrypted_block(key, bytes(16)) for key in keys]
    masks = [_encrypted_block(key, nonce + b"\0\0\0\1") for key in keys]
    tags = [_ghash(hash_key, blocks) ^ mask for hash_key, mask in zip(hash_keys, masks, strict=True)]
    factor = _power(hash_keys[0], 2) ^ _power(hash_keys[1], 2)
    block = _times(tags[0] ^ tags[1], _power(factor, (1 << 128) - 2))
    tag = tags[0] ^ _times(block, _power(hash_keys[0], 2))
    return block.to_bytes(16, "big") + tag.to_bytes(16, "big")


@pytest.mark.attack("A07")
def test_a_chunk_that_opens_under_two_keys_does_not_make_a_file_that_does() -> None:
    """An insider who knows two users' secrets makes one file for both: each would restore another vTPM from it."""
    ours = File(content=bytes(16), user_secret=USER.value, sp_secret=SP)
    theirs = File(content=bytes(16), user_secret=OTHER, sp_secret=SP)
    nonce, associated = bytes(11) + b"\1", hashlib.sha256(ours.header()).digest()
    keys = (ours.keys()[1], theirs.keys()[1])
    chunk = _chunk_for_two_keys(keys, nonce, associated)
    contents = {AESGCM(key).decrypt(nonce, chunk, associated) for key in keys}
    assert len(contents) == 2, "the attack works on AES-GCM: both keys find it authentic, and read two things"
    with pytest.raises(InvalidTag):
        AESGCM(bytes(32)).decrypt(nonce, chunk, associated)

    file = ours.header() + chunk
    with pytest.raises(InstanceFileError, match="content"):
        open_instance(file, SECRETS)  # authentic for its one pair of secrets, if senseless
    with pytest.raises(WrongInstanceKeys):
        open_instance(file, InstanceSecrets(UserSecret(OTHER), SP))
