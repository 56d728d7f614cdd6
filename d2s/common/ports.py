"""Finds free TCP ports on this machine."""

import socket


def free_port() -> int:
    """Returns a port that is free on 127.0.0.1 now. Another process can take the port at any time."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
