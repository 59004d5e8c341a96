"""The gateway's event loop."""

from typing import Any

import uvloop

HANDSHAKE_TIMEOUT_S = 10.0


class GatewayLoop(uvloop.Loop):
    """uvloop's, with less patience for TLS handshakes: until one is made, no limit of connections counts its client."""

    async def create_server(self, *args: Any, ssl: Any = None, **options: Any) -> Any:
        """Starts a server, as asyncio does."""
        if ssl is not None:
            options["ssl_handshake_timeout"] = HANDSHAKE_TIMEOUT_S
        return await super().create_server(*args, ssl=ssl, **options)
