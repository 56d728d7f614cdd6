"""A dead worker ends the job: every worker notices within seconds, and leaves with a non-zero code.

A collective whose partner is gone may wait for the process group's timeout, half an hour, or for ever on a GPU; and
no launcher minds a worker that exits with 0 in the middle. So every worker holds one idle TCP connection to the
first, who tells the others when one of them closes without a farewell. The kernel closes it whatever ends the
process, and keeps it open while a process is only slow or stopped in a debugger; keepalives find a dead machine.

What ends a job is shown last: the worker that failed has said why, and its fellows leave in silence. Of one that
was killed, or left without a word, the lowest surviving rank speaks.
"""

import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
import warnings

from torch.distributed.distributed_c10d import _get_default_store

_GRACE = 2.0
"""Seconds for which survivors stay, so that a launcher meets the worker that failed before those that follow it."""
_CONNECT = 20.0
_LONGEST = 60
_KEEPALIVE = {socket.TCP_KEEPIDLE: 5, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 3}


class Watch:
    """This worker's end: the connections of all others for rank 0, the one to rank 0 for the others."""

    def __init__(self, rank: int, connections: dict[int, socket.socket]) -> None:
        self._rank = rank
        self._connections = connections
        self._told: dict[int, int] = {}
        self._leaving = False
        self._gone = threading.Event()
        threading.Thread(target=self._listen, name="watch", daemon=True).start()
        # A loader process that outlives this one must not hold its connections open.
        os.register_at_fork(after_in_child=self._close)

    def _close(self) -> None:
        for connection in self._connections.values():
            connection.close()

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    line = _line(key.fileobj)
                    if line is None or line == "bye":
                        selector.unregister(key.fileobj)
                    self._hear(key.data, line)

    def _hear(self, sender: int, line: str | None) -> None:
        """One line of a fellow's: `bye`, `told CODE`, of the first also `gone RANK CODE`; None at its end."""
        if line is None and not self._leaving:
            self._end(sender, self._told.get(sender, 0))
        elif line and line.startswith("told"):
            self._told[sender] = int(line.split()[1])
        elif line and line.startswith("gone"):
            self._end(*map(int, line.split()[1:]))

    def _end(self, gone: int, code: int) -> None:
        """Ends this process because worker `gone` left, with a `code` other than 0 if it said why."""
        self._gone.set()
        if self._rank == 0:
            self._send(f"gone {gone} {code}")
        time.sleep(_GRACE)
        if self._leaving:
            return
        if not code and self._rank == (1 if gone == 0 else 0):
            print(
                f"train.py: error: worker {gone} left without a word (killed, out of memory, or an early exit), so "
                "all others end; --resume goes on from the newest checkpoint",
                file=sys.stderr,
                flush=True,
            )
        os._exit(code or 1)

    def _send(self, line: str) -> None:
        for connection in self._connections.values():
            try:
                connection.sendall(f"{line}\n".encode())
            except OSError:
                continue  # its own end has come too

    def exit_if_another_failed(self) -> None:
        """Returns where this worker's failure is its own; where a fellow's end caused it, this process ends here."""
        if self._gone.wait(1.0):
            time.sleep(2 * _GRACE)

    def tell(self, code: int) -> None:
        """Lets the others know that this worker has said why it leaves with `code`."""
        self._leaving = True
        self._send(f"gone 0 {code}" if self._rank == 0 else f"told {code}")

    def farewell(self) -> None:
        """Lets the others know that this worker is done, as they are."""
        self._leaving = True
        self._send("bye")


def _line(connection: socket.socket) -> str | None:
    """The next line, or None where the connection has ended. Lines are short, and come whole or not at all."""
    read = b""
    try:
        while not read.endswith(b"\n") and len(read) < _LONGEST:
            part = connection.recv(1)
            if not part:
                return None
            read += part
    except OSError:
        return None
    return read.decode(errors="replace").rstrip("\n")


def start_watch(rank: int, world: int) -> Watch | None:
    """Connects all workers; they call it together. None where there is just one, or where no connection is to be had.

    Warns where the first worker cannot be reached.
    """
    if world == 1:
        return None
    listener = _listener() if rank == 0 else None
    # Through the store and not by a collective: the first of NCCL's may wait for a dead worker without end.
    store = _get_default_store()
    if listener:
        store.set("d2s/watch", json.dumps([_addresses(), listener.getsockname()[1], secrets.token_hex(16)]))
    addresses, port, token = json.loads(store.get("d2s/watch"))
    if listener:
        with listener:
            connections = _accept(listener, world, token)
    else:
        connections = _connect(addresses, port, f"{token} {rank}\n")
    for connection in connections.values():
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, seconds in _KEEPALIVE.items():
            connection.setsockopt(socket.IPPROTO_TCP, option, seconds)
    return Watch(rank, connections)


def _listener() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _addresses() -> list[str]:
    """Where the first worker may be reached: the launcher's address, or its own on the way to that one."""
    master = os.environ["MASTER_ADDR"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing
        try:
            probe.connect((master, 9))
        except OSError:
            return [master]
        return [master, probe.getsockname()[0]]


def _accept(listener: socket.socket, world: int, token: str) -> dict[int, socket.socket]:
    """The connections of all workers that come in time, by rank; whoever does not know the token is turned away."""
    connections: dict[int, socket.socket] = {}
    deadline = time.monotonic() + _CONNECT + 5
    while len(connections) < world - 1 and time.monotonic() < deadline:
        listener.settimeout(max(0.1, deadline - time.monotonic()))
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            break
        connection.settimeout(5)
        said, _, rank = (_line(connection) or "").partition(" ")
        if secrets.compare_digest(said.encode(), token.encode()):
            connection.sendall(b"welcome\n")
            connections[int(rank)] = connection
        else:
            connection.close()
    return connections


def _connect(addresses: list[str], port: int, greeting: str) -> dict[int, socket.socket]:
    """The connection to the first worker, under its rank; none where it cannot be reached."""
    for address in addresses:
        try:
            connection = socket.create_connection((address, port), timeout=_CONNECT / len(addresses))
            connection.sendall(greeting.encode())
        except OSError:
            continue
        if _line(connection) == "welcome":
            return {0: connection}
        connection.close()
    warnings.warn(
        f"worker 0 cannot be reached at {' or '.join(addresses)}, port {port}: a dead worker will be noticed only "
        "when an exchange with it times out",
        stacklevel=3,
    )
    return {}
