"""What a worker does to a new TPM before a guest's byte reaches it: derives EKs, stores their certificates, chooses PCR banks.

The keys are derived here and now from the seed, under the empty authorization that only a new TPM has, so what they are certified
as is true. A key found in a TPM that a guest has used proves nothing: he may have put it there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from spvtpm.engine.errors import TpmFailed
from spvtpm.processor.pcr_banks import PCR_BANKS
from spvtpm.processor.worker import tpm_commands
from spvtpm.processor.worker.messages import Endorse, Endorsed
from spvtpm.wire.ek_templates import CHAIN_INDEX, EkTemplate
from spvtpm.wire.vtpm_endorsement import MAX_CERTIFICATE_BYTES

_PT_LEVEL, _PT_REVISION, _PT_MANUFACTURER, _PT_FIRMWARE = 0x101, 0x102, 0x105, 0x10B
"""Source: TCG TPM 2.0 Library Part 2, table TPM_PT."""


class NewTpm:
    """A TPM that was manufactured and that nobody has used. After `store` it waits for the power to come again.

    Args:
        process: executes a command.
        templates: of the EKs to derive.

    Raises:
        TpmFailed: it refused a command.
    """

    def __init__(self, process: Callable[[bytes], bytes], templates: Sequence[EkTemplate]) -> None:
        self._process = process
        self._templates = templates
        do(process, tpm_commands.STARTUP_CLEAR)
        first = _PT_LEVEL
        properties = tpm_commands.properties_in(
            do(self._process, tpm_commands.get_properties(first, _PT_FIRMWARE - first + 1))
        )
        self.endorse = Endorse(
            [self._derive(template) for template in templates],
            *(properties[number] for number in (_PT_MANUFACTURER, _PT_FIRMWARE, _PT_LEVEL, _PT_REVISION)),
        )
        """What the SP is to certify."""

    def _derive(self, template: EkTemplate) -> bytes:
        handle, public = tpm_commands.created_primary(
            do(self._process, tpm_commands.create_primary_ek(template.public))
        )
        do(self._process, tpm_commands.flush_context(handle))
        return public

    def store(self, endorsed: Endorsed) -> None:
        """Writes the certificates where the standard says, and their issuer's chain.

        Raises:
            TpmFailed: they do not fit.
        """
        for template, certificate in zip(self._templates, endorsed.certificates, strict=True):
            self._write(template.nv_index, certificate)
        chain = b"".join(endorsed.issuer)
        for number, start in enumerate(range(0, len(chain), MAX_CERTIFICATE_BYTES)):
            self._write(CHAIN_INDEX + number, chain[start : start + MAX_CERTIFICATE_BYTES])
        do(self._process, tpm_commands.SHUTDOWN_CLEAR)  # in order, so that its next start finds no sign of a power cut

    def _write(self, index: int, content: bytes) -> None:
        do(self._process, tpm_commands.nv_define(index, len(content)))
        step = tpm_commands.MAX_NV_PIECE_BYTES
        for offset in range(0, len(content), step):
            do(self._process, tpm_commands.nv_write(index, content[offset : offset + step], offset))


def allocate_banks(process: Callable[[bytes], bytes], banks: Collection[str]) -> None:
    """Gives PCRs to these banks and to no other; then the TPM waits for the power to come again.

    Args:
        process: executes a command of a new TPM that was not started yet.
        banks: their names.

    Raises:
        TpmFailed: it has no such bank.
    """
    do(process, tpm_commands.STARTUP_CLEAR)
    wanted = {PCR_BANKS[name] for name in banks}
    known = tpm_commands.pcr_banks_in(do(process, tpm_commands.get_pcr_banks()))
    if not wanted <= set(known):
        raise TpmFailed("This TPM has not all the PCR banks that are asked for.")
    chosen = {algorithm: algorithm in wanted for algorithm in known}
    if not tpm_commands.pcrs_allocated(do(process, tpm_commands.pcr_allocate(chosen))):
        raise TpmFailed("This TPM has no room for the PCR banks that are asked for.")
    do(process, tpm_commands.SHUTDOWN_CLEAR)


def do(process: Callable[[bytes], bytes], command: bytes) -> bytes:
    """Executes a command that a new TPM cannot but carry out.

    Raises:
        TpmFailed: it does not.
    """
    response = process(command)
    if (code := tpm_commands.response_code(response)) != 0:
        raise TpmFailed(f"A new TPM refuses a command of its maker: TPM result {code:#x}.")
    return response
