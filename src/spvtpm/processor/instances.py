"""Exports and imports: a vTPM leaves as an instance file, and comes back out of one.

An export gives the file out and destroys nothing. The owner acknowledges the whole file with its hash; only then, in one
transaction, security block, vTPM and secrets go and the ledger says so. Until then the vTPM is here and the export can be asked
for again, under another version. A VM that was started in between has made the file void.

An import is believed when the last byte of the file is authentic, its policy allows this chip, it is not older than anyone
knows, and the vTPM is not here. Then the vTPM is durable, bound to its VM, and waits for the hypervisor to launch it.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from dataclasses import dataclass

from spvtpm.processor.channel_order import Turn
from spvtpm.processor.endorser import read_endorsement
from spvtpm.processor.ledger import Entry
from spvtpm.processor.owner_commands import Estate
from spvtpm.processor.ownership import Ownership
from spvtpm.processor.security_block import VmSecurityBlock, VmState
from spvtpm.processor.vm_table import block_change
from spvtpm.processor.vtpm_records import endorsement_name, hibernated_name, record_name
from spvtpm.processor.worker.packing import pack_volatile, unpack_volatile
from spvtpm.wire.errors import ExportSuperseded, InstanceFileError, StaleInstance, WrongInstanceKeys
from spvtpm.wire.instance_file import (
    MAX_FILE_BYTES,
    Instance,
    InstanceHeader,
    InstanceReader,
    InstanceSecrets,
    InstanceWriter,
    UserSecret,
)
from spvtpm.wire.owner_messages import (
    PIECE_BYTES,
    AcknowledgeExport,
    ExportBegins,
    Fate,
    ImportVtpm,
    MyVm,
    Piece,
    Provision,
)
from spvtpm.wire.vtpm_endorsement import encode_endorsement


@dataclass(frozen=True, slots=True)
class Export:
    """A file that was given out and is not acknowledged yet.

    Attributes:
        begins: what was announced.
        sha256: of the file.
        file: the file; encrypted.
    """

    begins: ExportBegins
    sha256: bytes
    file: bytes

    def pieces(self) -> list[Piece]:
        """The file as it travels."""
        return [Piece(data=self.file[at : at + PIECE_BYTES]) for at in range(0, len(self.file), PIECE_BYTES)]


class Exporter:
    """The exports of one channel. One that is not acknowledged ends with the channel.

    Args:
        estate: what they work on.
        owner: fingerprint of the owner's key, 32 bytes.
        turn: of the channel.
    """

    def __init__(self, estate: Estate, owner: bytes, turn: Turn) -> None:
        self._estate = estate
        self._owner = owner
        self._turn = turn
        self._given_out: dict[uuid.UUID, tuple[ExportBegins, VmSecurityBlock, bytes]] = {}

    async def begin(self, vm_id: uuid.UUID) -> Export:
        """Packs and encrypts a vTPM in a version that no other file has.

        Raises:
            NotFound: this owner has no such VM.
            WrongState: it is neither stopped nor hibernated, or has no vTPM.
            StorageError: its state cannot be read, or the version not be made durable.
        """
        estate = self._estate
        async with estate.table.lock(vm_id):
            block = estate.owned(self._owner, vm_id).begin_export()
            file = self._seal(block)
            await estate.guard.milestone([block_change(block)])
            estate.table.put(block)
        assert block.vtpm_id is not None  # noqa: S101  # or it could not begin
        begins = ExportBegins(
            vtpm_id=block.vtpm_id,
            version=block.version,
            size_bytes=len(file),
            hibernated=block.state is VmState.HIBERNATED,
        )
        export = Export(begins, hashlib.sha256(file).digest(), file)
        self._given_out[vm_id] = begins, block, export.sha256
        return export

    def _seal(self, block: VmSecurityBlock) -> bytes:
        estate, ownership = self._estate, block.ownership
        assert block.vtpm_id is not None  # noqa: S101  # checked by begin_export
        hibernated = block.state is VmState.HIBERNATED
        header = InstanceHeader(
            vtpm_id=block.vtpm_id,
            vm_id=block.vm_id,
            fleet_id=estate.sp_secret.fleet_id,
            version=block.version,
            generation=estate.sp_secret.generation,
            created_s=int(time.time()),
            hibernated=hibernated,
        )
        permanent = estate.store.read(record_name(block.vtpm_id))
        endorsement = read_endorsement(estate.store, block.vtpm_id)
        volatile = unpack_volatile(estate.store.read(hibernated_name(block.vtpm_id))) if hibernated else None
        instance = Instance(header, permanent, volatile, ownership.policy, endorsement, ownership.label)
        secrets = InstanceSecrets(UserSecret(ownership.user_secret), estate.sp_secret.value)
        return InstanceWriter(instance, secrets).read(MAX_FILE_BYTES)

    async def acknowledge(self, request: AcknowledgeExport) -> Fate:
        """The owner has the file: destroys what is here.

        Raises:
            NotFound: this owner has no such VM.
            ExportSuperseded: it is not the file that was given out last, or the VM was started since.
            StaleInstance: the channel is out of date.
            StorageError: all is still here.
        """
        estate = self._estate
        async with estate.table.lock(request.vm_id):
            block = estate.owned(self._owner, request.vm_id)
            begins, given_out, sha256 = self._given_out.get(request.vm_id, (None, None, b""))
            if begins is None or (begins.version, sha256) != (request.version, request.sha256):
                raise ExportSuperseded(f"version {request.version} of VM {request.vm_id} is no file given out here")
            if block is not given_out:  # blocks are replaced, never changed
                raise ExportSuperseded(f"the vTPM of VM {request.vm_id} was used or exported again since")
            entry = Entry(self._owner, "exported", block.version, block.version, sha256)
            await estate.remove(block, entry, self._turn)
            del self._given_out[request.vm_id]
        return Fate(vtpm_id=begins.vtpm_id, state="exported", version=begins.version, sha256=sha256)


class Import:
    """One file on its way in. Feed it the pieces; the last one makes the VM.

    Args:
        estate: what it works on.
        owner: fingerprint of the owner's key, 32 bytes.
        turn: of the channel.
        request: what the owner wants; with secrets.
        vtpm: what was announced.

    Raises:
        AlreadyExists: the VM has a security block.
        ResourceError: there is no room.
    """

    def __init__(self, estate: Estate, owner: bytes, turn: Turn, request: Provision, vtpm: ImportVtpm) -> None:
        estate.table.check_room(request.vm_id, owner)
        self._estate = estate
        self._owner = owner
        self._turn = turn
        self._request = request
        self._newest = vtpm.newest_version
        self._left = vtpm.size_bytes
        self._reader = InstanceReader(self._secrets_for)

    def _secrets_for(self, header: InstanceHeader) -> InstanceSecrets:
        secret = self._estate.sp_secret
        if header.fleet_id != secret.fleet_id:
            raise WrongInstanceKeys(
                f"the instance file is of the fleet {header.fleet_id.hex()}, this chip of {secret.fleet_id.hex()}"
            )
        return InstanceSecrets(UserSecret(self._request.user_secret), secret.at(header.generation).value)

    async def feed(self, piece: Piece) -> MyVm | None:
        """Takes the next piece; gives the VM once the file is whole.

        Raises:
            InstanceFileError, WrongInstanceKeys: the file, or the secrets, are not what they have to be.
            GenerationError: the file is of a newer generation than this chip's.
            StaleInstance: it is older than what is known, or its vTPM is here.
            ChipNotAllowed, FirmwareTooOld: its policy does not allow this chip.
            AlreadyExists, ResourceError: the VM cannot be made.
        """
        self._left -= len(piece.data)
        if self._left < 0:
            raise InstanceFileError("the instance file is longer than its owner announced")
        header = self._reader.feed(piece.data)
        if header is not None:
            async with self._estate.ledger.lock:  # a bucket is not read while it is written
                self._check_age(header)
        return await self._take(self._reader.finish()) if not self._left else None

    def _check_age(self, header: InstanceHeader) -> None:
        vtpm_id, estate = header.vtpm_id, self._estate
        estate.check_absent(vtpm_id)
        entry = estate.ledger.find(vtpm_id)
        least = max(self._newest, 0 if entry is None else entry.least)
        if header.version < least:
            raise StaleInstance(
                f"the instance file is version {header.version} of vTPM {vtpm_id}; expected was {least} or newer"
            )

    async def _take(self, instance: Instance) -> MyVm:
        estate, header, request = self._estate, instance.header, self._request
        estate.here.check(instance.policy)
        ownership = Ownership(
            owner=self._owner,
            user_secret=request.user_secret,
            vm_key=request.vm_key,
            policy=instance.policy,
            label=instance.label,
            inject_key=request.inject_key,
        )
        block = VmSecurityBlock.provision_imported(
            request.vm_id, ownership, header.vtpm_id, header.version, hibernated=header.hibernated
        )
        changes = [
            (record_name(header.vtpm_id), instance.permanent),
            (endorsement_name(header.vtpm_id), encode_endorsement(instance.endorsement)),
            block_change(block),
        ]
        if instance.volatile is not None:
            changes.append((hibernated_name(header.vtpm_id), pack_volatile(instance.volatile)))
        async with estate.table.lock(block.vm_id), estate.ledger.lock:
            self._check_age(header)  # again: meanwhile another channel may have brought the same file
            self._turn.change(block.vm_id)
            async with estate.table.room_for(block):
                await estate.guard.milestone([*changes, estate.ledger.change(header.vtpm_id, None)])
                estate.vtpms.load(header.vtpm_id, block.vm_id)
        return estate.view(block)
