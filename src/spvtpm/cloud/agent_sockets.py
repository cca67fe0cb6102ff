"""WebSockets to hosts' agents: their frames are ciphertext to us. Relays come in."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

from websockets.asyncio.client import ClientConnection, connect, unix_connect
from websockets.exceptions import InvalidStatus, WebSocketException

from spvtpm.wire.decoding import printable
from spvtpm.wire.introductions import MAX_CHANNEL_FRAME_BYTES
from spvtpm.wire.platform_errors import NoSuchToken, Unavailable
from spvtpm.wire.problems import MAX_PROBLEM_BYTES, error_of

if TYPE_CHECKING:
    from spvtpm.cloud.host_addresses import AgentAddress

_OPEN_S: Final = 10.0
CLOSE_S: Final = 2.0
_QUEUED_FRAMES: Final = 4

logger = logging.getLogger(__name__)


async def connect_agent(agent: AgentAddress, path: str, close_s: float = CLOSE_S) -> ClientConnection:
    """A WebSocket to a host's agent. It takes no more frames than are taken from it.

    Args:
        agent: of the host.
        path: at that agent, with its query.
        close_s: how long the agent may take to close it; what it has not taken until then is lost.

    Raises:
        Unavailable: the agent cannot be reached.
        SpvtpmError: what the agent answers instead.
    """
    options: dict[str, Any] = {
        "additional_headers": {"Authorization": f"Bearer {agent.token}"},
        "compression": None,  # ciphertext
        "max_size": MAX_CHANNEL_FRAME_BYTES,
        "max_queue": _QUEUED_FRAMES,
        "open_timeout": _OPEN_S,
        "close_timeout": close_s,
        "user_agent_header": None,
    }
    try:
        if agent.address.startswith("unix:"):
            return await unix_connect(agent.address.removeprefix("unix:"), f"ws://agent{path}", **options)
        scheme, _, rest = agent.address.partition("://")
        url = f"{'wss' if scheme == 'https' else 'ws'}://{rest}{path}"
        return await connect(url, proxy=None, **options)
    except InvalidStatus as refusal:
        error = error_of(bytes(refusal.response.body or b"")[:MAX_PROBLEM_BYTES], refusal.response.status_code)
        if isinstance(error, NoSuchToken):  # ours, and nothing that the user could do anything about
            raise Unavailable(f"host {agent.host} does not know this platform") from None
        raise error from None
    except (OSError, TimeoutError, WebSocketException, ValueError) as error:
        logger.warning("host %s cannot be reached: %s", agent.host, printable(str(error)[:200]))
        raise Unavailable(f"host {agent.host} cannot be reached") from None
