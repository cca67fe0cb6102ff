"""The source of a handoff: a vTPM that runs here, and shall run on another chip."""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Literal

from spvtpm.processor.endorser import read_endorsement
from spvtpm.processor.ledger import Entry
from spvtpm.processor.migration.departures import Departure, departure_change
from spvtpm.processor.migration.handoff import SOURCE, Act, Event, State
from spvtpm.processor.migration.link import PeerLink, meet
from spvtpm.processor.migration.realm import Realm
from spvtpm.processor.migration.side import Side
from spvtpm.processor.migration.tokens import derive_abort_token, derive_token, sha256_of
from spvtpm.processor.relay_socket import RelaySocket
from spvtpm.processor.security_block import VmSecurityBlock
from spvtpm.processor.vm_table import block_removal
from spvtpm.processor.vtpm_records import record_name
from spvtpm.wire.certificates import Chain
from spvtpm.wire.errors import ChannelError, MessageError, PeerError, ResourceError, SpvtpmError, WrongState
from spvtpm.wire.memory_records import Kind, PageLedger, parse_record
from spvtpm.wire.memory_stream import verify_final
from spvtpm.wire.messages import ErrorReply
from spvtpm.wire.migration import Abort, Commit, Prepared, Vtpm

log = logging.getLogger(__name__)

_LINK_S: Final = 20.0
_TELL_S: Final = 2.0
"""How long the link may take for a token: the VM's owner may be waiting for its lock."""
_PATIENCE_S: Final = 60.0
"""How long the other side may take for what it is waited for, and the driver for the last of the memory."""


class Outgoing:
    """One handoff, at its source.

    Args:
        realm: what it works on.
        block: of the VM, as it runs.
        over: called once what is durable, or nothing, tells all of it.

    Raises:
        WrongState, MigrationForbidden: it cannot leave.
        TooMany: too many have left without a receipt.
    """

    def __init__(self, realm: Realm, block: VmSecurityBlock, over: Callable[[Outgoing], None]) -> None:
        block.check_movable()
        realm.departures.check_room()
        self._realm = realm
        self._block = block
        self._vtpm = realm.estate.vtpms.of(block)
        self._link: PeerLink | None = None
        self._linked = asyncio.Event()  # or it has turned out that there is no link
        self._refused: SpvtpmError | None = None
        self._ledger = PageLedger()
        loop = asyncio.get_running_loop()
        self._drivers = set[RelaySocket]()
        self._has_memory: asyncio.Future[None] = loop.create_future()
        self._prepared: asyncio.Future[bytes] = loop.create_future()
        self._volatile = b""
        self._over = over
        self.stop_nonce = b""
        acts = {
            Act.STOP_VTPM: self._stop_vtpm,
            Act.RUN_VTPM: self._run_vtpm,
            Act.DROP_VTPM: self._vtpm.leave,
            Act.SEND_STATE: self._send_state,
            Act.TELL_COMMIT: self._tell_commit,
            Act.TELL_ABORT: self._tell_abort,
        }
        self._side = Side(block.vm_id, os.urandom(16), State.OFFERING, SOURCE, acts, self._store)

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
        """Where it is."""
        return self._side.state

    def token(self, name: Literal["commit", "abort"]) -> bytes:
        """Its commit or abort token, once that may be told."""
        right = {State.GONE: "commit", State.ABORTED: "abort"}.get(self.state)
        if right != name:
            raise WrongState(f"migration: the {name} token of this handoff is not to be told")
        return self._commit_token() if name == "commit" else self._abort_token()

    def _commit_token(self) -> bytes:
        return derive_token(self._block.moves_key, self.handoff, "commit")

    def _abort_token(self) -> bytes:
        return derive_abort_token(self._realm.abort_key, self.handoff, self.vm_id)

    # What the hypervisor commands

    async def stop(self) -> bytes:
        """Stops the vTPM and sends it; gives the nonce for the end of the memory, 32 bytes.

        Raises:
            ResourceError: there is no link to the other side.
            CertificateRefused: the other side is not one that may have it.
            WrongState: the VM is in another boot.
            SpvtpmError: it runs on.
        """
        await self._await_link()
        async with self._lock:
            block = self._realm.estate.table.get(self._block.vm_id)
            if block.boot_id != self._block.boot_id:
                raise WrongState("migration: the VM is in another boot than when the handoff began; begin another one")
            self._block = block
            await self._side.advance(Event.STOP)
            return self.stop_nonce

    async def _await_link(self) -> PeerLink:
        try:
            async with asyncio.timeout(_LINK_S):
                await self._linked.wait()
        except TimeoutError:
            raise ResourceError("migration: there is no link to the other secure processor yet") from None
        if self._link is None:
            raise self._refused or ResourceError("migration: the link to the other secure processor has ended")
        return self._link

    async def finish(self) -> bytes:
        """Waits until the other side has all, and gives the vTPM up; the commit token then.

        Raises:
            WrongState: it was not stopped, or is not to be finished any more.
            ResourceError: the other side, or the driver, takes too long. It can be asked for again.
            StorageError: it was not given up.
        """
        if self.state is State.STOPPED:
            try:
                async with asyncio.timeout(_PATIENCE_S):
                    await asyncio.shield(self._has_memory)
                    await asyncio.shield(self._prepared)
            except TimeoutError:
                what = "the other secure processor is not prepared" if self._has_memory.done() else "memory is missing"
                raise ResourceError(f"migration: {what} after {_PATIENCE_S:g} s") from None
        async with self._lock:
            if self.state is not State.GONE:
                self._check_prepared()
                self._check_block()
                await self._side.advance(Event.PREPARED)
            return self.token("commit")

    async def cancel(self) -> bytes:
        """The vTPM stays; the abort token then.

        Raises:
            WrongState: it was given up.
        """
        async with self._lock:
            if self.state is not State.ABORTED:
                await self._side.advance(Event.CANCEL)
            self._over(self)
            return self.token("abort")

    def _check_prepared(self) -> None:
        """Whether it was waited for: it may have been stopped only just now, and asked for before that."""
        if self.state is not State.STOPPED:
            raise WrongState(f"migration: a handoff that is {self.state.name.lower()} cannot be finished")
        for future in (self._has_memory, self._prepared):
            if not future.done():
                raise WrongState("migration: the other secure processor has not all yet; ask again")
            future.result()

    def _check_block(self) -> None:
        """Whether what was sent is what is here: its owner may have changed his secret, or destroyed it."""
        now = self._realm.estate.table.get(self._block.vm_id)
        if (now.state, now.ownership) != (self._block.state, self._block.ownership):
            raise WrongState("migration: the VM is not as it was when its vTPM was sent; begin another handoff")

    @property
    def _lock(self) -> asyncio.Lock:
        return self._realm.estate.table.lock(self._block.vm_id)

    # The link

    async def serve_link(self, relay: RelaySocket) -> None:
        """The way to the other side has come; returns when it has ended.

        Raises:
            SpvtpmError: the other side is not who it has to be.
            TimeoutError, OSError: it is not there.
        """
        if self._link is not None or self.state is not State.OFFERING:
            raise WrongState("migration: this handoff has, or had, its link")
        self._linked.clear()
        try:
            link = await meet(relay, self.handoff, self._realm.keys, self._realm.peers, self._verify, is_source=True)
            if self._link is not None:
                raise WrongState("migration: this handoff has its link")
            self._link = link
        except SpvtpmError as error:
            self._refused = error
            raise
        finally:
            self._linked.set()
        log.info("VM %s: linked with chip %s", self._block.vm_id, link.peer.hex())
        try:
            while True:
                self._hear(await link.receive())
        except (PeerError, OSError) as error:
            log.info("VM %s: the link of its migration has ended: %s", self._block.vm_id, error)
        finally:
            await link.end()
            await self._lose_link()

    def _verify(self, chain: tuple[bytes, ...]) -> Chain:
        return self._realm.peers.verify(chain, self._block.ownership.policy)

    def _hear(self, message: object) -> None:
        if isinstance(message, Prepared) and self.state is State.STOPPED and not self._prepared.done():
            self._prepared.set_result(message.receipt_sha256)
        elif isinstance(message, ErrorReply):
            raise ChannelError(f"the other secure processor gives up: {message.code}")
        else:
            raise MessageError(
                f"{type(message).__name__} makes no sense in a handoff that is {self.state.name.lower()}"
            )

    async def _lose_link(self) -> None:
        waiting: tuple[asyncio.Future[None] | asyncio.Future[bytes], ...] = (self._has_memory, self._prepared)
        for future in waiting:
            if not future.done():
                future.set_exception(ChannelError("the link to the other secure processor has ended"))
                future.exception()  # seen, whether somebody waits for it or not
        for driver in self._drivers:
            driver.hear_no_more()
        async with self._lock:
            with suppress(SpvtpmError):
                await self._side.advance(Event.LINK_LOST)
        if self.state is not State.STOPPED:
            self._over(self)

    # Memory

    async def serve_memory(self, driver: RelaySocket) -> None:
        """Records of the VM's memory come; returns behind the last one.

        Raises:
            PeerError: it is no such memory.
            OSError: the driver, or the other side, is not there any more.
        """
        link = await self._await_link()
        self._drivers.add(driver)
        try:
            await self._pass_on(driver, link)
        except OSError:
            if self._has_memory.done():
                self._has_memory.result()  # why nothing more is heard
            raise
        finally:
            self._drivers.remove(driver)

    async def _pass_on(self, driver: RelaySocket, link: PeerLink) -> None:
        while not self._has_memory.done():
            records = [parse_record(data) for data in await driver.receive_some()]
            *pages, last = records
            for page in pages if last.kind is Kind.FINAL else records:
                self._ledger.take(page)
            if last.kind is Kind.FINAL:
                verify_final(self._block.ownership.vm_key, self.handoff, self.stop_nonce, self._ledger, last.data)
            await link.send_records([record.data for record in records])
            if last.kind is Kind.FINAL and not self._has_memory.done():
                self._has_memory.set_result(None)

    # What the rules have it do

    async def _stop_vtpm(self) -> None:
        leaving = self._block.leave()
        self._volatile = await self._vtpm.halt()
        self.stop_nonce = os.urandom(32)
        self._put(leaving)

    async def _run_vtpm(self) -> None:
        table = self._realm.estate.table
        if table.has(self._block.vm_id):  # its owner may have destroyed it
            self._put(table.get(self._block.vm_id).stay())
            await self._vtpm.go_on()

    def _put(self, block: VmSecurityBlock) -> None:
        self._block = block
        self._realm.estate.table.put(block)

    async def _send_state(self) -> None:
        assert self._link is not None and self._block.vtpm_id is not None  # noqa: S101  # or it could not stop
        store = self._realm.estate.store
        state = Vtpm(
            handoff=self.handoff,
            vm_id=self._block.vm_id,
            block=self._block.moving_part(self._link.peer),
            permanent=store.read(record_name(self._block.vtpm_id)),
            volatile=self._volatile,
            endorsement=read_endorsement(store, self._block.vtpm_id),
            stop_nonce=self.stop_nonce,
            commit_sha256=sha256_of(self._commit_token()),
            abort_sha256=sha256_of(self._abort_token()),
        )
        try:
            async with asyncio.timeout(_LINK_S):
                await self._link.send(state)
        except TimeoutError:
            self._link.hang_up()
            raise ResourceError("migration: the link to the other secure processor does not take the vTPM") from None

    async def _store(self, _gone: State) -> None:
        estate, block = self._realm.estate, self._block
        assert self._link is not None and block.vtpm_id is not None  # noqa: S101  # or it could not be prepared
        departure = Departure(
            vm_id=block.vm_id,
            chip=self._link.peer,
            commit=self._commit_token(),
            receipt_sha256=self._prepared.result(),
        )
        entry = Entry(block.ownership.owner, "migrated", block.version, block.version + 1, None, self._link.peer)
        async with estate.ledger.lock:
            changes = [
                block_removal(block.vm_id),
                departure_change(self.handoff, departure),
                estate.ledger.change(block.vtpm_id, entry),
            ]
            await estate.vtpms.destroy(block.vtpm_id, changes, estate.guard.milestone)
        estate.table.remove(block.vm_id)
        estate.secrets.withdraw(block.vm_id)

    async def _tell_commit(self) -> None:
        await self._tell(Commit(self.token("commit")))

    async def _tell_abort(self) -> None:
        await self._tell(Abort(self.token("abort")))

    async def _tell(self, message: Commit | Abort) -> None:
        if self._link is not None:
            with suppress(SpvtpmError, TimeoutError):  # whoever asks may carry it
                async with asyncio.timeout(_TELL_S):
                    await self._link.send(message)
            self._link.hang_up()
