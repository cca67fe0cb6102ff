"""A token behind PKCS#11 that keeps two keys of a chip, and uses them without giving them away. For `sealed_to_token` alone.

Source: PKCS #11 Cryptographic Token Interface Base Specification 2.40, and its Current Mechanisms (AES-GCM, ECDSA).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import pkcs11
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384, Hash
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from pkcs11 import Attribute, GCMParams, KeyType, Mechanism, MechanismFlag, ObjectClass
from pkcs11.util.ec import decode_ec_private_key

from spvtpm.files import read_file
from spvtpm.wire.errors import FusesError, StorageError

_MAX_PIN_BYTES = 256
_LABEL = "spvtpm chip"
_NONCE_BYTES = 12
_TAG_BITS = 128
_AES_BITS = 256
_IN_THE_TOKEN = {Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False, Attribute.MODIFIABLE: False}
_Result = TypeVar("_Result")

_THREAD = ThreadPoolExecutor(1, "pkcs11")
"""Where all tokens are used, one use at a time: a login counts for the whole process (PKCS #11 Usage Guide 2.40, "Sessions").

A thread of its own also because modules that use OpenSSL leave errors in its queue, which is the thread's; the next TLS
connection there would break of them. SoftHSM 2.6 does so.
"""

_PROOF = b"spvtpm: the token has the chip EK of this certificate"


class Token:
    """A token. Each use logs in and out again, so one that was taken out or restarted is no trouble. Thread-safe.

    Args:
        module: the PKCS#11 library of the token's maker.
        label: the token's.
        pin_file: holds the user's PIN; private.

    Raises:
        FusesError: there is no PIN, or the module is none.
    """

    def __init__(self, module: Path, label: str, pin_file: Path) -> None:
        self._label = label
        self._pin = _read_pin(pin_file)
        try:
            self._module = _THREAD.submit(pkcs11.lib, str(module)).result()
        except pkcs11.PKCS11Error:
            raise FusesError(f"{module} is no PKCS#11 module that can be loaded") from None

    @contextmanager
    def new_keys(self, chip_id: bytes, endorsement: ec.EllipticCurvePrivateKey) -> Iterator[None]:
        """Makes a sealing key in the token and moves the chip EK into it; both are removed again if the block fails.

        Raises:
            FusesError: there are keys of this chip, or the token cannot keep such keys.
        """
        if self._use(lambda session: any(session.get_objects({Attribute.ID: chip_id}))):
            raise FusesError(f"the token {self._label} holds keys of chip {chip_id.hex()} already")
        try:
            self._use(lambda session: _make_keys(session, chip_id, endorsement))
            yield
        except BaseException:
            with suppress(FusesError):
                self._use(lambda session: _destroy_keys(session, chip_id))
            raise

    def seal(self, chip_id: bytes, label: bytes, content: bytes) -> bytes:
        """The content under the chip's sealing key: a nonce, then AES-256-GCM's ciphertext and tag."""
        nonce = os.urandom(_NONCE_BYTES)

        def encrypt(session: pkcs11.Session) -> bytes:
            key: Any = session.get_key(ObjectClass.SECRET_KEY, id=chip_id)
            parameters = GCMParams(nonce, label, _TAG_BITS)
            return bytes(key.encrypt(content, mechanism=Mechanism.AES_GCM, mechanism_param=parameters))

        return nonce + self._use(encrypt)

    def unseal(self, chip_id: bytes, label: bytes, sealed: bytes) -> bytes:
        """What was sealed.

        Raises:
            FusesError: it was altered, or the token has not the key.
        """

        def decrypt(session: pkcs11.Session) -> bytes:
            key: Any = session.get_key(ObjectClass.SECRET_KEY, id=chip_id)
            parameters = GCMParams(sealed[:_NONCE_BYTES], label, _TAG_BITS)
            return bytes(key.decrypt(sealed[_NONCE_BYTES:], mechanism=Mechanism.AES_GCM, mechanism_param=parameters))

        return self._use(decrypt)

    def sign(self, chip_id: bytes, digest: bytes) -> bytes:
        """An ECDSA signature over a digest, in DER."""

        def make(session: pkcs11.Session) -> bytes:
            key: Any = session.get_key(ObjectClass.PRIVATE_KEY, id=chip_id)
            return bytes(key.sign(digest, mechanism=Mechanism.ECDSA))

        signature = self._use(make)
        half = len(signature) // 2
        return encode_dss_signature(int.from_bytes(signature[:half], "big"), int.from_bytes(signature[half:], "big"))

    def _use(self, what: Callable[[pkcs11.Session], _Result]) -> _Result:
        """The token's errors in our words; what it says of content is never quoted."""

        def use() -> _Result:
            with self._module.get_token(token_label=self._label).open(user_pin=self._pin, rw=True) as session:
                return what(session)

        try:
            return _THREAD.submit(use).result()
        except pkcs11.NoSuchToken:
            raise FusesError(f"there is no token {self._label}") from None
        except (pkcs11.PinIncorrect, pkcs11.PinInvalid, pkcs11.PinLenRange):
            raise FusesError(f"the token {self._label} refuses the PIN; it may lock itself if that goes on") from None
        except pkcs11.NoSuchKey:
            raise FusesError(f"the token {self._label} has not the chip's keys") from None
        except pkcs11.PKCS11Error as error:
            raise FusesError(f"the token {self._label} does not do its part: {type(error).__name__}") from None


def _make_keys(session: pkcs11.Session, chip_id: bytes, endorsement: ec.EllipticCurvePrivateKey) -> None:
    session.generate_key(
        KeyType.AES,
        _AES_BITS,
        id=chip_id,
        label=_LABEL,
        store=True,
        capabilities=MechanismFlag.ENCRYPT | MechanismFlag.DECRYPT,
        template=_IN_THE_TOKEN,
    )
    der = endorsement.private_bytes(Encoding.DER, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    kept = {
        Attribute.TOKEN: True,
        Attribute.PRIVATE: True,
        Attribute.ID: chip_id,
        Attribute.LABEL: _LABEL,
        Attribute.SIGN: True,
        Attribute.DERIVE: False,
    }
    session.create_object(decode_ec_private_key(der) | kept | _IN_THE_TOKEN)


def _destroy_keys(session: pkcs11.Session, chip_id: bytes) -> None:
    for made in list(session.get_objects({Attribute.ID: chip_id})):
        made.destroy()


class TokenKey(ec.EllipticCurvePrivateKey):
    """A private key in the token that signs like any other, and can do nothing else.

    Args:
        token: has the key.
        chip_id: whose chip EK it is.
        public_key: that of the chip's certificate.

    Raises:
        FusesError: the token's key is another one.
    """

    def __init__(self, token: Token, chip_id: bytes, public_key: ec.EllipticCurvePublicKey) -> None:
        self._token = token
        self._chip_id = chip_id
        self._public_key = public_key
        algorithm = ec.ECDSA(SHA384())
        try:
            public_key.verify(self.sign(_PROOF, algorithm), _PROOF, algorithm)
        except InvalidSignature:
            raise FusesError("the token's key is not that of the chip's certificate") from None

    def sign(
        self, data: bytes | bytearray | memoryview, signature_algorithm: ec.EllipticCurveSignatureAlgorithm
    ) -> bytes:
        algorithm = signature_algorithm.algorithm
        if isinstance(algorithm, Prehashed):
            self._refuse()
        digest = Hash(algorithm)
        digest.update(data)
        return self._token.sign(self._chip_id, digest.finalize())

    def public_key(self) -> ec.EllipticCurvePublicKey:
        return self._public_key

    @property
    def curve(self) -> ec.EllipticCurve:
        return self._public_key.curve

    @property
    def key_size(self) -> int:
        return self._public_key.key_size

    def exchange(self, *_arguments: Any, **_named: Any) -> NoReturn:
        self._refuse()

    def private_numbers(self) -> NoReturn:
        self._refuse()

    def private_bytes(self, *_arguments: Any, **_named: Any) -> NoReturn:
        self._refuse()

    def __copy__(self) -> TokenKey:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> TokenKey:
        return self

    @staticmethod
    def _refuse() -> NoReturn:
        raise NotImplementedError("a key in a token signs certificates and does nothing else")


def _read_pin(path: Path) -> str:
    try:
        return read_file(path, _MAX_PIN_BYTES).decode().removesuffix("\n")
    except StorageError as error:
        raise FusesError(f"no PIN: {error}") from None
    except UnicodeDecodeError:
        raise FusesError(f"no PIN: {path} is no text") from None
