"""Ends all workers within seconds after one of them has failed or disappeared.

`srun --kill-on-bad-exit` and torchrun end a job if a worker exits with an error. They do not notice a worker that
exits with code 0 too early, or a machine that stops responding. Plain `python` notices no failure. The other workers
would wait in a collective for D2S_TIMEOUT minutes, or forever on a GPU. So each worker keeps an idle TCP connection
to worker 0. The kernel closes the connection when the process ends for any reason, and keeps it open while the
process is slow or paused. TCP keepalive detects a dead machine.

A worker that exits sends its exit code as one byte. It is 0 if all workers exit together at the end, or another code
if the worker has printed an error. A connection that closes without such a byte means a crash. Worker 0 informs the
other workers.
"""

import contextlib
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
"""Seconds that a worker waits before it exits after another's failure. The launcher must see the failure first."""
_CONNECT = 20.0
"""Seconds after which a worker gives up connecting to worker 0."""
_KEEPALIVE = {socket.TCP_KEEPIDLE: 5, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 3}


class Watchdog:
    """Listens to this worker's connections in a thread, and ends this process if another worker fails.
    connections: maps the rank at the other end to the connection. Worker 0 has a connection to each other worker.
    The other workers have only the connection to worker 0."""

    def __init__(self, rank: int, connections: dict[int, socket.socket]) -> None:
        self._rank, self._connections = rank, connections
        self._leaving = False
        self._another_failed = threading.Event()
        threading.Thread(target=self._listen, name="watchdog", daemon=True).start()
        # A loader process inherits the connections. It must close them, or they stay open when its worker dies.
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
                    try:
                        message = key.fileobj.recv(1)
                    except OSError:
                        message = b""
                    if message != b"\0":
                        self._end(key.data, message)
                    selector.unregister(key.fileobj)

    def _end(self, gone: int, message: bytes) -> None:
        """Ends this process because worker `gone` failed. message: the exit code of `gone`; empty after a crash."""
        if self._leaving:
            return
        self._another_failed.set()
        if self._rank == 0:
            self._send(message or b"\1")
        time.sleep(_GRACE)
        if self._leaving:
            return
        if not message and self._rank == (1 if gone == 0 else 0):
            print(
                f"train.py: error: worker {gone} ended without an error message (killed, out of memory, or an early "
                "exit), so all others end; --resume continues from the newest checkpoint",
                file=sys.stderr,
                flush=True,
            )
        os._exit(message[0] if message else 1)

    def _send(self, message: bytes) -> None:
        for connection in self._connections.values():
            with contextlib.suppress(OSError):  # the receiver may have ended too
                connection.sendall(message)

    def exit_if_another_failed(self) -> None:
        """Waits 1 second for news that another worker failed. If news arrives, :meth:`_end` ends this process."""
        if self._another_failed.wait(1.0):
            time.sleep(2 * _GRACE)

    def announce_exit(self, code: int) -> None:
        """Tells the other workers that this worker exits. code: its exit code, or 0 if all workers exit together."""
        self._leaving = True
        self._send(bytes([code]))


def start_watchdog(rank: int, world: int) -> Watchdog:
    """Connects this worker with worker 0, and worker 0 with all. Warns if worker 0 cannot be reached in 20 seconds.
    All workers call this function together. Returns the watchdog of this worker."""
    # Workers get the port from torch's store: a first collective of NCCL may wait forever for a dead worker.
    store = _get_default_store()
    if rank:
        port, token = json.loads(store.get("d2s/watchdog"))
        connections = _connect(port, f"{token} {rank}\n")
    else:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        with socket.create_server(("", 0), family=family, backlog=world, dualstack_ipv6=dual) as listener:
            token = secrets.token_hex(16)
            store.set("d2s/watchdog", json.dumps([listener.getsockname()[1], token]))
            connections = _accept(listener, world, token)
    for connection in connections.values():
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, seconds in _KEEPALIVE.items():
            connection.setsockopt(socket.IPPROTO_TCP, option, seconds)
    return Watchdog(rank, connections)


def _accept(listener: socket.socket, world: int, token: str) -> dict[int, socket.socket]:
    """Accepts the other workers' connections for 25 seconds. Returns them by rank. Refuses any without `token`."""
    connections: dict[int, socket.socket] = {}
    deadline = time.monotonic() + _CONNECT + 5
    while len(connections) < world - 1:
        listener.settimeout(max(0.1, deadline - time.monotonic()))
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            break
        connection.settimeout(5)
        try:
            with connection.makefile("rb", buffering=0) as stream:  # unbuffered: the next byte is a message
                greeting, _, rank = stream.readline(64).decode(errors="replace").partition(" ")
        except OSError:
            greeting = ""
        if greeting == token:
            connections[int(rank)] = connection
        else:
            connection.close()
    return connections


def _connect(port: int, greeting: str) -> dict[int, socket.socket]:
    """Connects to worker 0 and sends `greeting`. Returns {0: connection}; {} and a warning if that fails."""
    address = os.environ["MASTER_ADDR"]
    try:
        connection = socket.create_connection((address, port), timeout=_CONNECT)
        connection.sendall(greeting.encode())
    except OSError:
        warnings.warn(
            f"worker 0 cannot be reached at {address}, port {port}: a dead worker will be noticed only when a "
            "collective with it times out",
            stacklevel=3,
        )
        return {}
    return {0: connection}
