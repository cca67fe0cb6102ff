"""The rules by which the terminal knows where a vTPM lives: any history of answers, against what really happened."""

from __future__ import annotations

import hashlib
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from msgspec.structs import replace

from spvtpm.terminal.whereabouts import (
    AtChip,
    Destroyed,
    Exporting,
    Importing,
    InFile,
    Known,
    Place,
    after_fate,
    check_import,
    describe,
)
from spvtpm.wire.errors import StaleInstance
from spvtpm.wire.instance_header import InstanceHeader
from spvtpm.wire.owner_messages import Fate

VTPM, VM = uuid.UUID(int=1), uuid.UUID(int=2)
CHIPS = (b"first chip of 16", b"other chip of 16")


def sha(version: int) -> bytes:
    return hashlib.sha256(str(version).encode()).digest()


def header(version: int) -> InstanceHeader:
    return InstanceHeader(VTPM, VM, b"fleet of sixteen", version, 1, 0, hibernated=False)


def known(place: Place, newest: int = 5) -> Known:
    return Known(VTPM, VM, "", newest, place)


def fate(state: str, version: int = 0, sha256: bytes | None = None, chip: bytes | None = None) -> Fate:
    return Fate(vtpm_id=VTPM, state=state, version=version, sha256=sha256, chip=chip)  # type: ignore[arg-type]


def test_a_vtpm_that_nobody_knows_may_be_imported() -> None:
    check_import(None, header(1), sha(1))


@pytest.mark.attack("A08")
@pytest.mark.claim("B3")
def test_an_older_file_than_was_seen_is_refused_with_the_version_that_was_expected() -> None:
    in_file = known(InFile(5, sha(5), "/f"))
    check_import(in_file, header(5), sha(5))
    check_import(in_file, header(6), sha(6))  # another keyring of this owner has exported it since
    with pytest.raises(StaleInstance, match=r"version 4 .* expected was 5 or newer"):
        check_import(in_file, header(4), sha(4))


@pytest.mark.attack("A09")
@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        (AtChip(CHIPS[0]), "lives at the chip"),
        (Exporting(CHIPS[0], 5, sha(5), "/f"), "has not ended"),
        (Importing(CHIPS[0], 5, sha(5), None), "was broken off; ask there first"),
        (Destroyed(), "was destroyed"),
    ],
)
def test_a_vtpm_that_lives_elsewhere_is_not_imported(place: Place, sentence: str) -> None:
    with pytest.raises(StaleInstance, match=sentence):
        check_import(known(place), header(5), sha(5))
    with pytest.raises(StaleInstance):
        check_import(known(place), header(99), sha(99))


def test_another_file_of_the_same_version_is_refused() -> None:
    with pytest.raises(StaleInstance, match="is not the file that was exported"):
        check_import(known(InFile(5, sha(5), "/f")), header(5), sha(6))


def test_every_place_has_words() -> None:
    places: list[Place] = [AtChip(CHIPS[0]), InFile(1, sha(1), "/f"), InFile(1, sha(1), ""), Destroyed()]
    places += [Exporting(CHIPS[0], 1, sha(1), "/f"), Importing(CHIPS[0], 1, sha(1), None)]
    assert len({describe(place) for place in places}) == len(places)


def test_an_acknowledged_export_ends_in_its_file() -> None:
    exporting = known(Exporting(CHIPS[0], 6, sha(6), "/f"))
    after = after_fate(exporting, fate("exported", 6, sha(6)), CHIPS[0])
    assert after == known(InFile(6, sha(6), "/f"), newest=6)


def test_an_export_that_was_never_acknowledged_leaves_the_vtpm_where_it_is() -> None:
    exporting = known(Exporting(CHIPS[0], 6, sha(6), "/f"))
    assert after_fate(exporting, fate("here", 6), CHIPS[0]) == replace(exporting, newest=6)
    moved = after_fate(exporting, fate("here", 6), CHIPS[1])
    assert moved is not None
    assert isinstance(moved.place, Exporting)
    assert moved.place.chip_id == CHIPS[1]


def test_an_export_by_another_keyring_is_noticed() -> None:
    for place in (Exporting(CHIPS[0], 6, sha(6), "/f"), AtChip(CHIPS[0])):
        after = after_fate(known(place), fate("exported", 7, sha(7)), CHIPS[0])
        assert after == known(InFile(7, sha(7), ""), newest=7)


@pytest.mark.parametrize(
    "told", [fate("unknown"), fate("exported", 5, sha(5)), fate("exported", 3, sha(3))], ids=lambda told: told.state
)
def test_an_import_that_never_came_leaves_what_was_before(told: Fate) -> None:
    before = InFile(5, sha(5), "/f")
    assert after_fate(known(Importing(CHIPS[0], 5, sha(5), before)), told, CHIPS[0]) == known(before)


def test_a_first_import_that_was_refused_leaves_nothing_that_a_forged_header_could_poison() -> None:
    importing = known(Importing(CHIPS[0], 1 << 62, sha(0), None), newest=0)
    assert after_fate(importing, fate("unknown"), CHIPS[0]) is None
    left = after_fate(importing, fate("exported", 7, sha(7)), CHIPS[0])
    assert left == known(InFile(7, sha(7), ""), newest=7)


def test_an_import_that_was_made_is_at_its_chip() -> None:
    importing = known(Importing(CHIPS[0], 5, sha(5), InFile(5, sha(5), "/f")))
    assert after_fate(importing, fate("here", 5), CHIPS[0]) == known(AtChip(CHIPS[0]))


@pytest.mark.claim("C8")
def test_a_vtpm_that_was_handed_on_is_at_the_chip_that_has_it() -> None:
    told = fate("migrated", 5, chip=CHIPS[1])
    for place in (AtChip(CHIPS[0]), Importing(CHIPS[0], 5, sha(5), None)):
        assert after_fate(known(place), told, CHIPS[0]) == known(AtChip(CHIPS[1]))
    left = after_fate(known(Exporting(CHIPS[0], 5, sha(5), "/f")), told, CHIPS[0])
    assert left == known(Exporting(CHIPS[1], 5, sha(5), "/f"))  # void, and to be removed
    assert after_fate(known(AtChip(CHIPS[0])), fate("migrated", 5), CHIPS[0]) == known(AtChip(CHIPS[0]))


@pytest.mark.claim("C8")
def test_a_move_from_before_an_import_is_not_taken_for_one_behind_it() -> None:
    before = InFile(5, sha(5), "/f")
    told = fate("migrated", 4, chip=CHIPS[1])
    assert after_fate(known(Importing(CHIPS[0], 5, sha(5), before)), told, CHIPS[0]) == known(before)


@given(
    place=st.sampled_from(
        [
            AtChip(CHIPS[0]),
            InFile(5, sha(5), "/f"),
            Exporting(CHIPS[0], 5, sha(5), "/f"),
            Importing(CHIPS[0], 5, sha(5), None),
            Destroyed(),
        ]
    ),
    state=st.sampled_from(["exported", "destroyed", "unknown", "migrated"]),
    version=st.integers(0, 9),
)
def test_what_another_chip_tells_of_the_past_changes_no_place(place: Place, state: str, version: int) -> None:
    after = after_fate(known(place), fate(state, version, sha(version), CHIPS[1]), CHIPS[1])
    assert after == known(place, newest=max(5, version))


class Lives(RuleBasedStateMachine):
    """A vTPM between two chips and files, a terminal that dies before any step is written down, and what it then believes."""

    def __init__(self) -> None:
        super().__init__()
        self.version = 0
        self.at: bytes | None = CHIPS[0]  # the truth
        self.file: int | None = None
        self.ledgers: dict[bytes, Fate] = {}
        self.known: Known | None = Known(VTPM, VM, "", 0, AtChip(CHIPS[0]))

    def told(self, chip: bytes) -> Fate:
        if self.at == chip:
            return fate("here", self.version)
        return self.ledgers.get(chip, fate("unknown"))

    @rule(chip=st.sampled_from(CHIPS))
    def ask(self, chip: bytes) -> None:
        assert self.known is not None
        self.known = after_fate(self.known, self.told(chip), chip)

    @precondition(lambda self: self.at is not None)
    @rule(dies=st.sampled_from(["before", "unacknowledged", "acknowledged", "never"]))
    def export(self, dies: str) -> None:
        assert self.at is not None and self.known is not None
        self.version += 1
        if dies == "before":
            return
        chip, version = self.at, self.version
        self.known = replace(self.known, newest=version, place=Exporting(chip, version, sha(version), "/f"))
        if dies == "unacknowledged":
            return
        self.at, self.file = None, version
        self.ledgers[chip] = fate("exported", version, sha(version))
        if dies == "never":
            self.known = replace(self.known, place=InFile(version, sha(version), "/f"))

    @precondition(lambda self: self.version > 0)
    @rule(chip=st.sampled_from(CHIPS), dies=st.sampled_from(["unsent", "unheard", "never"]), data=st.data())
    def bring(self, chip: bytes, dies: str, data: st.DataObject) -> None:
        version = data.draw(st.integers(1, self.version))
        place = self.known.place if self.known is not None else None
        if isinstance(place, Importing) and place.chip_id == chip:
            self.ask(chip)
        try:
            check_import(self.known, header(version), sha(version))
        except StaleInstance:
            return
        assert (self.at, self.file) == (None, version), "a second life, or an older one"
        assert self.known is not None
        before = self.known.place if isinstance(self.known.place, InFile) else None
        self.known = replace(self.known, place=Importing(chip, version, sha(version), before))
        if dies == "unsent":
            return
        self.at, self.file = chip, None
        if dies == "never":
            self.known = replace(self.known, place=AtChip(chip))

    @precondition(lambda self: self.at is not None)
    @rule(chip=st.sampled_from(CHIPS))
    def migrate(self, chip: bytes) -> None:
        """Whoever does it, its owner is not asked."""
        if self.at is not None and chip != self.at:
            self.ledgers[self.at] = fate("migrated", self.version, chip=chip)
            self.at = chip

    @invariant()
    def it_is_never_believed_to_be_in_a_file_while_it_lives(self) -> None:
        assert self.known is not None
        if isinstance(self.known.place, InFile):
            assert self.at is None
            assert self.known.place.version == self.file

    @invariant()
    def questions_to_the_chips_that_are_named_are_enough(self) -> None:
        settled = self.known
        assert settled is not None
        while isinstance(settled.place, (Exporting, Importing, AtChip)):
            before = settled.place
            settled = after_fate(settled, self.told(before.chip_id), before.chip_id)
            assert settled is not None
            if settled.place == before:
                break
        assert isinstance(settled.place, InFile) == (self.at is None)
        assert self.at in (None, getattr(settled.place, "chip_id", None))


TestLives = Lives.TestCase
