"""What the host's own TPM 2.0 does for the fuses: it keeps a key under a PCR policy, and counts. For `sealed_to_tpm` alone.

Whoever listens or interferes between this process and the TPM learns no key and changes nothing unnoticed: commands with secrets
go through sessions salted with the TPM's storage key; the counter is read and stepped with an HMAC under a secret of its own.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

os.putenv("TSS2_LOG", "all+none")  # the library would tell every error on stderr, beside our own sentence
from tpm2_pytss import (  # type: ignore[import-untyped]
    ESAPI,
    ESYS_TR,
    TPM2_ALG,
    TPM2_NT,
    TPM2_RC,
    TPM2_SE,
    TPM2B_NV_PUBLIC,
    TPM2B_PRIVATE,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPMA_NV,
    TPMA_SESSION,
    TPML_PCR_SELECTION,
    TPMS_NV_PUBLIC,
    TPMT_SYM_DEF,
    TSS2_Exception,
)

from spvtpm.wire.errors import FusesError

# Source: TPM 2.0 Library, Part 1, "Storage Primary Key"; made anew from the owner's seed each time, always the same.
_STORAGE_KEY = TPM2B_PUBLIC.parse(
    "ecc256:aes128cfb",
    objectAttributes="fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|restricted|decrypt",
)
_SEALED_KEY_ATTRIBUTES = (
    "fixedtpm|fixedparent|adminwithpolicy|noda"  # without userwithauth: the policy is the only way in
)
_AES = TPMT_SYM_DEF.parse("aes128cfb")

# Source: TCG Registry of Reserved TPM 2.0 Handles and Localities, "NV Index": 0x01800000 to 0x01BFFFFF are the owner's.
_FIRST_INDEX = 0x0180_0000
_INDICES = 0x0040_0000
_COUNTER_BYTES = 8  # Source: TPM 2.0 Library, Part 1, "NV Counter": 64 bits, big-endian
_COUNTER_AUTH_BYTES = 32
_COUNTER = TPMA_NV.AUTHREAD | TPMA_NV.AUTHWRITE | TPMA_NV.NO_DA | (TPM2_NT.COUNTER << TPMA_NV.TPM2_NT_SHIFT)


@dataclass(frozen=True, slots=True)
class SealedKey:
    """A key that only its TPM can open, and only while its PCRs are as they were; public.

    Attributes:
        parent: name of the storage key above it, by which the TPM is recognised.
        public: TPM2B_PUBLIC.
        private: TPM2B_PRIVATE, encrypted by the TPM.
    """

    parent: bytes
    public: bytes
    private: bytes


@dataclass(frozen=True, slots=True, repr=False)
class CounterIndex:
    """A counter in the TPM's NV memory.

    Attributes:
        index: its NV index.
        name: by which it is recognised: a hash over its index and attributes.
        auth: 32 bytes, secret; who has it can step the counter.
    """

    index: int
    name: bytes
    auth: bytes


@contextmanager
def host_tpm(tcti: str) -> Iterator[HostTpm]:
    """A connection to the TPM, for a few commands.

    Args:
        tcti: how tpm2-tss reaches it: "device:/dev/tpmrm0".

    Raises:
        FusesError: it does not answer, or refuses a command.
    """
    try:
        with ESAPI(tcti) as esapi, ExitStack() as cleanup:
            yield HostTpm(esapi, cleanup)
    except TSS2_Exception as error:
        raise FusesError(f"the host's TPM at {tcti}: {error}") from None


class HostTpm:
    """A connection to the host's TPM; `host_tpm` makes it, and removes from the TPM what it loaded."""

    def __init__(self, esapi: Any, cleanup: ExitStack) -> None:
        self._esapi = esapi
        self._cleanup = cleanup
        self._storage_key = ESYS_TR.NONE

    def seal(self, key: bytes, pcrs: tuple[int, ...]) -> SealedKey:
        """Seals a key to this TPM and to these PCRs as they are now, in the SHA-256 bank.

        Raises:
            FusesError: the TPM has no such PCR.
        """
        selection = self._selection(pcrs)
        with self._session(TPM2_SE.TRIAL) as trial:
            self._esapi.policy_pcr(trial, b"", selection)
            policy = self._esapi.policy_get_digest(trial)
        public = TPM2B_PUBLIC.parse("keyedhash", objectAttributes=_SEALED_KEY_ATTRIBUTES, authPolicy=policy)
        content = TPM2B_SENSITIVE_CREATE()
        content.sensitive.data = key
        with self._session(TPM2_SE.HMAC) as session:
            private, public, *_creation = self._esapi.create(self._parent(), content, public, session1=session)
        return SealedKey(self._parent_name(), public.marshal(), private.marshal())

    def unseal(self, sealed: SealedKey, pcrs: tuple[int, ...]) -> bytes:
        """The key.

        Raises:
            FusesError: this is another TPM, or the PCRs have changed, or the blobs.
        """
        if self._parent_name() != sealed.parent:
            raise FusesError("this is another TPM than the one that the chip was sealed to, or it was cleared since")
        public, _ = TPM2B_PUBLIC.unmarshal(sealed.public)
        private, _ = TPM2B_PRIVATE.unmarshal(sealed.private)
        loaded = self._esapi.load(self._parent(), private, public)
        self._cleanup.callback(self._esapi.flush_context, loaded)
        with self._session(TPM2_SE.POLICY) as session:
            self._esapi.policy_pcr(session, b"", self._selection(pcrs))
            try:
                return bytes(self._esapi.unseal(loaded, session1=session))
            except TSS2_Exception as error:
                if error.error in (TPM2_RC.POLICY_FAIL, TPM2_RC.PCR_CHANGED):
                    raise FusesError(
                        f"PCRs {', '.join(map(str, pcrs))} of the host's TPM are not as when the chip was sealed: "
                        "the host has booted other software"
                    ) from None
                raise

    @contextmanager
    def new_counter(self) -> Iterator[CounterIndex]:
        """A new counter that only its `auth` opens; removed again if the block fails.

        Its first number is larger than that of any counter this TPM ever had.
        Source: TPM 2.0 Library, Part 3, "TPM2_NV_Increment".
        """
        counter = self._define_counter()
        try:
            yield counter
        except BaseException:
            with suppress(TSS2_Exception, FusesError):
                self._esapi.nv_undefine_space(self._opened(counter))
            raise

    def _define_counter(self) -> CounterIndex:
        auth = secrets.token_bytes(_COUNTER_AUTH_BYTES)
        # Two counters with one index are as unlikely as 1 in 4 million; then the TPM refuses, and the user tries again.
        index = _FIRST_INDEX + secrets.randbelow(_INDICES)
        public = TPMS_NV_PUBLIC(nvIndex=index, nameAlg=TPM2_ALG.SHA256, attributes=_COUNTER, dataSize=_COUNTER_BYTES)
        with self._session(TPM2_SE.HMAC) as session:
            handle = self._esapi.nv_define_space(auth, TPM2B_NV_PUBLIC(nvPublic=public), session1=session)
        self._esapi.tr_set_auth(handle, auth)
        with self._authentic() as session:  # a counter is written once it was stepped, and that is part of its name
            self._esapi.nv_increment(handle, handle, session1=session)
        return CounterIndex(index, bytes(self._esapi.tr_get_name(handle)), auth)

    def read(self, counter: CounterIndex) -> int:
        """The counter's number.

        Raises:
            FusesError: it is gone, or another one is in its place.
        """
        handle = self._opened(counter)
        with self._authentic() as session:
            number = self._esapi.nv_read(handle, _COUNTER_BYTES, auth_handle=handle, session1=session)
        return int.from_bytes(bytes(number), "big")

    def increment(self, counter: CounterIndex) -> int:
        """Adds one; the TPM answers when that is durable. Gives the new number."""
        handle = self._opened(counter)
        with self._authentic() as session:
            self._esapi.nv_increment(handle, handle, session1=session)
        return self.read(counter)

    def _opened(self, counter: CounterIndex) -> Any:
        try:
            handle = self._esapi.tr_from_tpmpublic(counter.index)
        except TSS2_Exception as error:
            if error.error == TPM2_RC.HANDLE:
                raise FusesError("the chip's counter is gone from the host's TPM") from None
            raise
        if bytes(self._esapi.tr_get_name(handle)) != counter.name:
            raise FusesError("another counter is in the place of the chip's in the host's TPM")
        self._esapi.tr_set_auth(handle, counter.auth)
        return handle

    def _selection(self, pcrs: tuple[int, ...]) -> Any:
        """The PCRs, all of which are there: a policy over PCRs that a TPM does not keep would bind to nothing."""
        for pcr in pcrs:
            _count, _selection, digests = self._esapi.pcr_read(f"sha256:{pcr}")
            if len(digests) != 1:
                raise FusesError(f"the host's TPM has no PCR {pcr} in a SHA-256 bank")
        return TPML_PCR_SELECTION.parse("sha256:" + ",".join(map(str, pcrs)))

    def _parent(self) -> Any:
        if self._storage_key == ESYS_TR.NONE:
            try:
                self._storage_key = self._esapi.create_primary(None, _STORAGE_KEY)[0]
            except TSS2_Exception as error:
                if error.error in (TPM2_RC.BAD_AUTH, TPM2_RC.AUTH_FAIL):
                    raise FusesError(
                        "the host's TPM has a password for its owner hierarchy: it must be empty"
                    ) from None
                raise
            self._cleanup.callback(self._esapi.flush_context, self._storage_key)
        return self._storage_key

    def _parent_name(self) -> bytes:
        return bytes(self._esapi.tr_get_name(self._parent()))

    def _session(self, kind: Any) -> AbstractContextManager[Any]:
        """A session whose key only this TPM can know, for its salt is encrypted to the storage key. It encrypts parameters."""
        attributes = TPMA_SESSION.CONTINUESESSION
        if kind != TPM2_SE.TRIAL:
            attributes |= TPMA_SESSION.DECRYPT | TPMA_SESSION.ENCRYPT
        return self._started(self._parent(), kind, attributes)

    def _authentic(self) -> AbstractContextManager[Any]:
        """A session without a salt: the auth value of the object that it is used on makes its HMACs."""
        return self._started(ESYS_TR.NONE, TPM2_SE.HMAC, TPMA_SESSION.CONTINUESESSION)

    @contextmanager
    def _started(self, salted_for: Any, kind: Any, attributes: Any) -> Iterator[Any]:
        """The session, gone from the TPM afterwards: it has room for few."""
        session = self._esapi.start_auth_session(salted_for, ESYS_TR.NONE, kind, _AES, TPM2_ALG.SHA256)
        try:
            self._esapi.trsess_set_attributes(session, attributes)
            yield session
        finally:
            self._esapi.flush_context(session)
