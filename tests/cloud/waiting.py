"""Waits for what the platform does by itself, and for operations that have to end well."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable

from spvtpm.wire.platform_api import Operation
from tests.cloud.agent_double import AgentDouble
from tests.cloud.platform_database import PlatformDatabase


def eventually(holds: Callable[[], object], within_s: float = 60.0) -> None:
    """Waits for something that the platform does by itself."""
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def online(platform: PlatformDatabase, host: str = "h1") -> None:
    """Waits until the host was looked at."""
    eventually(lambda: platform.host(host).report is not None and not platform.host(host).failure)


def done(platform: PlatformDatabase, operation: Operation) -> Operation:
    """The operation, which has to end well."""
    ended = platform.ended(operation)
    assert ended.state == "done", ended.error
    assert ended.steps_done == ended.steps
    return ended


def state(platform: PlatformDatabase, vm_id: uuid.UUID) -> str:
    """Of a VM."""
    vm = platform.vm(vm_id)
    assert vm is not None
    return str(vm.state)


def running_vm(platform: PlatformDatabase, agent: AgentDouble, name: str = "one") -> uuid.UUID:
    """A VM that runs at a host that is online."""
    vm_id = done(platform, platform.create(name)).vm_id
    agent.provision(vm_id)
    done(platform, platform.submit("start", vm_id))
    assert state(platform, vm_id) == "running"
    return vm_id
