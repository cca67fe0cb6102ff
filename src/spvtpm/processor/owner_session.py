"""What an owner says through one confidential channel, and what is answered. Every byte is an owner's, and may be hostile."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator

from spvtpm.processor.channel_order import Turn
from spvtpm.processor.instances import Exporter, Import
from spvtpm.processor.owner_commands import Estate, OwnerCommands
from spvtpm.wire.errors import MessageError, SpvtpmError
from spvtpm.wire.messages import error_reply
from spvtpm.wire.owner_messages import (
    AcknowledgeExport,
    AskFate,
    DestroyVm,
    Done,
    ExportVtpm,
    GetEndorsement,
    ImportVtpm,
    ListMine,
    NewVtpm,
    OwnerReply,
    OwnerRequest,
    Piece,
    Provision,
    ReadEvents,
    RotateUserSecret,
    encode_owner_message,
    parse_owner_request,
)

log = logging.getLogger(__name__)


class OwnerSession:
    """The owner's side of one channel. Messages are carried out one after the other.

    Args:
        estate: what the owner's commands work on.
        owner: fingerprint of the owner's key, 32 bytes.
        turn: of the channel.
    """

    def __init__(self, estate: Estate, owner: bytes, turn: Turn) -> None:
        self._estate = estate
        self._owner = owner
        self._turn = turn
        self._commands = OwnerCommands(estate, owner, turn)
        self._exporter = Exporter(estate, owner, turn)
        self._import: Import | None = None

    async def answers(self, payload: bytes) -> AsyncIterator[bytes]:
        """The replies to one message, as they come. A refusal is a reply, too."""
        try:
            async for reply in self._answers(parse_owner_request(payload)):
                yield encode_owner_message(reply)
        except SpvtpmError as error:
            self._import = None
            log.info("owner %s: %s", self._owner.hex()[:16], error)
            yield encode_owner_message(error_reply(error))
        except Exception:
            self._import = None
            log.exception("an owner's request met a defect")
            yield encode_owner_message(error_reply(SpvtpmError("the secure processor met a defect; its log says more")))

    async def _answers(self, request: OwnerRequest) -> AsyncIterator[OwnerReply]:
        if isinstance(request, Piece):
            done = await self._feed(request)
            if done is not None:
                yield done
            return
        self._import = None  # whoever asks for something else has given it up
        if isinstance(request, ExportVtpm):
            export = await self._exporter.begin(request.vm_id)
            yield export.begins
            for piece in export.pieces():
                yield piece
        else:
            yield await self._answer(request)

    async def _feed(self, piece: Piece) -> OwnerReply | None:
        if self._import is None:
            raise MessageError("no import is under way that this piece could belong to")
        vm = await self._import.feed(piece)
        if vm is not None:
            self._import = None
        return vm

    async def _answer(self, request: OwnerRequest) -> OwnerReply:
        commands = self._commands
        match request:
            case Provision(vtpm=ImportVtpm() as announced):
                self._import = Import(self._estate, self._owner, self._turn, request, announced)
                return Done()
            case Provision(vtpm=NewVtpm() as wanted):
                return await commands.provision(request, wanted)
            case AcknowledgeExport():
                return await self._exporter.acknowledge(request)
            case DestroyVm():
                await commands.destroy(request.vm_id)
                return Done()
            case RotateUserSecret():
                return await commands.rotate(request.user_secret)
            case ListMine():
                return commands.list(request.after)
            case AskFate():
                return await commands.fate(request.vtpm_id)
            case ReadEvents():
                return commands.events(request.vm_id)
            case GetEndorsement():
                return commands.endorsement(request.vm_id)
            case _:
                raise MessageError(f"{type(request).__name__} makes no sense here")
