"""`spvtpm guest`: inside the VM, the way of TPM clients to its vTPM."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from spvtpm.wire.errors import UsageError

guest_app = App(name="guest", help="Inside the VM: the way of TPM clients to its vTPM.")

Interface = Annotated[Path, Parameter(name="--interface", help="The interface's socket: run/VM.sock.")]
Key = Annotated[Path, Parameter(name="--key", help="The VM key's file.")]


@guest_app.command
def new_key(path: Path, /) -> None:
    """Write a new VM key, 32 random bytes, mode 0600. The VM and its secure processor must both have it.

    Example: spvtpm guest new-key 6f1c52ce-34d5-4b6c-8d8f-6c0f3f0e9a11.key
    """
    from spvtpm.guest.vm_key import create_vm_key

    create_vm_key(path)


@guest_app.command
def tcti(*, interface: Interface, key: Key) -> None:
    """Serve one TPM client over stdin and stdout: the `cmd` TCTI of tpm2-tss.

    Example: TPM2TOOLS_TCTI="cmd:spvtpm guest tcti --interface run/VM.sock --key VM.key" tpm2_getrandom --hex 8
    """
    from spvtpm.guest.doors import run_pipe

    run_pipe(interface, key)


@guest_app.command
def serve(*, interface: Interface, key: Key, socket: Path | None = None, tcp: str | None = None) -> None:
    """Stay resident and serve TPM clients over sockets: the `swtpm` TCTI of tpm2-tss.

    Example: spvtpm guest serve --interface run/VM.sock --key VM.key --socket /run/vtpm

    Clients then use it with: TPM2TOOLS_TCTI="swtpm:path=/run/vtpm" tpm2_getrandom --hex 8

    Parameters
    ----------
    socket
        Path of a unix socket to serve on; the control socket is PATH.ctrl.
    tcp
        HOST:PORT to serve on; the control socket is PORT+1.
    """
    import logging

    from spvtpm.guest.doors import run_sockets

    if (socket is None) == (tcp is None):
        raise UsageError("give either --socket PATH or --tcp HOST:PORT")
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    run_sockets(interface, key, socket, None if tcp is None else _host_and_port(tcp))


@guest_app.command
def device(*, key: Key) -> None:
    """Inside a Linux guest: make the vTPM on the direct path a TPM of the kernel, /dev/tpmN, until this ends. Needs root.

    Example: spvtpm guest device --key /etc/spvtpm/vm.key

    Then every program that knows TPMs has it: tpm2_getrandom -T device:/dev/tpmrm0 --hex 8
    """
    import logging

    from spvtpm.guest.device import run_device

    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    run_device(key, lambda path: print(f"serving {path}", flush=True))


@guest_app.command
def machine(
    directory: Path, /, *, vm: uuid.UUID, secret: Path, interface: Path | None = None, resume: bool = False
) -> None:
    """Be an emulated VM: a process with a VM's memory, its programs, and its vTPM. A host's agent starts it.

    Example: spvtpm guest machine DIR --vm 6f1c52ce-34d5-4b6c-8d8f-6c0f3f0e9a11 --secret VM.secret.sock --interface VM.sock

    Parameters
    ----------
    directory
        The machine's own, where its sockets and its memory will be.
    vm
        The VM's id.
    secret
        Socket of the launch secret.
    interface
        Socket of the vTPM's interface; without it, the VM has no vTPM.
    resume
        Go on from the image that is in the directory.
    """
    import logging

    from spvtpm.guest.machine import Machine, Place

    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
    Machine(Place(vm, directory.absolute(), secret, interface, resume)).run()


def _host_and_port(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65535:
        raise UsageError(f"{text} is not HOST:PORT with a port from 1 to 65534")
    return host.removeprefix("[").removesuffix("]"), int(port)
