"""The destination of a handoff: a vTPM that runs on another chip, and shall run here."""

from __future__ import annotations

import asyncio
import logging
import uuid
from contextlib import suppress
from itertools import chain
from typing import Final

from spvtpm.processor.arrival import Arrival
from spvtpm.processor.ledger import Entry
from spvtpm.processor.migration.handoff import DESTINATION, Act, Event, State
from spvtpm.processor.migration.link import PeerLink, meet
from spvtpm.processor.migration.realm import Realm
from spvtpm.processor.migration.side import Side
from spvtpm.processor.migration.tokens import check_token, derive_token, sha256_of
from spvtpm.processor.nv_store import Change
from spvtpm.processor.relay_socket import RelaySocket
from spvtpm.processor.residency import Residency
from spvtpm.processor.security_block import VmSecurityBlock, new_moves_key
from spvtpm.processor.vm_table import block_change, block_removal
from spvtpm.processor.vtpm_records import endorsement_name, hibernated_name, record_name
from spvtpm.wire.certificates import Chain
from spvtpm.wire.errors import ChannelError, MessageError, PeerError, SpvtpmError, StaleInstance, WrongState
from spvtpm.wire.memory_records import Kind, PageLedger, parse_record
from spvtpm.wire.memory_stream import verify_final
from spvtpm.wire.messages import error_reply
from spvtpm.wire.migration import Abort, Commit, PeerMessage, Prepared, Vtpm
from spvtpm.wire.vtpm_endorsement import encode_endorsement

log = logging.getLogger(__name__)

_BATCHES_HELD: Final = 16
"""Records of memory that wait for the driver, as they have come together: a frame of the link each, 1 MiB."""


class Incoming:
    """One handoff, at its destination; after a restart of this secure processor, what is durable of it.

    Args:
        realm: what it works on.
        vm_id: the VM.
        handoff: its id, 16 bytes.
        vm_uid: user id of the VM's process; None: any that may command.
    """

    def __init__(self, realm: Realm, vm_id: uuid.UUID, handoff: bytes, vm_uid: int | None) -> None:
        self._realm = realm
        self._vm_uid = vm_uid
        self._link: PeerLink | None = None
        self._is_linking = False
        self._records: asyncio.Queue[list[bytes]] = asyncio.Queue(_BATCHES_HELD)  # an empty one: there are no more
        self._ledger = PageLedger()
        self._final = b""
        self._is_memory_over = False
        self._arriving: tuple[VmSecurityBlock, Vtpm] | None = None
        self._live: VmSecurityBlock | None = None  # the block in the boot in which a process has the vTPM already
        acts = {
            Act.LOAD_VTPM: self._load_vtpm,
            Act.RUN_VTPM: self._run_vtpm,
            Act.DROP_VTPM: self._drop_vtpm,
            Act.SEND_PREPARED: self._send_prepared,
            Act.TELL_RECEIPT: self._tell_receipt,
        }
        self._side = Side(vm_id, handoff, self._found(vm_id, handoff), DESTINATION, acts, self._store)

    def _found(self, vm_id: uuid.UUID, handoff: bytes) -> State:
        """Where it is, as what is durable tells."""
        table = self._realm.estate.table
        block = table.get(vm_id) if table.has(vm_id) else None
        if block is None or block.arrival is None or block.arrival.handoff != handoff:
            return State.EXPECTING
        return State.PREPARED if block.is_arriving else State.LIVE

    @property
    def handoff(self) -> bytes:
        """Its id, 16 bytes."""
        return self._side.handoff

    @property
    def vm_id(self) -> uuid.UUID:
        """The VM."""
        return self._side.vm_id

    @property
    def state(self) -> State:
        """Where it is. What was durable is not any more if the VM's owner has destroyed it."""
        if self._side.state in (State.PREPARED, State.LIVE):
            durable = self._found(self.vm_id, self.handoff)
            self._side.state = State.EMPTY if durable is State.EXPECTING else durable
        return self._side.state

    @property
    def is_linking(self) -> bool:
        """Whether somebody is at the link, or about to make it."""
        return self._is_linking

    @property
    def _lock(self) -> asyncio.Lock:
        return self._realm.estate.table.lock(self._side.vm_id)

    def _arrival(self) -> Arrival:
        arrival = self._realm.estate.table.get(self._side.vm_id).arrival
        assert arrival is not None  # noqa: S101  # prepared, or live
        return arrival

    # What the hypervisor commands, or the other side says

    async def finish(self, token: bytes) -> bytes:
        """The commit token has come; gives the receipt.

        Raises:
            WrongToken: it is not the one.
            WrongState: nothing is prepared.
            StorageError: nothing runs; the token is good for another time.
        """
        async with self._lock:
            if self.state in (State.PREPARED, State.LIVE):
                check_token(token, self._arrival().commit_sha256, "commit")
            await self._side.advance(Event.COMMIT)
            return self._arrival().receipt

    async def cancel(self, token: bytes | None) -> None:
        """The abort token has come; or nobody wants what is not durable yet.

        Raises:
            WrongToken: it is not the one.
            WrongState: it is prepared, and there is no token; or it runs.
        """
        async with self._lock:
            if token is not None and self.state is State.PREPARED:
                check_token(token, self._arrival().abort_sha256, "abort")
            await self._side.advance(Event.CANCEL if token is None else Event.ABORT)
            self._end_memory()

    # The link

    async def serve_link(self, relay: RelaySocket) -> None:
        """The way to the other side has come; returns when it has ended.

        Raises:
            SpvtpmError: the other side is not who it has to be.
            TimeoutError, OSError: it is not there.
        """
        if self._is_linking or self._link is not None or self.state is not State.EXPECTING:
            raise WrongState("migration: this handoff has, or had, its link")
        self._is_linking = True
        try:
            await self._serve_link(relay)
        finally:
            self._is_linking = False

    async def _serve_link(self, relay: RelaySocket) -> None:
        link = await meet(relay, self.handoff, self._realm.keys, self._realm.peers, self._verify, is_source=False)
        self._link = link
        log.info("VM %s: linked with chip %s", self._side.vm_id, link.peer.hex())
        try:
            while True:
                await self._hear(await link.receive())
        except (PeerError, OSError) as error:
            log.info("VM %s: the link of its migration has ended: %s", self._side.vm_id, error)
        except SpvtpmError as error:
            log.warning("VM %s does not come: %s", self._side.vm_id, error)
            with suppress(SpvtpmError):
                await link.send(error_reply(error))
        finally:
            await link.end()
            await self._lose_link()

    def _verify(self, chain: tuple[bytes, ...]) -> Chain:
        return self._realm.peers.verify(chain, None)

    async def _hear(self, message: PeerMessage | list[bytes]) -> None:
        if isinstance(message, list):
            await self._take_records(message)
        elif isinstance(message, Vtpm):
            await self._take(message)
        elif isinstance(message, Commit):
            await self.finish(message.token)
        elif isinstance(message, Abort):
            await self.cancel(message.token)
        else:
            raise MessageError(f"{type(message).__name__} makes no sense from a source")

    async def _take_records(self, records: list[bytes]) -> None:
        if self._is_memory_over:
            raise ChannelError("nobody takes the VM's memory any more")
        for record in records:
            if self._final:
                raise MessageError("memory goes on behind its end")
            parsed = parse_record(record)
            if parsed.kind is Kind.PAGE:
                self._ledger.take(parsed)
            else:
                self._final = record
                self._verify_memory()
        await self._records.put(records)
        if self._final:
            await self._records.put([])

    def _verify_memory(self) -> None:
        if self._final and self._arriving is not None:
            block, vtpm = self._arriving
            verify_final(block.ownership.vm_key, self.handoff, vtpm.stop_nonce, self._ledger, self._final)

    async def _take(self, vtpm: Vtpm) -> None:
        if (vtpm.handoff, vtpm.vm_id) != (self.handoff, self._side.vm_id):
            raise MessageError("the vTPM is not of this handoff")
        assert self._link is not None  # noqa: S101  # it came by it
        key = new_moves_key()
        arrival = Arrival(
            handoff=self.handoff,
            source=self._link.peer,
            commit_sha256=vtpm.commit_sha256,
            abort_sha256=vtpm.abort_sha256,
            receipt=derive_token(key, self.handoff, "receipt"),
            stop_nonce=vtpm.stop_nonce,
        )
        block = VmSecurityBlock.arrive(vtpm.vm_id, vtpm.block, arrival, key)
        self._arriving = block, vtpm
        self._verify_memory()
        async with self._lock:
            await self._side.advance(Event.STATE)

    async def _lose_link(self) -> None:
        async with self._lock:
            with suppress(SpvtpmError):
                await self._side.advance(Event.LINK_LOST)
        if not self._final:
            self._end_memory()

    # Memory

    async def serve_memory(self, driver: RelaySocket) -> None:
        """Hands the VM's memory out; returns behind its end.

        Raises:
            OSError: the driver is not there any more.
        """
        is_over = False
        while not is_over:
            batches = [await self._records.get()]
            while not self._records.empty():
                batches.append(self._records.get_nowait())
            is_over = not batches[-1]
            try:
                await driver.send(*chain.from_iterable(batches))
            except OSError:  # these records are lost, and with them the memory
                self._end_memory()
                raise
        self._end_memory()  # for whoever else takes it

    def _end_memory(self) -> None:
        """Nobody waits for memory any more, nor to hand it out."""
        self._is_memory_over = True
        while not self._records.empty():
            self._records.get_nowait()
        self._records.put_nowait([])

    # What the rules have it do

    async def _load_vtpm(self) -> None:
        assert self._arriving is not None  # noqa: S101  # it has just come
        block, vtpm = self._arriving
        estate, vtpm_id = self._realm.estate, block.vtpm_id
        assert vtpm_id is not None  # noqa: S101  # or it could not have left
        estate.here.check(block.ownership.policy)
        estate.table.check_room(block.vm_id, block.ownership.owner)
        live = block.go_live(self._vm_uid, running=True)
        async with estate.ledger.lock:  # an import of the same is done, or finds it here
            self._check_age(vtpm_id, block.version)
            loaded = estate.vtpms.load(vtpm_id, block.vm_id)
        try:
            await loaded.power_on(
                self._realm.users.boot_of(live), vtpm.volatile, permanent=vtpm.permanent, offered=False
            )
        except BaseException:
            await estate.vtpms.forget(vtpm_id)
            raise
        self._live = live

    def _check_age(self, vtpm_id: uuid.UUID, version: int) -> None:
        estate = self._realm.estate
        estate.check_absent(vtpm_id)
        entry: Entry | None = estate.ledger.find(vtpm_id)
        if entry is not None and version < (entry.version if entry.how == "migrated" else entry.least):
            raise StaleInstance(f"vTPM {vtpm_id} has left this secure processor in a newer version than {version}")

    async def _store(self, state: State) -> None:
        estate = self._realm.estate
        if state is State.PREPARED:
            assert self._arriving is not None  # noqa: S101  # it was loaded
            await self._store_arriving(*self._arriving)
            return
        block = estate.table.get(self._side.vm_id)
        assert block.vtpm_id is not None  # noqa: S101  # it arrives with it
        if state is State.EMPTY:
            await self._discard(block, block.vtpm_id)
            return
        live = await self._going_live(block)
        changes: list[Change] = [block_change(live)]
        if self._live is not None:
            changes.append((hibernated_name(block.vtpm_id), None))
        async with estate.ledger.lock:
            await estate.guard.milestone([*changes, estate.ledger.change(block.vtpm_id, None)])
        estate.table.put(live)

    async def _store_arriving(self, block: VmSecurityBlock, vtpm: Vtpm) -> None:
        estate, vtpm_id = self._realm.estate, block.vtpm_id
        assert vtpm_id is not None  # noqa: S101  # or it could not have left
        changes = [
            (hibernated_name(vtpm_id), vtpm.volatile),
            (endorsement_name(vtpm_id), encode_endorsement(vtpm.endorsement)),
            block_change(block),
        ]
        if record_name(vtpm_id) not in estate.store:  # its process may have written a newer one
            changes.append((record_name(vtpm_id), vtpm.permanent))
        try:
            async with estate.table.room_for(block):
                await estate.guard.milestone(changes)
        except SpvtpmError:
            await estate.vtpms.forget(vtpm_id)
            raise

    async def _going_live(self, block: VmSecurityBlock) -> VmSecurityBlock:
        """The block in the boot that its loaded vTPM serves; without one, or if that has died, hibernated."""
        vtpm = self._realm.estate.vtpms.of(block)
        if self._live is None or vtpm.residency not in (Residency.ACTIVE, Residency.PARKED):
            self._live = None
            await vtpm.abandon()
            return block.go_live(None, running=False)
        return self._live.with_ownership(block.ownership)  # its owner may have changed his secret meanwhile

    async def _discard(self, block: VmSecurityBlock, vtpm_id: uuid.UUID) -> None:
        estate = self._realm.estate
        await estate.vtpms.get(vtpm_id).abandon()
        await estate.vtpms.destroy(vtpm_id, [block_removal(block.vm_id)], estate.guard.milestone)
        estate.table.remove(block.vm_id)

    async def _run_vtpm(self) -> None:
        block = self._realm.estate.table.get(self._side.vm_id)
        if self._live is None:
            return  # its hypervisor starts it
        try:
            await self._realm.estate.vtpms.of(block).offer()
        except SpvtpmError as error:  # it is this chip's all the same; it died just now, and its VM has to boot
            log.error("VM %s has come, and cannot go on: %s", block.vm_id, error)
            self._realm.estate.table.fail(block.vm_id, str(error))
            return
        self._realm.estate.secrets.offer(block, self._realm.users.of(block))

    async def _drop_vtpm(self) -> None:
        """It went with what was durable of it, or when that failed."""

    async def _send_prepared(self) -> None:
        assert self._link is not None  # noqa: S101  # the state came by it
        await self._link.send(Prepared(sha256_of(self._arrival().receipt)))

    async def _tell_receipt(self) -> None:
        """To whoever asks (`finish`): the source remembers what it gave up until somebody has seen to all."""
