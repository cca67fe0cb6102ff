"""Instances for tests: Hypothesis strategies, and one of each kind with its secrets."""

from __future__ import annotations

import hashlib
import string
import uuid

from hypothesis import strategies as st

from spvtpm.wire.instance_file import Instance, InstanceHeader, InstanceSecrets, Policy, UserSecret
from spvtpm.wire.instance_header import MAX_PERMANENT_BYTES, MAX_VOLATILE_BYTES
from spvtpm.wire.vtpm_endorsement import VtpmEndorsement

USER, SP = UserSecret(b"user secret of thirty-two bytes!"), b"SP secret of thirty-two bytes !!"
SECRETS = InstanceSecrets(USER, SP)
OPEN_POLICY = Policy(
    migration_allowed=True,
    chips=None,
    minimum_firmware=0,
    direct_path_only=False,
    pcr_banks=frozenset({"sha256"}),
)
ENDORSEMENT = VtpmEndorsement(
    certificates=(b"of the RSA EK", b"of the ECC EK"), issuer=(b"chip EK", b"vendor", b"root")
)


def instance(permanent: bytes, volatile: bytes | None = None, version: int = 1, label: str = "") -> Instance:
    """An instance of one and the same vTPM; hibernated if there is a volatile state."""
    header = InstanceHeader(
        *(uuid.UUID(int=1), uuid.UUID(int=2), b"fleet of sixteen", version, 3, 1_750_000_000),
        hibernated=volatile is not None,
    )
    return Instance(header, permanent, volatile, OPEN_POLICY, ENDORSEMENT, label)


def _content(seed_and_size: tuple[bytes, int]) -> bytes:
    seed, size = seed_and_size
    return hashlib.shake_256(seed).digest(size)


def _states(longest: int) -> st.SearchStrategy[bytes]:
    """Short ones of any bytes; long ones made of a seed, many of them about a chunk's size."""
    sizes = st.one_of(st.integers(65_000, 66_000), st.integers(131_000, 132_000), st.integers(1, longest))
    made = st.tuples(st.binary(min_size=1, max_size=4), sizes.map(lambda size: min(size, longest)))
    return st.one_of(st.binary(min_size=1, max_size=200), st.binary(min_size=1, max_size=200), made.map(_content))


headers = st.builds(
    InstanceHeader,
    vtpm_id=st.uuids(),
    vm_id=st.uuids(),
    fleet_id=st.binary(min_size=16, max_size=16),
    version=st.integers(1, (1 << 63) - 1),
    generation=st.integers(1, (1 << 32) - 1),
    created_s=st.integers(0, 253_402_300_799),
    hibernated=st.booleans(),
)
policies = st.builds(
    Policy,
    migration_allowed=st.booleans(),
    chips=st.none() | st.frozensets(st.binary(min_size=16, max_size=16), min_size=1, max_size=20),
    minimum_firmware=st.integers(0, (1 << 32) - 1),
    direct_path_only=st.booleans(),
    pcr_banks=st.frozensets(st.text(string.ascii_lowercase + "0123456789_", min_size=1, max_size=16), max_size=16),
)
_certificates = st.binary(min_size=1, max_size=40)
endorsements = st.builds(
    VtpmEndorsement,
    certificates=st.lists(_certificates, max_size=8).map(tuple),
    issuer=st.tuples(_certificates, _certificates, _certificates),
)
labels = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=256)


@st.composite
def instances(draw: st.DrawFn) -> Instance:
    """Any instance."""
    header = draw(headers)
    volatile = draw(_states(MAX_VOLATILE_BYTES)) if header.hibernated else None
    return Instance(
        header, draw(_states(MAX_PERMANENT_BYTES)), volatile, draw(policies), draw(endorsements), draw(labels)
    )


secrets = st.builds(
    InstanceSecrets,
    st.binary(min_size=32, max_size=32).map(UserSecret),
    st.binary(min_size=32, max_size=32),
)
