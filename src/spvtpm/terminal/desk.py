"""Where an owner's keyring and a secure processor meet: channels to verified chips, and requests whose answers are remembered.

Exports and imports, which must survive a death at any moment, have rooms of their own (`exports.py`, `imports.py`).
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from cryptography import x509

from spvtpm.terminal.attestation import Demands, Verified, verify_endorsement, verify_secure_processor
from spvtpm.terminal.keyring import Keyring
from spvtpm.terminal.relay import OpenRelay
from spvtpm.terminal.session import TIMEOUT_S, OwnerSession
from spvtpm.terminal.whereabouts import AtChip, Destroyed, Known, after_fate
from spvtpm.wire.errors import NotFound
from spvtpm.wire.instance_content import Policy
from spvtpm.wire.messages import Endorsement
from spvtpm.wire.owner_messages import Event, Fate, MyVm


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the owner asks of a chip for one command, besides being genuine.

    Attributes:
        chips: ids of the chips that will do, 16 bytes each; None: any.
        minimum_firmware: the oldest version that will do.
        fleet_id: 16 bytes; None: any fleet.
    """

    chips: frozenset[bytes] | None = None
    minimum_firmware: int = 0
    fleet_id: bytes | None = None


def _ignore(_verified: Verified) -> None:
    pass


def _now() -> datetime:
    return datetime.now(UTC)


class Desk:
    """An owner's desk.

    Args:
        keyring: the owner's.
        way: to the secure processor.
        wishes: of the owner.
        tell: is told what was verified, before anything is said to the chip.
        timeout_s: how long each message may take.
        now: the time, with a time zone.
    """

    def __init__(
        self,
        keyring: Keyring,
        way: OpenRelay,
        wishes: Wishes = Wishes(),  # frozen
        tell: Callable[[Verified], None] = _ignore,
        timeout_s: float = TIMEOUT_S,
        now: Callable[[], datetime] = _now,
    ) -> None:
        self.keyring = keyring
        self._way = way
        self._wishes = wishes
        self._tell = tell
        self._timeout_s = timeout_s
        self._now = now

    def at(self, chip_id: bytes) -> Desk:
        """The same desk for one chip only."""
        wishes = replace(self._wishes, chips=frozenset([chip_id]))
        return Desk(self.keyring, self._way, wishes, _ignore, self._timeout_s, self._now)

    def connect(self) -> OwnerSession:
        """A channel to a chip that was verified just now. What was seen of its revocation list is remembered.

        Raises:
            as `OwnerSession.open`; and KeyringError: the keyring is damaged.
        """
        content = self.keyring.content
        return OwnerSession.open(self._way, content.load_key(), content.certificate, self._verify, self._timeout_s)

    def provision(
        self, vm_id: uuid.UUID, vm_key: bytes, policy: Policy, label: str, *, inject_key: bool = False
    ) -> MyVm:
        """Makes a VM whose vTPM begins in the default state. If the answer is lost, `list` shows whether it is there.

        Args:
            vm_id: the VM.
            vm_key: 32 bytes.
            policy: what is allowed.
            label: the owner's words.
            inject_key: whether the secure processor hands the VM key to the VM, once for each boot.

        Raises:
            SpvtpmError: the SP's refusal, or the channel broke.
        """
        with self.keyring.moving(), self.connect() as session:
            secret = self.keyring.content.user_secrets[0]
            return session.provision_new(vm_id, secret, vm_key, policy, label, inject_key=inject_key)

    def destroy(self, vm_id: uuid.UUID) -> None:
        """Destroys a VM's security block, vTPM and secrets there, for good.

        Raises:
            NotFound: this owner has no such VM there.
            SpvtpmError: the SP's refusal, or the channel broke.
        """
        with self.keyring.moving(), self.connect() as session:
            vm = find_vm(session, vm_id)
            session.destroy(vm_id)
            if vm.vtpm_id is not None:
                newest = self._newest(vm.vtpm_id, vm.version)
                self.keyring.remember(Known(vm.vtpm_id, vm_id, vm.label, newest, Destroyed()))

    def rotate(self, *, same: bool = False) -> int:
        """Gives all this owner's VMs there another `UserSecret`; how many have it now.

        Args:
            same: give them the newest that there is, rather than a new one.

        Raises:
            SpvtpmError: the SP's refusal, or the channel broke. Then none of them has it, or all of them; the keyring has it.
        """
        with self.keyring.moving(), self.connect() as session:
            secret = self.keyring.content.user_secrets[0] if same else self.keyring.add_user_secret()
            return session.rotate(secret)

    def list_mine(self) -> list[MyVm]:
        """This owner's VMs there; the keyring remembers what their vTPMs are and where they live.

        Raises:
            SpvtpmError: the SP's refusal, or the channel broke.
        """
        with self.keyring.moving(), self.connect() as session:
            vms = session.list_mine()
            self.remember(session, *vms)
        return vms

    def look(self, vm_id: uuid.UUID) -> MyVm | None:
        """One of this owner's VMs there, if it is; the keyring remembers what its vTPM is and where it lives.

        Raises:
            SpvtpmError: the SP's refusal, or the channel broke.
        """
        with self.keyring.moving(), self.connect() as session:
            vm = session.find(vm_id)
            self.remember(session, vm)
        return vm

    def remember(self, session: OwnerSession, *vms: MyVm | None) -> None:
        """Remembers where the vTPMs of these VMs live, which were found in a session just now; in `keyring.moving()`.

        One that arrives from another chip does not live yet: that one may keep it.
        """
        found = [vm for vm in vms if vm is not None and vm.state != "arriving"]
        self.keyring.remember(*self._seen(found, session.verified.chip_id))

    def fate(self, vtpm_id: uuid.UUID) -> Fate:
        """What became of a vTPM there; what is remembered of it is brought up to date.

        Raises:
            SpvtpmError: the SP's refusal, or the channel broke.
        """
        with self.keyring.moving(), self.connect() as session:
            return self.settle(session, vtpm_id)[0]

    def ask(self, vtpm_id: uuid.UUID) -> Fate:
        """The same; nothing is remembered.

        Raises:
            SpvtpmError: the SP's refusal, or the channel broke.
        """
        with self.connect() as session:
            return session.ask_fate(vtpm_id)

    def events(self, vm_id: uuid.UUID) -> list[Event]:
        """The newest events of a VM.

        Raises:
            SpvtpmError: the SP's refusal, or the channel broke.
        """
        with self.connect() as session:
            return session.events(vm_id)

    def endorsement(self, vm_id: uuid.UUID) -> tuple[Endorsement, Verified]:
        """The certificates of a VM's vTPM's endorsement keys, and the genuine chip that signed them.

        Raises:
            SpvtpmError: the SP's refusal, or the channel broke.
            CertificateError, CertificateRefused: they are not what they should be.
        """
        with self.connect() as session:
            vtpm_id = find_vm(session, vm_id).vtpm_id
            if vtpm_id is None:
                raise NotFound(f"the VM {vm_id} has no vTPM yet")
            endorsement = session.endorsement(vm_id)
        return endorsement, verify_endorsement(endorsement, vtpm_id, self._demands(), self._now())

    def settle(self, session: OwnerSession, vtpm_id: uuid.UUID) -> tuple[Fate, Known | None]:
        """Asks what became of a vTPM there, and remembers what follows. The caller holds `keyring.moving()`.

        Raises:
            SpvtpmError: the SP's refusal, or the channel broke.
        """
        fate = session.ask_fate(vtpm_id)
        known = self.keyring.known(vtpm_id)
        if known is None:
            return fate, None
        after = after_fate(known, fate, session.verified.chip_id)
        if after is None:
            self.keyring.forget(vtpm_id)
        else:
            self.keyring.remember(after)
        return fate, after

    def _newest(self, vtpm_id: uuid.UUID, version: int) -> int:
        known = self.keyring.known(vtpm_id)
        return version if known is None else max(known.newest, version)

    def _seen(self, vms: Sequence[MyVm], chip_id: bytes) -> list[Known]:
        remembered = {known.vtpm_id: known for known in self.keyring.content.vtpms}
        seen = []
        for vm in vms:
            if vm.vtpm_id is not None:
                known = remembered.get(vm.vtpm_id) or Known(vm.vtpm_id, vm.vm_id, vm.label, 0, AtChip(chip_id))
                known = Known(known.vtpm_id, vm.vm_id, vm.label, known.newest, known.place)
                after = after_fate(known, Fate(vtpm_id=vm.vtpm_id, state="here", version=vm.version), chip_id)
                assert after is not None  # noqa: S101  # what is here is remembered
                seen.append(after)
        return seen

    def _verify(self, papers: Sequence[bytes]) -> Verified:
        verified = verify_secure_processor(papers, self._demands(), self._now())
        self.keyring.saw_list(verified.revoked)
        self._tell(verified)
        return verified

    def _demands(self) -> Demands:
        content, wishes = self.keyring.content, self._wishes
        return Demands(
            roots=[x509.load_der_x509_certificate(root) for root in content.roots],
            lists=self.keyring.revocation_lists(),
            lists_seen={seen.issuer: seen.number for seen in content.lists_seen},
            chips=wishes.chips,
            minimum_firmware=wishes.minimum_firmware,
            fleet_id=wishes.fleet_id,
        )


def find_vm(session: OwnerSession, vm_id: uuid.UUID) -> MyVm:
    """One of this owner's VMs there.

    Raises:
        NotFound: there is none of this id.
    """
    vm = session.find(vm_id)
    if vm is None:
        raise NotFound(f"there is no VM {vm_id} of this owner at the chip {session.verified.chip_id.hex()}")
    return vm
