"""The system call filter: `worker_syscalls.toml` made into a program that the kernel runs."""

from __future__ import annotations

import errno
import os
from importlib.resources import files
from typing import Annotated

import msgspec
from msgspec import Meta

from spvtpm.processor.worker._linux import ffi, lib
from spvtpm.processor.worker.linux import check


class Condition(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A condition on one argument: `argument & mask == value`.

    Attributes:
        argument: 0 to 5.
        mask: which bits count.
        value: what they must be.
    """

    argument: Annotated[int, Meta(ge=0, le=5)]
    mask: Annotated[int, Meta(ge=0)]
    value: Annotated[int, Meta(ge=0)]


class Allowed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A system call that is allowed, on conditions; `reason` where it is unusual for such a process."""

    name: str
    reason: str = ""
    when: list[Condition] = []


class Refused(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A system call that fails with an error instead of killing, because a library tries it and can do without.

    On conditions, if it is allowed on others; the two must exclude each other.
    """

    name: str
    error: str
    reason: str
    when: list[Condition] = []


class Rules(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file. What it does not name kills the process."""

    allow: list[Allowed]
    refuse: list[Refused]


def load_rules() -> Rules:
    """The rules that come with the package."""
    return msgspec.toml.decode(files(__package__).joinpath("worker_syscalls.toml").read_bytes(), type=Rules)


def system_call_number(name: str) -> int | None:
    """The number on this machine, or None if this architecture has no such call.

    Raises:
        ValueError: no architecture has.
    """
    number: int = lib.seccomp_syscall_resolve_name(name.encode())
    if number == -1:
        raise ValueError(f"there is no system call {name}")
    return number if number >= 0 else None


def compile_filter(rules: Rules) -> bytes:
    """The rules as a BPF program for this machine. Done once, before any worker is forked.

    Raises:
        OSError: libseccomp refuses a rule.
    """
    context = lib.seccomp_init(lib.SCMP_ACT_KILL_PROCESS)
    try:
        # Else a call by another architecture's numbers would end one thread only, and the others would go on.
        _checked(lib.seccomp_attr_set(context, lib.SCMP_FLTATR_ACT_BADARCH, lib.SCMP_ACT_KILL_PROCESS), "foreign calls")
        for allowed in rules.allow:
            _add(context, lib.SCMP_ACT_ALLOW, allowed.name, allowed.when)
        for refused in rules.refuse:
            _add(context, lib.linux_act_errno(getattr(errno, refused.error)), refused.name, refused.when)
        memory = os.memfd_create("filter", os.MFD_CLOEXEC)
        with os.fdopen(memory, "r+b") as file:
            _checked(lib.seccomp_export_bpf(context, memory), "seccomp_export_bpf")
            file.seek(0)
            return file.read()
    finally:
        lib.seccomp_release(context)


def _add(context: object, action: int, name: str, conditions: list[Condition]) -> None:
    number = system_call_number(name)
    if number is None:
        return
    comparisons = ffi.new("struct scmp_arg_cmp[]", max(1, len(conditions)))
    for comparison, condition in zip(comparisons, conditions, strict=False):
        comparison.arg = condition.argument
        comparison.op = lib.SCMP_CMP_MASKED_EQ
        comparison.datum_a = condition.mask
        comparison.datum_b = condition.value
    _checked(lib.seccomp_rule_add_array(context, action, number, len(conditions), comparisons), name)


def _checked(result: int, what: str) -> None:
    if result < 0:
        raise OSError(-result, f"seccomp rule for {what}: {os.strerror(-result)}")


def load_filter(program: bytes) -> None:
    """Puts the filter over all threads of this process, for good. Needs no-new-privileges.

    Raises:
        OSError: the kernel refuses; do not go on.
    """
    check(lib.linux_seccomp_load(program, len(program)), "seccomp")
