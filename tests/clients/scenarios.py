"""What TPM clients do, as scenarios that hold on any TPM 2.0 that was just made. Each leaves key slots and sessions empty."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable

from tests.clients.tools import Tools

Scenario = Callable[[Tools], None]

DIGEST = hashlib.sha256(b"measurement").digest()
PRIMARY = ("tpm2_createprimary", "-Q", "-C", "o", "-G", "ecc", "-c", "primary.ctx")
SIGNS = "sign|fixedtpm|fixedparent|sensitivedataorigin|userwithauth"
"""A signing key under dictionary-attack protection."""

SEAL_FILES = ("-u", "seal.pub", "-r", "seal.priv", "-c", "seal.ctx")
SIGN_FILES = ("-u", "sign.pub", "-r", "sign.priv", "-c", "sign.ctx")


def pcrs_of_all_banks(tools: Tools) -> None:
    for bank in ("sha1", "sha256", "sha384", "sha512"):
        digest = hashlib.new(bank, b"measurement").digest()
        tools.run("tpm2_pcrextend", f"10:{bank}={digest.hex()}")
        assert tools.pcr(10, bank) == hashlib.new(bank, bytes(len(digest)) + digest).digest()


def pcr_event_and_reset(tools: Tools) -> None:
    tools.run("tpm2_pcrevent", "16", tools.write("event", b"an event"))
    assert tools.pcr(16) == hashlib.sha256(bytes(32) + hashlib.sha256(b"an event").digest()).digest()
    tools.run("tpm2_pcrreset", "16")
    assert tools.pcr(16) == bytes(32)
    assert "locality" in tools.refused("tpm2_pcrreset", "7")


def nv_with_locks(tools: Tools) -> None:
    attributes = "ownerread|ownerwrite|read_stclear|write_stclear"
    tools.run("tpm2_nvdefine", "0x1500001", "-C", "o", "-s", "16", "-a", attributes)
    tools.run("tpm2_nvwrite", "0x1500001", "-C", "o", "-i", tools.write("nv", b"0123456789abcdef"))
    tools.run("tpm2_nvwrite", "0x1500001", "-C", "o", "-i", tools.write("part", b"XY"), "--offset", "4")
    assert tools.run("tpm2_nvread", "0x1500001", "-C", "o") == b"0123XY6789abcdef"
    tools.run("tpm2_nvwritelock", "0x1500001", "-C", "o")
    assert "locked" in tools.refused("tpm2_nvwrite", "0x1500001", "-C", "o", "-i", "part")
    tools.run("tpm2_nvreadlock", "0x1500001", "-C", "o")
    assert "locked" in tools.refused("tpm2_nvread", "0x1500001", "-C", "o")
    assert b"written" in tools.run("tpm2_nvreadpublic", "0x1500001")
    tools.run("tpm2_nvundefine", "0x1500001", "-C", "o")
    tools.flush("-l")


def nv_counter_bits_and_extend(tools: Tools) -> None:
    tools.run("tpm2_nvdefine", "0x1500002", "-C", "o", "-s", "8", "-a", "ownerread|ownerwrite|nt=counter")
    values = []
    for _ in range(3):
        tools.run("tpm2_nvincrement", "0x1500002", "-C", "o")
        values.append(int.from_bytes(tools.run("tpm2_nvread", "0x1500002", "-C", "o"), "big"))
    assert values == [values[0], values[0] + 1, values[0] + 2]
    tools.run("tpm2_nvdefine", "0x1500003", "-C", "o", "-a", "ownerread|ownerwrite|nt=bits")
    for bits in ("0x1", "0x80"):
        tools.run("tpm2_nvsetbits", "0x1500003", "-C", "o", "-i", bits)
    assert tools.run("tpm2_nvread", "0x1500003", "-C", "o") == bytes(7) + b"\x81"
    tools.run("tpm2_nvdefine", "0x1500004", "-C", "o", "-a", "ownerread|ownerwrite|nt=extend")
    tools.run("tpm2_nvextend", "0x1500004", "-C", "o", "-i", tools.write("part", b"more"))
    assert tools.run("tpm2_nvread", "0x1500004", "-C", "o") == hashlib.sha256(bytes(32) + b"more").digest()


def nv_orderly(tools: Tools) -> None:
    tools.run("tpm2_nvdefine", "0x1500005", "-C", "o", "-s", "4", "-a", "ownerread|ownerwrite|orderly")
    tools.run("tpm2_nvwrite", "0x1500005", "-C", "o", "-i", tools.write("nv", b"warm"))
    assert tools.run("tpm2_nvread", "0x1500005", "-C", "o") == b"warm"
    tools.run("tpm2_nvdefine", "0x1500006", "-C", "o", "-s", "8", "-a", "ownerread|ownerwrite|orderly|nt=counter")
    values = []
    for _ in range(6):
        tools.run("tpm2_nvincrement", "0x1500006", "-C", "o")
        values.append(int.from_bytes(tools.run("tpm2_nvread", "0x1500006", "-C", "o"), "big"))
    assert values == list(range(values[0], values[0] + 6))
    assert tools.run("tpm2_nvread", "0x1500005", "-C", "o") == b"warm"


def nv_that_only_a_startup_clears(tools: Tools) -> None:
    attributes = "ownerread|ownerwrite|clear_stclear"
    tools.run("tpm2_nvdefine", "0x1500007", "-C", "o", "-s", "4", "-a", attributes)
    tools.run("tpm2_nvwrite", "0x1500007", "-C", "o", "-i", tools.write("nv", b"here"))
    assert tools.run("tpm2_nvread", "0x1500007", "-C", "o") == b"here"


def signatures(tools: Tools) -> None:
    tools.write("order", b"an order")
    tools.run(*PRIMARY)
    for kind, scheme in (("ecc256:ecdsa", "ecdsa"), ("ecc384:ecdsa", "ecdsa"), ("rsa2048:rsassa", "rsassa")):
        tools.run("tpm2_create", "-Q", "-C", "primary.ctx", "-G", kind, *SIGN_FILES)
        tools.flush()
        signing = ("-c", "sign.ctx", "-g", "sha256", "-s", scheme)
        tools.run("tpm2_sign", *signing, "-f", "plain", "-o", "order.sig", "order")
        tools.run("tpm2_readpublic", "-Q", "-c", "sign.ctx", "-f", "pem", "-o", "sign.pem")
        tools.flush()
        tools.run("openssl", "dgst", "-sha256", "-verify", "sign.pem", "-signature", "order.sig", "order")
        tools.run("tpm2_sign", *signing, "-o", "order.tss", "order")
        verify = ("tpm2_verifysignature", "-c", "sign.ctx", "-g", "sha256", "-s", "order.tss", "-m")
        tools.run(*verify, "order")
        tools.flush()
        tools.refused(*verify, tools.write("forged", b"an 0rder"))
        tools.flush()


def a_key_that_stays_loaded(tools: Tools) -> None:
    tools.run("tpm2_createprimary", "-Q", "-C", "o", "-G", "ecc256:ecdsa", "-a", SIGNS)
    assert tools.run("tpm2_getcap", "handles-transient").strip() == b"- 0x80000000"
    tools.write("order", b"an order")
    tools.run("tpm2_readpublic", "-Q", "-c", "0x80000000", "-f", "pem", "-o", "sign.pem")
    tools.run("tpm2_sign", "-c", "0x80000000", "-g", "sha256", "-f", "plain", "-o", "order.sig", "order")
    tools.run("openssl", "dgst", "-sha256", "-verify", "sign.pem", "-signature", "order.sig", "order")
    tools.flush()


def hmac_session_over_many_commands(tools: Tools) -> None:
    tools.write("order", b"an order")
    tools.run(*PRIMARY)
    tools.run("tpm2_create", "-Q", "-C", "primary.ctx", "-G", "ecc256:ecdsa", "-p", "word", *SIGN_FILES)
    tools.flush()
    tools.run("tpm2_startauthsession", "--hmac-session", "-S", "session.ctx")
    for _ in range(3):
        sign = ("tpm2_sign", "-c", "sign.ctx", "-g", "sha256", "-o", "order.sig")
        tools.run(*sign, "-p", "session:session.ctx+word", "order")
        tools.flush()
    tools.run("tpm2_flushcontext", "session.ctx")
    tools.refused("tpm2_sign", "-c", "sign.ctx", "-g", "sha256", "-o", "x", "-p", "session:session.ctx+word", "order")
    tools.flush("-t", "-l")


def salted_and_encrypted_session(tools: Tools) -> None:
    tools.run(*PRIMARY)
    tools.flush()
    tools.run("tpm2_startauthsession", "--hmac-session", "--tpmkey-context", "primary.ctx", "-S", "session.ctx")
    tools.flush()
    tools.run("tpm2_sessionconfig", "session.ctx", "--enable-encrypt", "--enable-decrypt")
    drawn = {tools.run("tpm2_getrandom", "--hex", "-S", "session.ctx", "16") for _ in range(3)}
    assert len(drawn) == 3
    tools.run("tpm2_flushcontext", "session.ctx")


def policy_session_of_many_parts(tools: Tools) -> None:
    def build(session: str, kind: str) -> None:
        tools.run("tpm2_startauthsession", kind, "-S", session)
        tools.run("tpm2_policypcr", "-Q", "-S", session, "-l", "sha256:10")
        tools.run("tpm2_policycommandcode", "-Q", "-S", session, "TPM2_CC_Unseal")
        tools.run("tpm2_policysecret", "-Q", "-S", session, "-c", "o")
        tools.run("tpm2_policyauthvalue", "-Q", "-S", session, "-L", "policy")

    tools.run("tpm2_startauthsession", "-S", "trial.ctx")
    tools.run("tpm2_flushcontext", "trial.ctx")
    build("session.ctx", "--policy-session")
    tools.run("tpm2_flushcontext", "session.ctx")
    tools.write("secret", b"sealed to a policy")
    tools.run(*PRIMARY)
    tools.run("tpm2_create", "-Q", "-C", "primary.ctx", "-L", "policy", "-p", "word", "-i", "secret", *SEAL_FILES)
    tools.flush()
    build("session.ctx", "--policy-session")
    unseal = ("tpm2_unseal", "-c", "seal.ctx", "-p")
    assert "auth" in tools.refused(*unseal, "session:session.ctx+wrong")
    tools.flush("-t", "-l", "-s")
    build("session.ctx", "--policy-session")
    assert tools.run(*unseal, "session:session.ctx+word") == b"sealed to a policy"
    tools.flush("-t", "-l", "-s")
    build("session.ctx", "--policy-session")
    tools.run("tpm2_pcrextend", f"10:sha256={DIGEST.hex()}")
    tools.refused(*unseal, "session:session.ctx+word")
    tools.flush("-t", "-l", "-s")


def policy_or(tools: Tools) -> None:
    for name, pcr in (("first", "10"), ("second", "11")):
        tools.run("tpm2_createpolicy", "-Q", "--policy-pcr", "-l", f"sha256:{pcr}", "-L", name)
        tools.flush("-l")
    branches = "sha256:first,second"
    tools.run("tpm2_startauthsession", "-S", "trial.ctx")
    tools.run("tpm2_policyor", "-Q", "-S", "trial.ctx", "-L", "either", branches)
    tools.run("tpm2_flushcontext", "trial.ctx")
    tools.run(*PRIMARY)
    tools.write("secret", b"either will do")
    tools.run("tpm2_create", "-Q", "-C", "primary.ctx", "-L", "either", "-i", "secret", *SEAL_FILES)
    tools.flush()
    tools.run("tpm2_pcrextend", f"10:sha256={DIGEST.hex()}")
    tools.run("tpm2_startauthsession", "--policy-session", "-S", "session.ctx")
    tools.run("tpm2_policypcr", "-Q", "-S", "session.ctx", "-l", "sha256:11")
    tools.run("tpm2_policyor", "-Q", "-S", "session.ctx", branches)
    assert tools.run("tpm2_unseal", "-c", "seal.ctx", "-p", "session:session.ctx") == b"either will do"
    tools.flush("-t", "-l", "-s")


def persistent_keys(tools: Tools) -> None:
    tools.run(*PRIMARY)
    tools.run("tpm2_evictcontrol", "-Q", "-C", "o", "-c", "primary.ctx", "0x81000001")
    tools.flush()
    assert tools.run("tpm2_getcap", "handles-persistent").strip() == b"- 0x81000001"
    tools.run("tpm2_create", "-Q", "-C", "0x81000001", "-G", "ecc256:ecdsa", *SIGN_FILES)
    tools.flush()
    tools.run("tpm2_evictcontrol", "-Q", "-C", "o", "-c", "0x81000001")
    assert not tools.run("tpm2_getcap", "handles-persistent").strip()


def dictionary_attack(tools: Tools) -> None:
    tools.run("tpm2_dictionarylockout", "-s", "-n", "3", "-t", "1000", "-l", "1000")
    tools.run(*PRIMARY)
    tools.run("tpm2_create", "-Q", "-C", "primary.ctx", "-G", "ecc256:ecdsa", "-a", SIGNS, "-p", "word", *SIGN_FILES)
    tools.flush()
    sign = ("tpm2_sign", "-c", "sign.ctx", "-g", "sha256", "-o", "order.sig", "-p")
    tools.write("order", b"an order")
    for tries in range(1, 4):
        assert "auth" in tools.refused(*sign, "wrong", "order")
        tools.flush("-t", "-l")
        variable = tools.run("tpm2_getcap", "properties-variable")
        assert f"TPM2_PT_LOCKOUT_COUNTER: {tries:#x}".encode() in variable
    assert "lockout" in tools.refused(*sign, "word", "order")
    tools.flush("-t", "-l")
    tools.run("tpm2_dictionarylockout", "-c")
    tools.run(*sign, "word", "order")
    tools.flush("-t", "-l")


def sequences(tools: Tools) -> None:
    content = bytes(range(256)) * 20
    tools.write("long", content)
    tools.run("tpm2_hash", "-g", "sha384", "-o", "hash", "long")
    assert tools.read("hash") == hashlib.sha384(content).digest()
    tools.run(*PRIMARY)
    tools.write("hmac.key", b"k" * 32)
    tools.run("tpm2_import", "-Q", "-C", "primary.ctx", "-G", "hmac", "-i", "hmac.key", "-u", "k.pub", "-r", "k.priv")
    tools.flush("-t", "-l")
    tools.run("tpm2_load", "-Q", "-C", "primary.ctx", "-u", "k.pub", "-r", "k.priv", "-c", "k.ctx")
    tools.flush()
    tools.run("tpm2_hmac", "-c", "k.ctx", "-g", "sha256", "-o", "hmac", "long")
    assert tools.read("hmac") == hmac.digest(b"k" * 32, content, "sha256")
    tools.flush("-t", "-l")


def encryption(tools: Tools) -> None:
    tools.write("plain", b"sixteen bytes!!!" * 4)
    tools.run(*PRIMARY)
    key = ("-u", "key.pub", "-r", "key.priv", "-c", "key.ctx")
    tools.run("tpm2_create", "-Q", "-C", "primary.ctx", "-G", "aes128", *key)
    tools.flush()
    tools.run("tpm2_encryptdecrypt", "-Q", "-c", "key.ctx", "-o", "secret", "plain")
    tools.flush("-t", "-l")
    tools.run("tpm2_encryptdecrypt", "-Q", "-c", "key.ctx", "-d", "-o", "again", "secret")
    tools.flush("-t", "-l")
    assert tools.read("again") == tools.read("plain") != tools.read("secret")
    tools.run("tpm2_create", "-Q", "-C", "primary.ctx", "-G", "rsa2048", *key)
    tools.flush()
    tools.run("tpm2_rsaencrypt", "-c", "key.ctx", "-o", "secret", tools.write("short", b"to the key's owner"))
    tools.flush()
    tools.run("tpm2_rsadecrypt", "-c", "key.ctx", "-o", "again", "secret")
    tools.flush("-t", "-l")
    assert tools.read("again") == b"to the key's owner"


def attestation(tools: Tools) -> None:
    tools.run("tpm2_createek", "-c", "ek.ctx", "-G", "ecc", "-u", "ek.pub")
    tools.flush("-t", "-l", "-s")
    names = ("-u", "ak.pem", "-f", "pem", "-n", "ak.name")
    tools.run("tpm2_createak", "-Q", "-C", "ek.ctx", "-c", "ak.ctx", "-G", "ecc", "-g", "sha256", "-s", "ecdsa", *names)
    tools.flush("-t", "-l", "-s")
    quoted = ("-m", "quote.msg", "-s", "quote.sig")
    tools.run("tpm2_quote", "-Q", "-c", "ak.ctx", "-l", "sha256:0,7,10", "-q", "c0ffee", *quoted, "-o", "quote.pcrs")
    tools.flush("-t", "-l")
    check = ("tpm2_checkquote", "-u", "ak.pem", *quoted, "-f", "quote.pcrs", "-g", "sha256", "-q")
    tools.run(*check, "c0ffee")
    tools.refused(*check, "c0ffed")
    tools.run(*PRIMARY)
    tools.flush()
    certified = ("-o", "certify.msg", "-s", "certify.sig")
    tools.run("tpm2_certify", "-Q", "-c", "primary.ctx", "-C", "ak.ctx", "-g", "sha256", *certified, "-f", "plain")
    tools.run("openssl", "dgst", "-sha256", "-verify", "ak.pem", "-signature", "certify.sig", "certify.msg")
    tools.flush("-t", "-l")


def credential_activation(tools: Tools) -> None:
    tools.run("tpm2_createek", "-c", "ek.ctx", "-G", "rsa", "-u", "ek.pub")
    tools.flush("-t", "-l", "-s")
    names = ("-u", "ak.pub", "-n", "ak.name")
    tools.run("tpm2_createak", "-Q", "-C", "ek.ctx", "-c", "ak.ctx", "-G", "ecc", "-g", "sha256", "-s", "ecdsa", *names)
    tools.flush("-t", "-l", "-s")
    tools.write("challenge", b"only for this TPM")
    name = tools.read("ak.name").hex()
    tools.run("tpm2_makecredential", "-Q", "-u", "ek.pub", "-s", "challenge", "-n", name, "-o", "credential")
    tools.flush()
    tools.run("tpm2_startauthsession", "--policy-session", "-S", "session.ctx")
    tools.run("tpm2_policysecret", "-Q", "-S", "session.ctx", "-c", "e")
    keys = ("-c", "ak.ctx", "-C", "ek.ctx", "-P", "session:session.ctx")
    tools.run("tpm2_activatecredential", "-Q", *keys, "-i", "credential", "-o", "answer")
    assert tools.read("answer") == b"only for this TPM"
    tools.flush("-t", "-l", "-s")


def passwords_of_hierarchies(tools: Tools) -> None:
    tools.run("tpm2_changeauth", "-c", "owner", "word")
    assert "auth" in tools.refused(*PRIMARY)
    tools.run(*PRIMARY, "-P", "word")
    tools.flush("-t", "-l")
    tools.run("tpm2_changeauth", "-c", "owner", "-p", "word")
    tools.run(*PRIMARY)
    tools.flush("-t", "-l")


def clear(tools: Tools) -> None:
    tools.run("tpm2_nvdefine", "0x1500008", "-C", "o", "-s", "4", "-a", "ownerread|ownerwrite")
    tools.run("tpm2_createprimary", "-Q", "-C", "o", "-G", "ecc", "-f", "pem", "-o", "before.pem", "-c", "x.ctx")
    tools.flush()
    tools.run("tpm2_clear")
    tools.refused("tpm2_nvreadpublic", "0x1500008")
    tools.run("tpm2_createprimary", "-Q", "-C", "o", "-G", "ecc", "-f", "pem", "-o", "after.pem", "-c", "x.ctx")
    tools.flush()
    assert tools.read("before.pem") != tools.read("after.pem")


def health(tools: Tools) -> None:
    tools.run("tpm2_selftest", "--fulltest")
    assert b"success" in tools.run("tpm2_gettestresult")
    tools.run("tpm2_testparms", "ecc256:ecdsa")
    assert b"TPM2_PT_FAMILY_INDICATOR" in tools.run("tpm2_getcap", "properties-fixed")
    assert b"TPM2_CC_Quote" in tools.run("tpm2_getcap", "commands")
    tools.run("tpm2_readclock")
    tools.run("tpm2_stirrandom", tools.write("noise", b"noise"))
    assert len(tools.run("tpm2_getrandom", "32")) == 32


SCENARIOS: tuple[Scenario, ...] = (
    pcrs_of_all_banks,
    pcr_event_and_reset,
    nv_with_locks,
    nv_counter_bits_and_extend,
    nv_orderly,
    nv_that_only_a_startup_clears,
    signatures,
    a_key_that_stays_loaded,
    hmac_session_over_many_commands,
    salted_and_encrypted_session,
    policy_session_of_many_parts,
    policy_or,
    persistent_keys,
    dictionary_attack,
    sequences,
    encryption,
    attestation,
    credential_activation,
    passwords_of_hierarchies,
    clear,
    health,
)
