"""EK certificates as TPM tools and OpenSSL see them, in a VM that knows nothing of the secure processor."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from spvtpm.wire import messages
from spvtpm.wire.ek_templates import CHAIN_INDEX, EK_TEMPLATES, EkTemplate
from tests.clients.served import served
from tests.clients.tools import Tools
from tests.harness import RunningSp
from tests.papers import der, todays_papers

pytestmark = pytest.mark.claim("C7")

ALGORITHMS = {"RSA-2048 EK": "rsa", "P-256 EK": "ecc", "P-384 EK": "ecc384"}
CERTIFICATE_ATTRIBUTES = "ppwrite|writedefine|ppread|ownerread|authread|no_da|written|platformcreate"
templates = pytest.mark.parametrize("template", EK_TEMPLATES, ids=lambda template: template.name)


@pytest.fixture
def vm(shared_sp: RunningSp, directory: Path) -> Iterator[tuple[Tools, messages.Endorsement]]:
    """A new VM's tools, and what the SP says of its vTPM."""
    with served(shared_sp, directory) as (tcti, vtpm):
        endorsement = shared_sp.call(messages.GetEndorsement(vm_id=vtpm.vm_id))
        assert isinstance(endorsement, messages.Endorsement)
        yield Tools(tcti, directory), endorsement


def openssl(*words: str | Path, stdin: bytes = b"") -> bytes:
    return subprocess.run(["openssl", *words], input=stdin, capture_output=True, check=True).stdout


def chain_in_nv(tools: Tools) -> bytes:
    listed = tools.run("tpm2_getcap", "handles-nv-index").decode().split()
    indices = sorted(int(word, 16) for word in listed if word.startswith("0x"))
    parts = [index for index in indices if CHAIN_INDEX <= index < CHAIN_INDEX + 0x100]
    assert parts == list(range(CHAIN_INDEX, CHAIN_INDEX + len(parts)))
    return b"".join(tools.run("tpm2_nvread", hex(index)) for index in parts)


@templates
def test_nv_holds_the_certificate_of_the_key_that_the_tools_derive(
    vm: tuple[Tools, messages.Endorsement], template: EkTemplate
) -> None:
    tools, endorsement = vm
    index = hex(template.nv_index)
    stored = tools.run("tpm2_nvread", index)
    assert stored == endorsement.certificates[EK_TEMPLATES.index(template)]
    assert CERTIFICATE_ATTRIBUTES in tools.run("tpm2_nvreadpublic", index).decode()
    algorithm = ALGORITHMS[template.name]
    tools.run("tpm2_createek", "-Q", "-G", algorithm, "-c", "ek.ctx", "-u", "ek.pem", "-f", "pem")
    certified = x509.load_der_x509_certificate(stored).public_key()
    assert tools.read("ek.pem") == certified.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


@templates
def test_openssl_verifies_the_certificate_by_the_chain_beside_it_up_to_the_vendors_root(
    vm: tuple[Tools, messages.Endorsement], template: EkTemplate, directory: Path
) -> None:
    tools, endorsement = vm
    chain = chain_in_nv(tools)
    assert chain == b"".join(endorsement.issuer)
    ders = []
    while chain:  # DER tells its own length
        size = 4 + int.from_bytes(chain[2:4], "big")
        ders.append(chain[:size])
        chain = chain[size:]
    between = directory / "between.pem"
    between.write_bytes(b"".join(openssl("x509", "-inform", "der", stdin=certificate) for certificate in ders[:2]))
    root = directory / "root.pem"
    root.write_bytes(openssl("x509", "-inform", "der", stdin=der(todays_papers().root.certificate)))
    leaf = directory / "leaf.pem"
    leaf.write_bytes(openssl("x509", "-inform", "der", stdin=tools.run("tpm2_nvread", hex(template.nv_index))))
    assert b"OK" in openssl("verify", "-x509_strict", "-CAfile", root, "-untrusted", between, leaf)


def test_the_tools_find_the_certificates_by_themselves(vm: tuple[Tools, messages.Endorsement]) -> None:
    tools, endorsement = vm
    tools.run("tpm2_getekcertificate", "-o", "first", "-o", "second")
    assert [tools.read("first"), tools.read("second")] == list(endorsement.certificates[:2])


@templates
def test_a_credential_made_for_the_certified_key_is_opened(
    vm: tuple[Tools, messages.Endorsement], template: EkTemplate
) -> None:
    tools, _endorsement = vm
    algorithm = ALGORITHMS[template.name]
    certificate = x509.load_der_x509_certificate(tools.run("tpm2_nvread", hex(template.nv_index)))
    tools.write("certified.pem", certificate.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    tools.run("tpm2_createek", "-Q", "-G", algorithm, "-c", "ek.ctx", "-u", "ek.pub")
    tools.write("secret", b"a credential")
    name = tools.attestation_key_under("ek.ctx")
    key = (
        ("-u", "ek.pub") if algorithm == "ecc384" else ("-G", algorithm, "-u", "certified.pem")
    )  # a PEM is read as SHA-256's
    tools.run("tpm2_makecredential", "-Q", "-T", "none", *key, "-s", "secret", "-n", name, "-o", "credential")
    tools.run("tpm2_startauthsession", "--policy-session", "-S", "session.ctx")
    tools.run("tpm2_policysecret", "-Q", "-S", "session.ctx", "-c", "e")
    # The policy of the high range has another branch, too; its keys take their password, which is empty, as well.
    session = () if algorithm == "ecc384" else ("-P", "session:session.ctx")
    ends = ("-i", "credential", "-o", "opened", *session)
    tools.run("tpm2_activatecredential", "-Q", "-c", "ak.ctx", "-C", "ek.ctx", *ends)
    assert tools.read("opened") == b"a credential"
    tools.flush("-t", "-l", "-s")


def test_the_users_own_ek_is_made_and_used_with_plain_commands(vm: tuple[Tools, messages.Endorsement]) -> None:
    """From a template of his own, persistent at a handle of his own; to be certified by whomever he likes."""
    tools, endorsement = vm
    tools.write("unique", (32).to_bytes(2, "little") + b"u" * 32 + (32).to_bytes(2, "little") + bytes(32))
    attributes = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|restricted|decrypt"
    tools.run(
        *("tpm2_createprimary", "-Q", "-C", "e", "-G", "ecc256:aes128cfb", "-a", attributes, "-u", "unique"),
        *("-c", "own.ctx", "-f", "pem", "-o", "own.pem"),
    )
    tools.run("tpm2_evictcontrol", "-Q", "-C", "o", "-c", "own.ctx", "0x81010020")
    tools.flush("-t")
    certified = [x509.load_der_x509_certificate(certificate) for certificate in endorsement.certificates]
    ours = {
        certificate.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        for certificate in certified
    }
    assert tools.read("own.pem") not in ours
    tools.run("tpm2_readpublic", "-Q", "-c", "0x81010020", "-n", "own.name")
    tools.run(
        *(
            "tpm2_create",
            "-Q",
            "-C",
            "0x81010020",
            "-G",
            "ecc",
            "-a",
            "sign|fixedtpm|fixedparent|sensitivedataorigin|userwithauth",
        ),
        *("-u", "key.pub", "-r", "key.priv", "-c", "key.ctx"),
    )
    tools.run("tpm2_sign", "-Q", "-c", "key.ctx", "-g", "sha256", "-o", "signature", tools.write("text", b"a text"))
    tools.run("tpm2_verifysignature", "-c", "key.ctx", "-g", "sha256", "-m", "text", "-s", "signature")
    tools.flush("-t")
