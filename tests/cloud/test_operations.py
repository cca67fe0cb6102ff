"""Operations begin once, one at a time for each VM, and end once."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import update

from spvtpm.cloud import operations, tables
from spvtpm.cloud.plans import ORDERS_PER_OPERATION, PLANS
from spvtpm.wire.errors import AlreadyExists, NotFound, SpvtpmError, WrongState
from spvtpm.wire.platform_api import NewVm, Operation, OperationKind
from spvtpm.wire.platform_errors import IdempotencyMismatch, NoHost, OperationUnderWay
from spvtpm.wire.problems import problem_of
from tests.cloud.platform_database import PlatformDatabase


def settle(platform: PlatformDatabase, operation: Operation, state: str) -> None:
    """Ends an operation, and says how the VM is then."""
    with platform.engine.begin() as connection:
        assert operations.end(connection, operation.operation_id, None)
        connection.execute(update(tables.vms).where(tables.vms.c.vm_id == operation.vm_id).values(state=state))


def test_a_new_operation_waits_to_be_handed_over(platform: PlatformDatabase) -> None:
    asked = platform.create("one")
    assert (asked.kind, asked.state, asked.steps_done, asked.steps) == ("create", "queued", 0, 2)
    with platform.engine.begin() as connection:
        assert [row.operation_id for row in operations.waiting_for_hand_over(connection, 10)] == [asked.operation_id]
        operations.mark_handed_over(connection, asked.operation_id)
        assert not operations.waiting_for_hand_over(connection, 10)
    assert platform.events(asked.vm_id) == ["asked"]


def test_a_name_is_taken_once_by_each_user(platform: PlatformDatabase) -> None:
    first = platform.create("one")
    with pytest.raises(AlreadyExists, match="one"):
        platform.create("one")
    with pytest.raises(AlreadyExists):
        platform.create("two", vm_id=first.vm_id)
    vm_id = uuid.uuid4()
    platform.submit("create", vm_id, user="bob", new=NewVm(vm_id=vm_id, name="one"))


def test_another_users_vm_is_not_there(platform: PlatformDatabase) -> None:
    asked = platform.create("one")
    settle(platform, asked, "running")
    with pytest.raises(NotFound):
        platform.submit("shutdown", asked.vm_id, user="bob")
    with pytest.raises(NotFound):
        platform.submit("shutdown", uuid.uuid4())


def test_the_same_request_gives_the_same_operation(platform: PlatformDatabase) -> None:
    new = NewVm(vm_id=uuid.uuid4(), name="one")
    asked = platform.submit("create", new.vm_id, new=new, idempotency_key="k")
    assert platform.submit("create", new.vm_id, new=new, idempotency_key="k") == asked
    settle(platform, asked, "running")
    repeated = platform.submit("create", new.vm_id, new=new, idempotency_key="k")
    assert (repeated.operation_id, repeated.state) == (asked.operation_id, "done")
    with pytest.raises(IdempotencyMismatch):
        platform.submit("shutdown", new.vm_id, idempotency_key="k")


def test_of_many_at_once_one_begins_and_the_same_key_finds_it(platform: PlatformDatabase) -> None:
    new = NewVm(vm_id=uuid.uuid4(), name="one")
    with ThreadPoolExecutor(8) as pool:
        create = [pool.submit(platform.submit, "create", new.vm_id, new=new, idempotency_key="k") for _ in range(8)]
        found = {future.result().operation_id for future in create}
        assert len(found) == 1
        settle(platform, create[0].result(), "running")
        stops = [pool.submit(platform.submit, "shutdown", new.vm_id) for _ in range(8)]
        errors = [future.exception() for future in stops]
        assert sum(error is None for error in errors) == 1
        assert all(error is None or isinstance(error, OperationUnderWay) for error in errors)


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("state", ["placed", "running", "stopped", "hibernated", "failed", "away"])
def test_a_kind_begins_in_its_states_alone(platform: PlatformDatabase, kind: OperationKind, state: str) -> None:
    if kind == "create":
        return
    asked = platform.create("one")
    settle(platform, asked, state)
    if state in PLANS[kind].states:
        assert platform.submit(kind, asked.vm_id).kind == kind
    else:
        with pytest.raises(WrongState, match=f"VM one is {state}, so {kind} cannot begin: .*"):
            platform.submit(kind, asked.vm_id)


def test_each_operation_has_numbers_of_its_own_also_for_an_id_tried_again(platform: PlatformDatabase) -> None:
    asked = platform.create("one")
    settle(platform, asked, "running")
    platform.submit("shutdown", asked.vm_id)
    with platform.engine.begin() as connection:
        connection.execute(tables.vms.delete())
    platform.create("one", vm_id=asked.vm_id)
    with platform.engine.connect() as connection:
        query = tables.operations.select().order_by(tables.operations.c.created_s)
        numbers = [row.sequence for row in connection.execute(query)]
    assert numbers == [1, 1 + ORDERS_PER_OPERATION, 1 + 2 * ORDERS_PER_OPERATION]


def test_an_operation_ends_once(platform: PlatformDatabase) -> None:
    asked = platform.create("one")
    with platform.engine.begin() as connection:
        assert operations.is_current(connection, asked.operation_id)
        operations.record_progress(connection, asked.operation_id, step="choosing", steps_done=1)
    now = platform.operation(asked.operation_id)
    assert (now.state, now.step, now.steps_done) == ("running", "choosing", 1)
    problem = problem_of(NoHost("none"))
    with platform.engine.begin() as connection:
        assert operations.end(connection, asked.operation_id, problem)
        assert not operations.end(connection, asked.operation_id, None)
        operations.record_progress(connection, asked.operation_id, step="late", steps_done=2)
        assert not operations.is_current(connection, asked.operation_id)
    now = platform.operation(asked.operation_id)
    assert (now.state, now.step, now.error) == ("failed", "failed", problem)
    vm = platform.vm(asked.vm_id)
    assert vm is not None and vm.operation is None


def test_an_unknown_operation_is_not_found(platform: PlatformDatabase) -> None:
    with pytest.raises(NotFound), platform.engine.connect() as connection:
        operations.read(connection, uuid.uuid4())


def test_what_is_rolled_back_was_never_asked(platform: PlatformDatabase) -> None:
    new = NewVm(vm_id=uuid.uuid4(), name="one")
    with pytest.raises(SpvtpmError), platform.engine.begin() as connection:
        operations.submit(connection, user="ada", kind="create", vm_id=new.vm_id, new=new, request_sha256=b"r" * 32)
        raise SpvtpmError("the answer could not be made")
    assert platform.vm(new.vm_id) is None
