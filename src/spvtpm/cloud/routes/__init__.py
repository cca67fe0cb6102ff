"""The routes that answer at once, by what they are about. `api.py` and `openapi.py` come in."""

from __future__ import annotations

from spvtpm.cloud.routes.administration import ADMINISTRATION
from spvtpm.cloud.routes.lookups import LOOKUPS
from spvtpm.cloud.routes.vms import VMS

ROUTES = (*VMS, *LOOKUPS, *ADMINISTRATION)
