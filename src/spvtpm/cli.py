"""`spvtpm`: one command group per trust domain. A door: it sees every domain, and does nothing itself.

Exit codes: 0 done; 2 the command line is wrong; 3 refused; 4 a resource failed (storage, worker, socket); 5 the other side
misbehaved; 130 interrupted; 1 anything else. An error is told on stderr, with `--json` as one line of JSON.
"""

from __future__ import annotations

import sys
import uuid
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import App, Parameter

from spvtpm.wire import messages
from spvtpm.wire.errors import PeerError, PolicyError, ResourceError, SpvtpmError, UsageError

app = App(
    name="spvtpm",
    help="Virtual TPM 2.0s inside a secure processor. Start with `spvtpm sp init DIR` and `spvtpm sp run DIR`.",
)
sp_app = App(name="sp", help="The secure processor (SP): one daemon per host.")
hypervisor_app = App(name="hypervisor", help="What a hypervisor asks of its host's secure processor.")
guest_app = App(name="guest", help="Inside the VM: doors to its vTPM for TPM clients.")
app.command(sp_app)
app.command(hypervisor_app)
app.command(guest_app)

Json = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON for scripts.")]
Sp = Annotated[
    Path, Parameter(name="--sp", help="The secure processor: its state directory, or the socket run/sp.sock in it.")
]
Vm = Annotated[uuid.UUID, Parameter(help="The VM's id, a UUID.")]
Interface = Annotated[Path, Parameter(name="--interface", help="The interface's socket: run/VM.sock.")]
WithoutVtpm = Annotated[bool, Parameter(negative="", help="Make none; `create-vtpm` can later.")]
Key = Annotated[Path, Parameter(name="--key", help="The VM key's file.")]

_EXIT_CODES = ((UsageError, 2), (PolicyError, 3), (ResourceError, 4), (PeerError, 5), (SpvtpmError, 1))


def main() -> None:
    """Entry point."""
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except SpvtpmError as error:
        if "--json" in sys.argv[1:]:
            told = {"error": error.code, "message": str(error), "hint": error.hint}
            print(msgspec.json.encode(told).decode(), file=sys.stderr)
        else:
            print(f"spvtpm: {error} [{error.code}]\n  {error.hint}", file=sys.stderr)
        sys.exit(next(code for kind, code in _EXIT_CODES if isinstance(error, kind)))
    except OSError as error:  # a full disk, or a pipe whose reader has gone
        sys.stdout = None  # what could not be written is not tried again
        if not isinstance(error, BrokenPipeError):
            print(f"spvtpm: cannot write the output: {error.strerror}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


# The secure processor


@sp_app.command
def init(state: Path, /) -> None:
    """Make a new secure processor in an empty directory: fuses, configuration, NV store.

    Example: spvtpm sp init /var/lib/spvtpm

    Parameters
    ----------
    state
        State directory; made with mode 0700 if it is missing.
    """
    from spvtpm.processor.daemon import initialise

    fuses = initialise(state)
    print(f"secure processor {fuses.chip_id.hex()} made in {state}; run it with: spvtpm sp run {state}")


@sp_app.command
def run(state: Path, /) -> None:
    """Run the secure processor in the foreground until SIGTERM or Ctrl-C. The log goes to stderr.

    Example: spvtpm sp run /var/lib/spvtpm

    Parameters
    ----------
    state
        State directory, made by `spvtpm sp init`.
    """
    import asyncio
    import logging

    from spvtpm.processor.daemon import SecureProcessor

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)

    async def serve() -> None:
        await SecureProcessor(state).run(lambda path: print(f"listening on {path}", flush=True))

    asyncio.run(serve())


@sp_app.command
def status(*, sp: Sp, json: Json = False) -> None:
    """Show how the secure processor is.

    Example: spvtpm sp status --sp /var/lib/spvtpm/run/sp.sock
    """
    reply = _call(sp, messages.GetStatus())
    assert isinstance(reply, messages.Status)  # noqa: S101  # the answer that belongs to the request
    if json:
        _print_json(reply)
        return
    print(f"chip {reply.chip_id}, spvtpm {reply.software}")
    print(f"VMs {reply.vms}, vTPMs active {reply.active}, parked {reply.parked}")
    for sentence in reply.missing_protection:
        print(f"missing protection: {sentence}")


# The hypervisor


def _call(sp: Path, request: messages.Request) -> messages.Reply:
    from spvtpm.hypervisor.sp_client import SecureProcessorClient

    with SecureProcessorClient(sp) as client:
        return client.call(request)


def _print_json(value: object) -> None:
    print(msgspec.json.encode(value).decode())


def _command(sp: Path, request: messages.Request, json: bool) -> None:
    reply = _call(sp, request)
    if json:
        _print_json(reply)
    elif isinstance(reply, messages.VmInfo):
        _print_vms([reply])
    else:
        print("done")


def _print_vms(vms: list[messages.VmInfo]) -> None:
    for vm in vms:
        vtpm = vm.vtpm
        residency = "none" if vtpm is None else vtpm.residency + (", connected" if vtpm.connected else "")
        print(f"{vm.vm_id}  {vm.state}, boot {vm.boots}, vTPM {residency}")
        if vtpm is not None and (vtpm.failure or vtpm.interface):
            print(f"  {vtpm.failure or vtpm.interface}")


@hypervisor_app.command
def launch(vm: Vm, /, *, sp: Sp, without_vtpm: WithoutVtpm = False, json: Json = False) -> None:
    """Make a VM's security block and begin its first boot, with a vTPM.

    Example: spvtpm hypervisor launch 6f1c52ce-34d5-4b6c-8d8f-6c0f3f0e9a11 --sp run/sp.sock
    """
    _command(sp, messages.LaunchVm(vm_id=vm, with_vtpm=not without_vtpm), json)


@hypervisor_app.command
def create_vtpm(vm: Vm, /, *, sp: Sp, json: Json = False) -> None:
    """Make a vTPM for a running VM that has none.

    Example: spvtpm hypervisor create-vtpm 6f1c52ce-34d5-4b6c-8d8f-6c0f3f0e9a11 --sp run/sp.sock
    """
    _command(sp, messages.CreateVtpm(vm_id=vm), json)


@hypervisor_app.command
def start(vm: Vm, /, *, sp: Sp, json: Json = False) -> None:
    """Begin a new boot of a stopped VM.

    Example: spvtpm hypervisor start 6f1c52ce-34d5-4b6c-8d8f-6c0f3f0e9a11 --sp run/sp.sock
    """
    _command(sp, messages.StartVm(vm_id=vm), json)


@hypervisor_app.command
def reset(vm: Vm, /, *, sp: Sp, json: Json = False) -> None:
    """End the boot under way and begin a new one; also what brings a failed vTPM back.

    Example: spvtpm hypervisor reset 6f1c52ce-34d5-4b6c-8d8f-6c0f3f0e9a11 --sp run/sp.sock
    """
    _command(sp, messages.ResetVm(vm_id=vm), json)


@hypervisor_app.command
def stop(vm: Vm, /, *, sp: Sp, json: Json = False) -> None:
    """The VM is powered off: shut its vTPM down in order and take its interface away.

    Example: spvtpm hypervisor stop 6f1c52ce-34d5-4b6c-8d8f-6c0f3f0e9a11 --sp run/sp.sock
    """
    _command(sp, messages.StopVm(vm_id=vm), json)


@hypervisor_app.command
def park(vm: Vm, /, *, sp: Sp, json: Json = False) -> None:
    """Take an active vTPM's process away; its next doorbell wakes it.

    Example: spvtpm hypervisor park 6f1c52ce-34d5-4b6c-8d8f-6c0f3f0e9a11 --sp run/sp.sock
    """
    _command(sp, messages.ParkVtpm(vm_id=vm), json)


@hypervisor_app.command
def wake(vm: Vm, /, *, sp: Sp, json: Json = False) -> None:
    """Give a parked vTPM a process again.

    Example: spvtpm hypervisor wake 6f1c52ce-34d5-4b6c-8d8f-6c0f3f0e9a11 --sp run/sp.sock
    """
    _command(sp, messages.WakeVtpm(vm_id=vm), json)


@hypervisor_app.command
def destroy_vtpm(vm: Vm, /, *, sp: Sp, json: Json = False) -> None:
    """Destroy a VM's vTPM with all its keys and NV, for good.

    Example: spvtpm hypervisor destroy-vtpm 6f1c52ce-34d5-4b6c-8d8f-6c0f3f0e9a11 --sp run/sp.sock
    """
    _command(sp, messages.DestroyVtpm(vm_id=vm), json)


@hypervisor_app.command
def decommission(vm: Vm, /, *, sp: Sp, json: Json = False) -> None:
    """Destroy a VM's security block and its vTPM, for good.

    Example: spvtpm hypervisor decommission 6f1c52ce-34d5-4b6c-8d8f-6c0f3f0e9a11 --sp run/sp.sock
    """
    _command(sp, messages.DecommissionVm(vm_id=vm), json)


@hypervisor_app.command(name="list")
def list_vms(*, sp: Sp, json: Json = False) -> None:
    """List all VMs and their vTPMs.

    Example: spvtpm hypervisor list --sp /var/lib/spvtpm/run/sp.sock --json
    """
    from spvtpm.hypervisor.sp_client import SecureProcessorClient

    with SecureProcessorClient(sp) as client:
        vms = client.list_vms()
    if json:
        _print_json(vms)
    else:
        _print_vms(vms)


# The guest


@guest_app.command
def new_key(path: Path, /) -> None:
    """Write a new VM key, 32 random bytes, mode 0600. The VM and its secure processor must both have it.

    Example: spvtpm guest new-key /var/lib/spvtpm/vm-keys/6f1c52ce-34d5-4b6c-8d8f-6c0f3f0e9a11.key
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


def _host_and_port(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65535:
        raise UsageError(f"{text} is not HOST:PORT with a port from 1 to 65534")
    return host.removeprefix("[").removesuffix("]"), int(port)


if __name__ == "__main__":
    main()
