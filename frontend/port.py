"""A socket bound to the server's port: the launcher tries it, the frontend keeps it. Nothing listens yet."""

import errno
import socket
import time

# A server that has just been killed may hold its port for a moment.
_PATIENCE_S = 2.0


def bind(host: str, port: int) -> socket.socket:
    """Waits for a port that is in use to become free. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    # Of a name such as localhost, clients expect the IPv4 address.
    family, kind, protocol, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        listener = socket.socket(family, kind, protocol)
        try:
            # Without it a restart would have to wait for the old connections' TIME_WAIT to pass.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            return listener
        except OSError as error:
            listener.close()
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise
            time.sleep(0.1)
