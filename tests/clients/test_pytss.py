"""tpm2-pytss, the Python binding of tpm2-tss, on a vTPM in the SP and on an embedded one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from tpm2_pytss import (  # type: ignore[import-untyped]
    ESAPI,
    ESYS_TR,
    TPM2_ALG,
    TPM2_RH,
    TPM2_SE,
    TPM2_ST,
    TPM2B_AUTH,
    TPM2B_DIGEST,
    TPM2B_MAX_NV_BUFFER,
    TPM2B_NV_PUBLIC,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPMA_NV,
    TPMA_SESSION,
    TPML_PCR_SELECTION,
    TPMS_NV_PUBLIC,
    TPMT_SIG_SCHEME,
    TPMT_SYM_DEF,
    TPMT_TK_HASHCHECK,
    TSS2_Exception,
)

from spvtpm.embedded import VTPM
from tests.clients.served import served
from tests.harness import RunningSp

pytestmark = pytest.mark.claim("C9")

ORDER = b"an order"
AES = TPMT_SYM_DEF.parse("aes128cfb")
SIGNING = TPM2B_PUBLIC.parse(
    "ecc256:ecdsa-sha256", objectAttributes="fixedtpm|fixedparent|sensitivedataorigin|userwithauth|sign"
)
SEALED = TPM2B_PUBLIC.parse("keyedhash", objectAttributes="fixedtpm|fixedparent|userwithauth")


@pytest.fixture(params=["in the SP", "in the SP, parked after every command", "embedded"])
def esapi(request: pytest.FixtureRequest, directory: Path) -> Iterator[ESAPI]:
    """A client on a fresh vTPM."""
    if request.param == "embedded":
        with VTPM() as tpm, ESAPI(tpm.tcti) as client:
            yield client
        return
    sp: RunningSp = request.getfixturevalue("shared_sp")
    with served(sp, directory, parks="parked" in request.param) as (tcti, _vtpm), ESAPI(tcti) as client:
        yield client


def primary(esapi: ESAPI) -> ESYS_TR:
    return esapi.create_primary(None, "ecc")[0]


def holding(content: bytes) -> TPM2B_SENSITIVE_CREATE:
    """What goes into a sealed object."""
    secret = TPM2B_SENSITIVE_CREATE()
    secret.sensitive.data = content
    return secret


def test_a_created_key_signs_and_others_verify(esapi: ESAPI) -> None:
    parent = primary(esapi)
    private, public, *_ = esapi.create(parent, None, SIGNING)
    key = esapi.load(parent, private, public)
    digest = TPM2B_DIGEST(hashlib.sha256(ORDER).digest())
    ticket = TPMT_TK_HASHCHECK(tag=TPM2_ST.HASHCHECK, hierarchy=TPM2_RH.NULL)
    signature = esapi.sign(key, digest, TPMT_SIG_SCHEME(scheme=TPM2_ALG.NULL), ticket)

    esapi.verify_signature(key, digest, signature)
    with pytest.raises(TSS2_Exception, match="signature"):
        esapi.verify_signature(key, TPM2B_DIGEST(bytes(32)), signature)
    values = signature.signature.ecdsa
    der = encode_dss_signature(int.from_bytes(bytes(values.signatureR)), int.from_bytes(bytes(values.signatureS)))
    verifier = load_pem_public_key(public.to_pem())
    assert isinstance(verifier, ec.EllipticCurvePublicKey)
    verifier.verify(der, ORDER, ec.ECDSA(hashes.SHA256()))


def test_nv_is_defined_written_read_and_undefined(esapi: ESAPI) -> None:
    public = TPMS_NV_PUBLIC(
        nvIndex=0x1500001,
        nameAlg=TPM2_ALG.SHA256,
        attributes=TPMA_NV.OWNERREAD | TPMA_NV.OWNERWRITE,
        dataSize=len(ORDER),
    )
    index = esapi.nv_define_space(TPM2B_AUTH(), TPM2B_NV_PUBLIC(nvPublic=public))
    esapi.nv_write(index, TPM2B_MAX_NV_BUFFER(ORDER), auth_handle=ESYS_TR.OWNER)

    assert bytes(esapi.nv_read(index, len(ORDER), auth_handle=ESYS_TR.OWNER)) == ORDER
    esapi.nv_undefine_space(index)


def test_an_hmac_session_salted_and_encrypted_lasts_over_commands(esapi: ESAPI) -> None:
    salt = primary(esapi)
    session = esapi.start_auth_session(salt, ESYS_TR.NONE, TPM2_SE.HMAC, AES, TPM2_ALG.SHA256)
    esapi.trsess_set_attributes(session, TPMA_SESSION.CONTINUESESSION | TPMA_SESSION.ENCRYPT | TPMA_SESSION.DECRYPT)
    private, public, *_ = esapi.create(salt, holding(ORDER), SEALED, session1=session)
    sealed = esapi.load(salt, private, public, session1=session)

    assert bytes(esapi.unseal(sealed, session1=session)) == ORDER
    assert len({bytes(esapi.get_random(16, session1=session)) for _ in range(3)}) == 3


def test_a_policy_session_unseals_only_while_the_pcr_is_right(esapi: ESAPI) -> None:
    pcrs = TPML_PCR_SELECTION.parse("sha256:16")

    def policy(kind: TPM2_SE) -> ESYS_TR:
        session = esapi.start_auth_session(ESYS_TR.NONE, ESYS_TR.NONE, kind, AES, TPM2_ALG.SHA256)
        esapi.policy_pcr(session, TPM2B_DIGEST(), pcrs)
        return session

    trial = policy(TPM2_SE.TRIAL)
    digest = esapi.policy_get_digest(trial)
    esapi.flush_context(trial)
    template = TPM2B_PUBLIC.parse("keyedhash", objectAttributes="fixedtpm|fixedparent", authPolicy=digest)
    parent = primary(esapi)
    private, public, *_ = esapi.create(parent, holding(ORDER), template)
    sealed = esapi.load(parent, private, public)

    assert bytes(esapi.unseal(sealed, session1=policy(TPM2_SE.POLICY))) == ORDER
    esapi.pcr_event(ESYS_TR.PCR16, b"an event")
    with pytest.raises(TSS2_Exception, match="policy check failed"):
        esapi.unseal(sealed, session1=policy(TPM2_SE.POLICY))


def test_a_hash_sequence_lives_over_many_commands(esapi: ESAPI) -> None:
    sequence = esapi.hash_sequence_start(None, TPM2_ALG.SHA384)
    for part in (b"one", b"two", b"three"):
        esapi.sequence_update(sequence, part)
    digest, _ticket = esapi.sequence_complete(sequence, b"four")

    assert bytes(digest) == hashlib.sha384(b"onetwothreefour").digest()


def test_contexts_are_saved_and_loaded(esapi: ESAPI) -> None:
    key = primary(esapi)
    name = esapi.read_public(key)[1]
    saved = esapi.context_save(key)
    esapi.flush_context(key)

    assert bytes(esapi.read_public(esapi.context_load(saved))[1]) == bytes(name)
