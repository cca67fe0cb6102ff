"""`spvtpm hypervisor`: what a hypervisor asks of its host's secure processor."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from spvtpm.cli.endorsements import Output, show_endorsement
from spvtpm.cli.parts import Json, Sp, call_sp, print_json
from spvtpm.wire import messages
from spvtpm.wire.errors import ResourceError

hypervisor_app = App(name="hypervisor", help="What a hypervisor asks of its host's secure processor.")

Vm = Annotated[uuid.UUID, Parameter(help="The VM's id, a UUID.")]
Emulator = Annotated[
    bool, Parameter(negative="", help="By the TPM emulator interface, for QEMU, if the VM's owner allows it.")
]
WithoutVtpm = Annotated[bool, Parameter(negative="", help="Make none; `create-vtpm` can later.")]


def _command(sp: Path, request: messages.Request, json: bool) -> None:
    reply = call_sp(sp, request)
    if json:
        print_json(reply)
    elif isinstance(reply, messages.VmInfo):
        _print_vms([reply])


def _print_vms(vms: list[messages.VmInfo]) -> None:
    for vm in vms:
        vtpm = vm.vtpm
        residency = "none" if vtpm is None else vtpm.residency + (", connected" if vtpm.connected else "")
        print(f"{vm.vm_id}  {vm.state}, boot {vm.boots}, vTPM {residency}")
        if vtpm is not None and (vtpm.failure or vtpm.interface):
            print(f"  {vtpm.failure or vtpm.interface}")


@hypervisor_app.command
def admit(vm: Vm, /, *, sp: Sp) -> None:
    """Announce a VM, so that its owner can provision it where `admission_required` is set.

    Example: spvtpm hypervisor admit 6f1c52ce-34d5-4b6c-8d8f-6c0f3f0e9a11 --sp run/sp.sock
    """
    call_sp(sp, messages.AdmitVm(vm_id=vm))


@hypervisor_app.command
def launch(
    vm: Vm, /, *, sp: Sp, without_vtpm: WithoutVtpm = False, emulator: Emulator = False, json: Json = False
) -> None:
    """Begin the first boot of a VM that its owner has provisioned, with its vTPM.

    Example: spvtpm hypervisor launch 6f1c52ce-34d5-4b6c-8d8f-6c0f3f0e9a11 --sp run/sp.sock
    """
    _command(sp, messages.LaunchVm(vm_id=vm, with_vtpm=not without_vtpm, emulated=emulator), json)


@hypervisor_app.command
def create_vtpm(vm: Vm, /, *, sp: Sp, json: Json = False) -> None:
    """Make a vTPM for a running VM that has none.

    Example: spvtpm hypervisor create-vtpm 6f1c52ce-34d5-4b6c-8d8f-6c0f3f0e9a11 --sp run/sp.sock
    """
    _command(sp, messages.CreateVtpm(vm_id=vm), json)


@hypervisor_app.command
def start(vm: Vm, /, *, sp: Sp, emulator: Emulator = False, json: Json = False) -> None:
    """Begin a new boot of a stopped VM; a hibernated one goes on where it was.

    Example: spvtpm hypervisor start 6f1c52ce-34d5-4b6c-8d8f-6c0f3f0e9a11 --sp run/sp.sock
    """
    _command(sp, messages.StartVm(vm_id=vm, emulated=emulator), json)


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
def hibernate(vm: Vm, /, *, sp: Sp, json: Json = False) -> None:
    """Take a suspended VM's vTPM out of memory, whole; `start` goes on where it was, or its owner exports it.

    Example: spvtpm hypervisor hibernate 6f1c52ce-34d5-4b6c-8d8f-6c0f3f0e9a11 --sp run/sp.sock
    """
    _command(sp, messages.HibernateVm(vm_id=vm), json)


@hypervisor_app.command
def endorsement(vm: Vm, /, *, sp: Sp, output: Output = None, json: Json = False) -> None:
    """Fetch the certificates of a vTPM's endorsement keys, and the chain of the chip that signed them.

    Example: spvtpm hypervisor endorsement 6f1c52ce-34d5-4b6c-8d8f-6c0f3f0e9a11 --sp run/sp.sock --output certificates
    """
    reply = call_sp(sp, messages.GetEndorsement(vm_id=vm))
    if not isinstance(reply, messages.Endorsement):
        raise ResourceError("the secure processor gave another answer than certificates")
    show_endorsement(reply, json=json, output=output)


@hypervisor_app.command(name="list")
def list_vms(*, sp: Sp, json: Json = False) -> None:
    """List all VMs and their vTPMs.

    Example: spvtpm hypervisor list --sp /var/lib/spvtpm/run/sp.sock --json
    """
    from spvtpm.hypervisor.sp_client import SecureProcessorClient

    with SecureProcessorClient(sp) as client:
        vms = client.list_vms()
    if json:
        print_json(vms)
    else:
        _print_vms(vms)
