"""User ids of VMs: one for each, never one for two."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from spvtpm.hypervisor.vm_users import VmUsers
from spvtpm.wire.errors import ResourceError


class Reachable(VmUsers):
    """As on a host whose other users can run the program."""

    def _why_not(self, uid: int) -> str:  # noqa: ARG002
        return ""


@pytest.mark.attack("A27")
@pytest.mark.skipif(os.geteuid() != 0, reason="giving files away needs root")
def test_no_two_vms_have_the_same_user_and_the_last_but_one_is_the_last(tmp_path: Path) -> None:
    users = Reachable(tmp_path, (200_000, 2))
    for name, expected in (("a", 200_000), ("b", 200_001)):
        uid = users.next_uid()
        assert uid == expected
        (tmp_path / name / "machine").mkdir(parents=True)
        os.chown(tmp_path / name / "machine", uid, -1)
    with pytest.raises(ResourceError, match="are taken"):
        users.next_uid()
