"""All targets in Python; the compiled ones are in native.py."""

from __future__ import annotations

from fuzz.attestation_targets import ATTESTATION_TARGETS
from fuzz.certificate_targets import CERTIFICATE_TARGETS
from fuzz.channel_targets import CHANNEL_TARGETS
from fuzz.instance_targets import INSTANCE_TARGETS
from fuzz.interface_targets import INTERFACE_TARGETS
from fuzz.machine_targets import MACHINE_TARGETS
from fuzz.message_targets import MESSAGE_TARGETS
from fuzz.owner_targets import OWNER_TARGETS
from fuzz.storage_targets import STORAGE_TARGETS
from fuzz.stream_targets import STREAM_TARGETS
from fuzz.target import Target
from fuzz.tpm_targets import TPM_TARGETS

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        *STREAM_TARGETS,
        *MESSAGE_TARGETS,
        *OWNER_TARGETS,
        *CHANNEL_TARGETS,
        *MACHINE_TARGETS,
        *INSTANCE_TARGETS,
        *CERTIFICATE_TARGETS,
        *ATTESTATION_TARGETS,
        *INTERFACE_TARGETS,
        *STORAGE_TARGETS,
        *TPM_TARGETS,
    )
}
