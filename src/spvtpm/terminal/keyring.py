"""The owner's directory: keys, secrets, trust and memory, in files that nobody else can read.

    keyring              everything that is secret or must not be put back      docs/formats/keyring.md
    revoked-<issuer>.der the newest revocation list of each vendor; public, and signed by him
    moves/               held by the one operation that moves a vTPM
    instances/           files of vTPMs that live in no secure processor, unless they were put elsewhere

Every change is one atomic, durable replacement of `keyring`, made while the directory is locked. What was read before a lock is
never written back.
"""

from __future__ import annotations

import os
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509 import AuthorityKeyIdentifier
from msgspec.structs import replace

from spvtpm.files import create_file, locked, read_file, replace_file, sync_directory
from spvtpm.terminal.keyring_file import (
    MAX_KEYRING_BYTES,
    MAX_LISTS,
    MAX_PASSPHRASE_BYTES,
    MAX_ROOTS,
    MAX_SECRETS,
    MAX_VMS,
    MAX_VTPMS,
    Content,
    ListSeen,
    PassphraseKey,
    encode_clear,
    encode_sealed,
    is_sealed,
    new_passphrase_key,
    parse_clear,
    parse_root,
    parse_sealed,
    passphrase_key_of,
)
from spvtpm.terminal.owned import Account, OwnedVm
from spvtpm.terminal.whereabouts import Known, void_file
from spvtpm.wire.errors import (
    AlreadyExists,
    KeyringError,
    NotFound,
    ResourceError,
    RevocationUnknown,
    StorageError,
    UsageError,
)
from spvtpm.wire.instance_file import SECRET_BYTES
from spvtpm.wire.owner_certificates import build_owner_certificate
from spvtpm.wire.revocation import MAX_REVOCATION_LIST_BYTES, RevocationList, parse_revocation_list

_FILE, _MOVES, _INSTANCES = "keyring", "moves", "instances"


class Keyring:
    """One owner's keyring. Life: `create` once, then `open`; `content` to read, `update` to change.

    Attributes:
        directory: where it is.
    """

    def __init__(self, directory: Path, key: PassphraseKey | None) -> None:
        self.directory = directory
        self._key = key

    @classmethod
    def create(cls, directory: Path, passphrase: bytes | None = None) -> Self:
        """Makes a keyring with a new owner key and a first `UserSecret`.

        Args:
            directory: is made with mode 0700 if it is missing.
            passphrase: 1 to 1,024 bytes; None: the file's mode alone protects it.

        Raises:
            AlreadyExists: there is one.
            KeyringError: the directory is open to others, or cannot be made.
        """
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_directory(directory)
            (directory / _MOVES).mkdir(mode=0o700, exist_ok=True)
            sync_directory(directory.absolute().parent)
        except OSError as error:
            raise KeyringError(f"cannot make the keyring's directory {directory}: {error.strerror}") from None
        if (directory / _FILE).exists():
            raise AlreadyExists(f"there is a keyring in {directory} already")
        keyring = cls(directory, None if passphrase is None else new_passphrase_key(_bounded(passphrase)))
        create_file(directory / _FILE, keyring._encode(_new_content()))
        return keyring

    @classmethod
    def open(cls, directory: Path, ask: Callable[[], bytes]) -> Self:
        """Opens a keyring that exists.

        Args:
            directory: where it is.
            ask: gives the passphrase; called only if the keyring has one.

        Raises:
            KeyringError: it is missing, damaged, or open to others.
            WrongPassphrase: it does not open with this passphrase.
        """
        _check_directory(directory)
        file = _read(directory)
        keyring = cls(directory, passphrase_key_of(file, _bounded(ask())) if is_sealed(file) else None)
        keyring._decode(file).load_key()
        return keyring

    @property
    def content(self) -> Content:
        """What it holds now.

        Raises:
            KeyringError: it is damaged.
        """
        return self._decode(_read(self.directory))

    def update(self, change: Callable[[Content], Content]) -> Content:
        """Changes the content, durably; gives the new one. One process at a time; others wait.

        Raises:
            KeyringError: it is damaged, or cannot be written; what was there is still there.
            ResourceError: it would be longer than what can be read again; so, too.
        """
        with locked(self.directory):
            old = self.content
            new = change(old)
            if new != old:
                encoded = self._encode(new)
                if len(encoded) > MAX_KEYRING_BYTES:
                    raise ResourceError(
                        f"the keyring has room for {MAX_KEYRING_BYTES} bytes; forget vTPMs that are no more"
                    )
                for left in self.directory.glob(f".{_FILE}.*"):  # of a terminal that died while it wrote
                    left.unlink(missing_ok=True)
                replace_file(self.directory / _FILE, encoded)
            return new

    @contextmanager
    def moving(self) -> Iterator[None]:
        """Held by an operation that moves vTPMs or changes secrets: one at a time, or one would undo what the other relies on.

        Raises:
            StorageError: the directory is damaged.
        """
        with locked(self.directory / _MOVES):
            yield

    def known(self, vtpm_id: uuid.UUID) -> Known | None:
        """What is remembered of a vTPM."""
        return next((known for known in self.content.vtpms if known.vtpm_id == vtpm_id), None)

    def remember(self, *vtpms: Known) -> None:
        """Puts these, last, in the place of what was remembered of them. A file that has turned out void goes.

        Raises:
            ResourceError: there is no room for another vTPM.
        """
        new = {known.vtpm_id: known for known in vtpms}
        old = [known for known in self.content.vtpms if known.vtpm_id in new]

        def change(content: Content) -> Content:
            kept = [known for known in content.vtpms if known.vtpm_id not in new] + list(new.values())
            if len(kept) > MAX_VTPMS:
                raise ResourceError(f"the keyring remembers {MAX_VTPMS} vTPMs; forget one that is no more")
            return replace(content, vtpms=tuple(kept))

        if new:
            self.update(change)
        for known in old:
            if path := void_file(known.place, new[known.vtpm_id].place):
                self.drop_instance(Path(path))

    def forget(self, vtpm_id: uuid.UUID) -> bool:
        """Drops what is remembered of a vTPM; whether there was anything."""
        before = self.known(vtpm_id)
        self.update(
            lambda content: replace(content, vtpms=tuple(known for known in content.vtpms if known.vtpm_id != vtpm_id))
        )
        return before is not None

    def vm(self, name: str) -> OwnedVm | None:
        """The owner's VM of this name."""
        return next((vm for vm in self.content.vms if vm.name == name), None)

    def owned(self, name: str) -> OwnedVm:
        """The same.

        Raises:
            NotFound: there is none.
        """
        vm = self.vm(name)
        if vm is None:
            raise NotFound(f"the keyring has no VM {name}")
        return vm

    def keep_vm(self, new: OwnedVm) -> None:
        """Puts this in the place of what was kept under its id; durable.

        Raises:
            AlreadyExists: another VM has the name.
            ResourceError: there is no room for another VM.
        """

        def change(content: Content) -> Content:
            others = tuple(vm for vm in content.vms if vm.vm_id != new.vm_id)
            if any(vm.name == new.name for vm in others):
                raise AlreadyExists(f"the keyring has another VM {new.name}")
            if len(others) >= MAX_VMS:
                raise ResourceError(f"the keyring has room for {MAX_VMS} VMs")
            return replace(content, vms=(*others, new))

        self.update(change)

    def drop_vm(self, vm_id: uuid.UUID) -> None:
        """Forgets a VM, and with it the only copy of its key."""
        self.update(lambda content: replace(content, vms=tuple(vm for vm in content.vms if vm.vm_id != vm_id)))

    def use_platform(self, account: Account | None) -> None:
        """Uses this platform from now on, or none."""
        self.update(lambda content: replace(content, account=account))

    def instances(self) -> Path:
        """The directory of instance files; it is made if it is missing.

        Raises:
            KeyringError: it cannot be made.
        """
        directory = self.directory.absolute() / _INSTANCES
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
            sync_directory(self.directory)
        except OSError as error:
            raise KeyringError(f"cannot make {directory}: {error.strerror}") from None
        return directory

    def drop_instance(self, path: Path) -> None:
        """Removes an instance file that is void now, if it is one of the keyring's own; one that was put elsewhere stays.

        Raises:
            StorageError: it cannot be removed.
        """
        if path.parent == self.instances():
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise StorageError(f"cannot remove {path}: {error.strerror}") from None

    def add_user_secret(self) -> bytes:
        """A new `UserSecret`, 32 bytes, durable before it is given; the older ones stay, for older files.

        Raises:
            ResourceError: there is no room for another.
        """
        secret = os.urandom(SECRET_BYTES)

        def change(content: Content) -> Content:
            if len(content.user_secrets) >= MAX_SECRETS:
                raise ResourceError(
                    f"the keyring holds {MAX_SECRETS} secrets already; none is dropped: files need them"
                )
            return replace(content, user_secrets=(secret, *content.user_secrets))

        self.update(change)
        return secret

    def trust_root(self, der: bytes) -> None:
        """Trusts a vendor's root certificate from now on.

        Raises:
            CertificateError: it is none.
            ResourceError: there is no room for another.
        """
        root = parse_root(der)

        def change(content: Content) -> Content:
            if root in content.roots:
                return content
            if len(content.roots) >= MAX_ROOTS:
                raise ResourceError(f"the keyring trusts {MAX_ROOTS} vendors already")
            return replace(content, roots=(*content.roots, root))

        self.update(change)

    def put_revocation_list(self, der: bytes) -> RevocationList:
        """Keeps a vendor's list, unless a newer one is known. Whether it is the vendor's shows when a chip is verified.

        Raises:
            CertificateError: it is none.
            RevocationUnknown: it is older than one that is known.
        """
        new = parse_revocation_list(der)
        issuer = list_issuer(new)
        with locked(self.directory):
            seen = [entry.number for entry in self.content.lists_seen if entry.issuer == issuer]
            if seen and new.number < seen[0]:
                raise RevocationUnknown(f"the revocation list has number {new.number}, and number {seen[0]} was seen")
            replace_file(self.directory / f"revoked-{issuer.hex()}.der", new.encode())
        return new

    def revocation_lists(self) -> list[RevocationList]:
        """The lists that are kept.

        Raises:
            StorageError, CertificateError: one is damaged.
        """
        return [
            parse_revocation_list(read_file(path, MAX_REVOCATION_LIST_BYTES))
            for path in sorted(self.directory.glob("revoked-*.der"))[:MAX_LISTS]
        ]

    def saw_list(self, seen: ListSeen) -> None:
        """Remembers the number of a list that has told of a chip, so that no older one does again."""

        def change(content: Content) -> Content:
            entries = {entry.issuer: entry for entry in content.lists_seen}
            if seen.issuer in entries and entries[seen.issuer].number >= seen.number:
                return content
            entries[seen.issuer] = seen
            if len(entries) > MAX_LISTS:
                raise ResourceError(f"the keyring remembers the revocation lists of {MAX_LISTS} issuers already")
            return replace(content, lists_seen=tuple(entries.values()))

        self.update(change)

    def _encode(self, content: Content) -> bytes:
        return encode_clear(content) if self._key is None else encode_sealed(content, self._key)

    def _decode(self, file: bytes) -> Content:
        if self._key is None:
            return parse_clear(file)
        return parse_sealed(file, self._key)


def list_issuer(revoked: RevocationList) -> bytes:
    """Key identifier of who is said to have signed the list, 20 bytes."""
    identifier = revoked.crl.extensions.get_extension_for_class(AuthorityKeyIdentifier).value.key_identifier or b""
    if len(identifier) != 20:
        raise RevocationUnknown("the revocation list does not say whose key signed it")
    return identifier


def read_passphrase(path: Path) -> bytes:
    """A passphrase from a private file; a newline at its end does not count.

    Raises:
        StorageError: it cannot be read, or others could read it too.
        UsageError: it is empty.
    """
    return _bounded(read_file(path, MAX_PASSPHRASE_BYTES + 1).removesuffix(b"\n"))


def _bounded(passphrase: bytes) -> bytes:
    if not 1 <= len(passphrase) <= MAX_PASSPHRASE_BYTES:
        raise UsageError(f"a passphrase has 1 to {MAX_PASSPHRASE_BYTES} bytes")
    return passphrase


def _check_directory(directory: Path) -> None:
    try:
        status = directory.stat()
    except OSError as error:
        raise KeyringError(f"there is no keyring in {directory}: {error.strerror}") from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise KeyringError(f"{directory} is not private (owner {status.st_uid}, mode {mode:04o}; needed: 0700)")


def _read(directory: Path) -> bytes:
    try:
        return read_file(directory / _FILE, MAX_KEYRING_BYTES)
    except StorageError as error:
        raise KeyringError(f"no keyring: {error}") from None


def _new_content() -> Content:
    key = ec.generate_private_key(ec.SECP384R1())
    return Content(
        owner_key=key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()),
        certificate=build_owner_certificate(key).public_bytes(Encoding.DER),
        user_secrets=(os.urandom(SECRET_BYTES),),
    )
