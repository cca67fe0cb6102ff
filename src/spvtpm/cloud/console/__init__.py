"""The platform's web page: what it knows, for people to look at. It changes nothing but who is logged in. The API comes in.

Whatever needs a secret happens in the owner's terminal; the page says what to type there.
"""

from __future__ import annotations

from spvtpm.cloud.console.routes import build_console

__all__ = ["build_console"]
