"""One TPM 2.0 per process: power, state in and out, the store callback, locality, cancellation, forks."""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable

import pytest

from spvtpm.engine.errors import (
    Blob,
    CommandTooLong,
    DamagedState,
    EngineBusy,
    EngineInUse,
    LocalityOutOfRange,
    ProfileRefused,
    TpmFailed,
    WrongPowerState,
)
from spvtpm.engine.libtpms import MAX_COMMAND_BYTES, Engine
from tests import tpm_commands as tpm
from tests.throwaway import in_throwaway_process, run_in_child

NV_INDEX = 0x01500001
DIGEST = bytes(range(32))


def ignore(_permanent: bytes) -> None:
    """A store for tests that do not look at it."""


def started(on_permanent_state: Callable[[bytes], None] = ignore) -> Engine:
    engine = Engine(on_permanent_state)
    engine.manufacture()
    tpm.checked(engine.process(tpm.startup()))
    return engine


def endorsement_key(engine: Engine) -> bytes:
    response = engine.process(tpm.create_primary(tpm.ecc_p256(), tpm.ENDORSEMENT))
    tpm.checked(engine.process(tpm.flush_context(tpm.handle_in(response))))
    return tpm.public_in(response)


def draw(engine: Engine) -> bytes:
    return tpm.random_in(engine.process(tpm.get_random(32)))


def read_pcr(engine: Engine, pcr: int) -> bytes:
    return tpm.pcr_in(engine.process(tpm.pcr_read(pcr)))


@pytest.mark.claim("C1")
@in_throwaway_process
def test_manufactured_tpm_wants_startup_then_answers() -> None:
    with Engine(ignore) as engine:
        engine.manufacture()
        assert tpm.response_code(engine.process(tpm.get_random(8))) == tpm.RC_INITIALIZE
        tpm.checked(engine.process(tpm.startup()))
        tpm.checked(engine.process(tpm.self_test()))
        assert draw(engine) != draw(engine)


@in_throwaway_process
def test_two_manufactures_in_one_process_have_different_seeds() -> None:
    keys = []
    for _ in range(2):
        with started() as engine:
            keys.append(endorsement_key(engine))
    assert keys[0] != keys[1]


@pytest.mark.claim("C6a")
@pytest.mark.claim("C6b")
@in_throwaway_process
def test_whole_state_goes_out_and_into_another_process_without_startup() -> None:
    with started() as engine:
        tpm.checked(engine.process(tpm.pcr_extend(7, DIGEST)))
        tpm.checked(engine.process(tpm.nv_define(NV_INDEX, 32)))
        tpm.checked(engine.process(tpm.nv_write(NV_INDEX, DIGEST)))
        before = (endorsement_key(engine), read_pcr(engine, 7))
        permanent, volatile = engine.permanent_state(), engine.volatile_state()

    def elsewhere() -> tuple[tuple[bytes, bytes], bytes]:
        with Engine(ignore) as engine:
            engine.resume(permanent, volatile)
            nv = tpm.nv_content_in(engine.process(tpm.nv_read(NV_INDEX, 32)))
            return (endorsement_key(engine), read_pcr(engine, 7)), nv

    assert run_in_child(elsewhere) == (before, DIGEST)


@in_throwaway_process
def test_cold_boot_needs_startup_keeps_the_key_and_forgets_pcrs() -> None:
    with started() as engine:
        tpm.checked(engine.process(tpm.pcr_extend(7, DIGEST)))
        key, permanent = endorsement_key(engine), engine.permanent_state()
        engine.power_off()
        engine.resume(permanent)
        assert tpm.response_code(engine.process(tpm.get_random(8))) == tpm.RC_INITIALIZE
        tpm.checked(engine.process(tpm.startup()))
        assert endorsement_key(engine) == key
        assert read_pcr(engine, 7) == bytes(32)


@in_throwaway_process
def test_copies_of_one_volatile_state_draw_the_same_numbers_until_reseeded() -> None:
    with started() as engine:
        state = engine.permanent_state(), engine.volatile_state()

    def copy(*, reseeded: bool) -> bytes:
        with Engine(ignore) as engine:
            engine.resume(*state)
            if reseeded:
                engine.reseed()
            return draw(engine)

    assert run_in_child(lambda: copy(reseeded=False)) == run_in_child(lambda: copy(reseeded=False))
    assert run_in_child(lambda: copy(reseeded=True)) != run_in_child(lambda: copy(reseeded=True))


@pytest.mark.parametrize("blob", Blob)
@pytest.mark.parametrize("damage", ["empty", "cut off", "wrong magic"])
@in_throwaway_process
def test_damaged_state_is_refused_and_the_engine_takes_the_good_one(blob: Blob, damage: str) -> None:
    with started() as engine:
        good = {Blob.PERMANENT: engine.permanent_state(), Blob.VOLATILE: engine.volatile_state()}
        damaged = dict(good)
        damaged[blob] = {
            "empty": b"",
            "cut off": good[blob][: len(good[blob]) // 2],
            "wrong magic": bytes(8) + good[blob][8:],
        }[damage]
        engine.power_off()
        with pytest.raises(DamagedState) as refusal:
            engine.resume(damaged[Blob.PERMANENT], damaged[Blob.VOLATILE])
        assert refusal.value.blob is blob
        assert not engine.is_on
        engine.resume(good[Blob.PERMANENT], good[Blob.VOLATILE])
        draw(engine)


@in_throwaway_process
def test_state_that_was_refused_leaves_nothing_behind_for_the_next_manufacture() -> None:
    with started() as engine:
        key, permanent = endorsement_key(engine), engine.permanent_state()
        engine.power_off()
        with pytest.raises(DamagedState):
            engine.resume(permanent, b"no volatile state")
        engine.manufacture()
        tpm.checked(engine.process(tpm.startup()))
        assert endorsement_key(engine) != key


@in_throwaway_process
def test_store_callback_hears_of_nv_changes_and_of_nothing_else() -> None:
    stored: list[bytes] = []

    def stores_of(*commands: bytes) -> int:
        stored.clear()
        for command in commands:
            tpm.checked(engine.process(command))
        return len(stored)

    engine = Engine(stored.append)
    with engine:
        engine.manufacture()
        assert stored
        assert stores_of(tpm.startup()) > 0
        assert stores_of(tpm.get_random(8), tpm.pcr_extend(0, DIGEST), tpm.create_primary(tpm.ecc_p256())) == 0
        assert stores_of(tpm.nv_define(NV_INDEX, 32)) == 1
        assert stores_of(tpm.nv_write(NV_INDEX, DIGEST)) == 1
        assert DIGEST in stored[0]
        assert stored[0] == engine.permanent_state()
        assert stores_of(tpm.nv_undefine(NV_INDEX)) == 1


def test_failed_store_raises_the_callbacks_error_and_the_tpm_fails_in_silence(
    capfd: pytest.CaptureFixture[str],
) -> None:
    class DiskFull(Exception):
        pass

    def fails_to_store() -> None:
        stored: list[bytes] = []

        def store(permanent: bytes) -> None:
            if is_disk_full:
                raise DiskFull
            stored.append(permanent)

        is_disk_full = False
        with started(store) as engine:
            tpm.checked(engine.process(tpm.nv_define(NV_INDEX, 32)))
            is_disk_full = True
            with pytest.raises(DiskFull):
                engine.process(tpm.nv_write(NV_INDEX, DIGEST))
            assert tpm.response_code(engine.process(tpm.get_random(8))) == tpm.RC_FAILURE
            with pytest.raises(TpmFailed):
                engine.permanent_state()

            engine.power_off()
            with pytest.raises(DiskFull):
                engine.resume(stored[-1])
            with pytest.raises(DiskFull):
                engine.manufacture()
            is_disk_full = False
            engine.resume(stored[-1])
            tpm.checked(engine.process(tpm.startup()))
            tpm.checked(engine.process(tpm.nv_write(NV_INDEX, DIGEST)))

    run_in_child(fails_to_store)
    assert capfd.readouterr() == ("", "")  # libtpms would print the command that it failed on


@in_throwaway_process
def test_store_callback_cannot_enter_the_engine() -> None:
    refusals: list[EngineBusy] = []

    def enter(_permanent: bytes) -> None:
        for call in (lambda: engine.process(tpm.get_random(8)), engine.permanent_state, engine.power_off):
            with pytest.raises(EngineBusy) as refusal:
                call()
            refusals.append(refusal.value)

    engine = Engine(enter)
    engine.manufacture()
    tpm.checked(engine.process(tpm.startup()))
    assert len(refusals) >= 6


@in_throwaway_process
def test_second_engine_is_refused_until_the_first_is_closed() -> None:
    with started() as first, pytest.raises(EngineInUse):
        Engine(ignore)
    with started():
        for call in (lambda: first.process(tpm.get_random(8)), first.volatile_state, first.manufacture):
            with pytest.raises(WrongPowerState):
                call()
        first.close()
        first.locality = 3
    with Engine(ignore) as third:
        assert third.locality == 0


@in_throwaway_process
def test_power_state_is_checked() -> None:
    with Engine(ignore) as engine:
        needs_on: list[Callable[[], object]] = [
            lambda: engine.process(tpm.startup()),
            engine.permanent_state,
            engine.volatile_state,
        ]
        needs_off: list[Callable[[], object]] = [
            engine.manufacture,
            lambda: engine.resume(b"?"),
            lambda: engine.set_buffer_size(MAX_COMMAND_BYTES),
        ]
        for call in needs_on:
            with pytest.raises(WrongPowerState):
                call()
        engine.power_off()
        engine.manufacture()
        for call in needs_off:
            with pytest.raises(WrongPowerState):
                call()


@in_throwaway_process
def test_commands_of_any_length_are_answered_or_refused() -> None:
    with started() as engine:
        for size in (0, 1, 9, 10, 11, MAX_COMMAND_BYTES):
            assert tpm.response_code(engine.process(bytes(size))) != tpm.RC_SUCCESS
        with pytest.raises(CommandTooLong):
            engine.process(bytes(MAX_COMMAND_BYTES + 1))
        with pytest.raises(TypeError):
            engine.process(bytearray(tpm.get_random(8)))  # type: ignore[arg-type]
        draw(engine)


@in_throwaway_process
def test_buffer_size_is_clamped_and_told_to_the_tpms_user() -> None:
    with Engine(ignore) as engine:
        assert engine.buffer_size.current == engine.buffer_size.largest == MAX_COMMAND_BYTES
        assert engine.set_buffer_size(1).current == engine.buffer_size.smallest
        assert engine.set_buffer_size(1 << 40).current == MAX_COMMAND_BYTES
        assert engine.set_buffer_size(3968).current == 3968
        engine.manufacture()
        tpm.checked(engine.process(tpm.startup()))
        told = engine.process(tpm.get_capability(tpm.CAP_TPM_PROPERTIES, tpm.PT_MAX_COMMAND_SIZE))
        assert tpm.property_in(told) == 3968


@in_throwaway_process
def test_locality_is_checked_and_bounds_pcr_reset() -> None:
    with started() as engine:
        for outside in (-1, 5, 32, 1 << 40):
            with pytest.raises(LocalityOutOfRange):
                engine.locality = outside
        assert engine.locality == 0
        assert tpm.response_code(engine.process(tpm.pcr_reset(20))) == tpm.RC_LOCALITY
        tpm.checked(engine.process(tpm.pcr_reset(16)))
        engine.locality = 2
        tpm.checked(engine.process(tpm.pcr_reset(20)))


@in_throwaway_process
def test_physical_presence_is_never_asserted() -> None:
    with started() as engine:
        assert tpm.base_code(engine.process(tpm.pp_commands(0x126))) == tpm.RC_PP


@in_throwaway_process
def test_running_command_is_cancelled_from_another_thread() -> None:
    with started() as engine:
        tpm.checked(engine.process(tpm.self_test()))
        is_done = threading.Event()

        def keep_cancelling() -> None:
            while not is_done.is_set():
                engine.cancel()

        canceller = threading.Thread(target=keep_cancelling)
        canceller.start()
        codes: list[int] = []
        try:
            while len(codes) < 20 and tpm.RC_CANCELED not in codes:
                template = tpm.rsa2048(unique=bytes([len(codes)]) * 256)
                response = engine.process(tpm.create_primary(template))
                codes.append(tpm.response_code(response))
                if codes[-1] == tpm.RC_SUCCESS:
                    tpm.checked(engine.process(tpm.flush_context(tpm.handle_in(response))))
        finally:
            is_done.set()
            canceller.join()
        assert codes[-1] == tpm.RC_CANCELED
        engine.cancel()  # with no command running: lost
        tpm.checked(engine.process(tpm.create_primary(tpm.rsa2048())))


@in_throwaway_process
def test_other_threads_are_turned_away_while_a_command_runs() -> None:
    """The store callback holds the first command inside libtpms while another thread tries."""
    is_inside, may_leave = threading.Event(), threading.Event()

    def store(_permanent: bytes) -> None:
        if is_slow:
            is_inside.set()
            assert may_leave.wait(10)

    is_slow = False
    with started(store) as engine:
        is_slow = True
        codes: list[int] = []
        worker = threading.Thread(
            target=lambda: codes.append(tpm.response_code(engine.process(tpm.nv_define(NV_INDEX, 32))))
        )
        worker.start()
        assert is_inside.wait(10)
        try:
            for call in (lambda: engine.process(tpm.get_random(8)), engine.volatile_state, engine.power_off):
                with pytest.raises(EngineBusy):
                    call()
        finally:
            may_leave.set()
            worker.join()
        assert codes == [tpm.RC_SUCCESS]
        draw(engine)


@in_throwaway_process
def test_children_forked_after_warm_up_are_independent_and_open_no_file() -> None:
    Engine.warm_up()

    def child() -> tuple[bytes, bytes]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
        with started() as engine:
            tpm.checked(engine.process(tpm.self_test()))
            return draw(engine), endorsement_key(engine)

    randoms, keys = zip(*(run_in_child(child) for _ in range(4)), strict=True)
    assert len(set(randoms)) == len(set(keys)) == 4


@in_throwaway_process
def test_profile_is_refused_by_a_library_without_profiles() -> None:
    assert Engine.version() >= (0, 9, 0)
    with Engine(ignore) as engine:
        with pytest.raises(ProfileRefused):
            engine.manufacture('{"Name":"no such profile"}')
        assert not engine.is_on
        engine.manufacture('{"Name":"null"}' if Engine.supports_profiles() else None)
