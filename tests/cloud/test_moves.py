"""VMs move between hosts: by hand, or because a host is drained. In the end exactly one runs each, and the row says which."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from spvtpm.cloud import handoffs
from spvtpm.cloud.duties import Duties
from spvtpm.wire.platform_api import Operation, Wants
from tests.cloud.agent_double import AgentDouble
from tests.cloud.moving_double import FRAME
from tests.cloud.platform_database import PlatformDatabase
from tests.cloud.waiting import done, eventually, online, running_vm, state
