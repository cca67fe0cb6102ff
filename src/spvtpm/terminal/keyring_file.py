"""The file in which an owner's keys and memory lie: clear with a checksum, or sealed under a passphrase. Pure, bounded.

Format: docs/formats/keyring.md.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec
from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from cryptography.hazmat.primitives.serialization import load_der_private_key
from msgspec import Meta

from spvtpm.terminal.owned import Account, OwnedVm
from spvtpm.terminal.whereabouts import Known
from spvtpm.wire.certificates import ROOT, parse_certificate
from spvtpm.wire.checksummed import ChecksummedFile, WrongChecksum
from spvtpm.wire.decoding import UNDECODABLE
from spvtpm.wire.errors import CertificateError, KeyringError, WrongPassphrase
from spvtpm.wire.instance_file import SECRET_BYTES
from spvtpm.wire.owner_certificates import parse_owner_certificate
from spvtpm.wire.vtpm_endorsement import DerCertificate

FORMAT: Final = 2
MAX_KEYRING_BYTES: Final = 1 << 23
MAX_SECRETS: Final = 256
MAX_ROOTS: Final = 16
MAX_LISTS: Final = 64
MAX_VTPMS: Final = 8192
MAX_VMS: Final = 4096
MAX_PASSPHRASE_BYTES: Final = 1024

_Secret = Annotated[bytes, Meta(min_length=SECRET_BYTES, max_length=SECRET_BYTES)]


class ListSeen(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The newest revocation list of one issuer that has told of a chip.

    Attributes:
        issuer: key identifier of who signs it, 20 bytes (RFC 5280, section 4.2.1.2, SHA-1 of the key).
        number: of the list; a smaller one is refused from now on.
    """

    issuer: Annotated[bytes, Meta(min_length=20, max_length=20)]
    number: Annotated[int, Meta(ge=1, le=(1 << 63) - 1)]


class Content(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything in a keyring. Its `repr` shows no secret.

    Attributes:
        owner_key: the owner's private key on P-384, PKCS#8 in DER. Secret.
        certificate: the owner's, DER.
        user_secrets: 32 bytes each, newest first. Secret.
        roots: the vendors' root certificates that are trusted, DER.
        lists_seen: one for each issuer.
        vtpms: what is remembered of each.
        account: the cloud platform that is used, if one is.
        vms: the owner's VMs there; no two have the same name or id. Holds secrets.
    """

    owner_key: Annotated[bytes, Meta(min_length=1, max_length=512)]
    certificate: DerCertificate
    user_secrets: Annotated[tuple[_Secret, ...], Meta(min_length=1, max_length=MAX_SECRETS)]
    roots: Annotated[tuple[DerCertificate, ...], Meta(max_length=MAX_ROOTS)] = ()
    lists_seen: Annotated[tuple[ListSeen, ...], Meta(max_length=MAX_LISTS)] = ()
    vtpms: Annotated[tuple[Known, ...], Meta(max_length=MAX_VTPMS)] = ()
    account: Account | None = None
    vms: Annotated[tuple[OwnedVm, ...], Meta(max_length=MAX_VMS)] = ()

    def __repr__(self) -> str:
        return f"Content({len(self.vtpms)} vTPMs, {len(self.vms)} VMs)"

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return [("vtpms", len(self.vtpms)), ("vms", len(self.vms))]

    def load_key(self) -> EllipticCurvePrivateKey:
        """The owner's key.

        Raises:
            KeyringError: it is none on P-384, or not the certificate's.
        """
        try:
            key = load_der_private_key(self.owner_key, password=None)
            certificate = parse_owner_certificate(self.certificate)
        except (ValueError, TypeError, UnsupportedAlgorithm, CertificateError):
            raise KeyringError("the keyring holds no owner's key and certificate") from None
        if not isinstance(key, EllipticCurvePrivateKey) or not isinstance(key.curve, SECP384R1):
            raise KeyringError("the keyring's owner key is not on P-384")
        if key.public_key() != certificate.public_key():
            raise KeyringError("the keyring's certificate is that of another key")
        return key


_CLEAR: Final = ChecksummedFile("keyring", FORMAT, Content)
_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Content)

_MAGIC: Final = b"SPVTPMKR"
_HEADER: Final = struct.Struct(">8sHBBB3s32s12s")
_CHECKSUM_BYTES: Final = 32
_SALT_BYTES, _NONCE_BYTES, _KEY_BYTES = 32, 12, 32
_LOG_N, _R, _P = 17, 8, 1
"""Source: OWASP, Password Storage Cheat Sheet, scrypt: N = 2^17, r = 8, p = 1; 128 MiB for each guess."""

_MOST = {"log2 N": 20, "r": 8, "p": 4}
_LEAST = {"log2 N": 14, "r": 8, "p": 1}
"""What a reader takes: at most 1 GiB, and a header that was made weak on purpose is refused."""


@dataclass(frozen=True, slots=True)
class PassphraseKey:
    """A key made of a passphrase, and what it was made with. Its `repr` shows no secret.

    Attributes:
        log_n, r, p: parameters of scrypt (RFC 7914, section 2); N is 2^log_n.
        salt: 32 bytes.
        key: 32 bytes. Secret.
    """

    log_n: int
    r: int
    p: int
    salt: bytes
    key: bytes

    def __repr__(self) -> str:
        return "PassphraseKey()"


def new_passphrase_key(passphrase: bytes) -> PassphraseKey:
    """A key for a new keyring, with a fresh salt; takes a while on purpose."""
    return _derive(passphrase, _LOG_N, _R, _P, os.urandom(_SALT_BYTES))


def passphrase_key_of(file: bytes, passphrase: bytes) -> PassphraseKey:
    """The key that this passphrase gives for this sealed file; takes a while on purpose.

    Raises:
        KeyringError: the file is damaged.
    """
    log_n, r, p, salt, _nonce = _parse_header(file)
    return _derive(passphrase, log_n, r, p, salt)


def is_sealed(file: bytes) -> bool:
    """Whether it takes a passphrase to read the file."""
    return file[: len(_MAGIC)] == _MAGIC


def encode_clear(content: Content) -> bytes:
    """The file without a passphrase."""
    return _CLEAR.encode(content)


def parse_clear(file: bytes) -> Content:
    """Reads a file without a passphrase.

    Raises:
        KeyringError: it is damaged. Nothing of it is quoted.
    """
    try:
        return _CLEAR.decode(file)
    except WrongChecksum:
        raise KeyringError("the keyring is damaged: its checksum is wrong") from None
    except UNDECODABLE:
        raise KeyringError("the keyring is damaged: it is not what `spvtpm terminal` writes") from None


def encode_sealed(content: Content, key: PassphraseKey) -> bytes:
    """The file under a passphrase: header, AES-256-GCM over the content, SHA-256 over all of that."""
    header = _HEADER.pack(
        *(_MAGIC, FORMAT, key.log_n, key.r, key.p, bytes(3), key.salt, os.urandom(_NONCE_BYTES)),
    )
    body = header + AESGCM(key.key).encrypt(header[-_NONCE_BYTES:], _encoder.encode(content), header)
    return body + hashlib.sha256(body).digest()


def parse_sealed(file: bytes, key: PassphraseKey) -> Content:
    """Reads a file under a passphrase.

    Raises:
        KeyringError: it is damaged, or was sealed with another salt than the key's.
        WrongPassphrase: it is whole, and does not open with this key; or somebody altered it, checksum and all.
    """
    *parameters, nonce = _parse_header(file)
    if parameters != [key.log_n, key.r, key.p, key.salt]:
        raise KeyringError("the keyring was given another passphrase meanwhile; begin again")
    header, sealed = file[: _HEADER.size], file[_HEADER.size : -_CHECKSUM_BYTES]
    try:
        encoded = AESGCM(key.key).decrypt(nonce, sealed, header)
    except InvalidTag:
        raise WrongPassphrase("the passphrase is not the keyring's") from None
    try:
        return _decoder.decode(encoded)
    except UNDECODABLE:
        raise KeyringError("the keyring is damaged: it is not what `spvtpm terminal` writes") from None


def parse_root(der: bytes) -> bytes:
    """A vendor's root certificate as the keyring keeps it.

    Raises:
        CertificateError: it is none.
    """
    parse_certificate(der, ROOT)
    return der


def _parse_header(file: bytes) -> tuple[int, int, int, bytes, bytes]:
    """The parameters of scrypt, the salt, the nonce."""
    if len(file) < _HEADER.size + _CHECKSUM_BYTES or file[: len(_MAGIC)] != _MAGIC:
        raise KeyringError("the keyring is damaged: it is cut short, or no keyring")
    if hashlib.sha256(file[:-_CHECKSUM_BYTES]).digest() != file[-_CHECKSUM_BYTES:]:
        raise KeyringError("the keyring is damaged: its checksum is wrong")
    _magic, version, log_n, r, p, reserved, salt, nonce = _HEADER.unpack_from(file)
    if version != FORMAT or any(reserved):
        raise KeyringError(f"the keyring has format {version}; known is {FORMAT}")
    for (name, least), value in zip(_LEAST.items(), (log_n, r, p), strict=True):
        if not least <= value <= _MOST[name]:
            raise KeyringError(f"the keyring asks for scrypt with {name} = {value}: {least} to {_MOST[name]} are taken")
    return log_n, r, p, salt, nonce


def _derive(passphrase: bytes, log_n: int, r: int, p: int, salt: bytes) -> PassphraseKey:
    key = Scrypt(salt, _KEY_BYTES, n=1 << log_n, r=r, p=p).derive(passphrase)
    return PassphraseKey(log_n, r, p, salt, key)
