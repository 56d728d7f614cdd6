"""Ends all workers within seconds once one of them is gone.

`srun --kill-on-bad-exit` and torchrun end a job whose worker exits with an error. They do not notice a worker that
exits with 0 midway, nor a machine that falls silent, and plain `python` has nobody to watch; a collective then waits
for D2S_TIMEOUT, or on a GPU forever. So each worker has an idle TCP connection to worker 0. The kernel closes it
when the process ends in any way, keeps it open while a process is slow or paused, and keepalive detects a dead
machine.

Before it leaves, a worker sends its exit code as one byte: 0 with all others at the end, or another after it has
printed its error. A connection that closes without one means a crash. Worker 0 passes both on.
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
"""Seconds until the others exit, so that a launcher first sees the exit of the worker that failed."""
_CONNECT = 20.0
"""Seconds for all workers to connect."""
_KEEPALIVE = {socket.TCP_KEEPIDLE: 5, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 3}


class Watchdog:
    """Listens to the connections of this worker in a thread.

    connections: by rank; those to all other workers on worker 0, that to worker 0 on the others.
    """

    def __init__(self, rank: int, connections: dict[int, socket.socket]) -> None:
        self._rank, self._connections = rank, connections
        self._leaving = False
        self._another_failed = threading.Event()
        threading.Thread(target=self._listen, name="watchdog", daemon=True).start()
        # A loader process would keep the connections open after the death of its worker.
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
        """Ends this process because worker `gone` failed; `message` is its exit code, empty after a crash."""
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
            with contextlib.suppress(OSError):  # this worker has ended too
                connection.sendall(message)

    def exit_if_another_failed(self) -> None:
        """Returns if this worker's error is its own; ends the process if another worker failed before."""
        if self._another_failed.wait(1.0):
            time.sleep(2 * _GRACE)

    def announce_exit(self, code: int) -> None:
        """Tells the other workers that this one leaves: 0 with all of them, else after it printed its error."""
        self._leaving = True
        self._send(bytes([code]))


def start_watchdog(rank: int, world: int) -> Watchdog:
    """Connects all workers, which call it together. Warns if they cannot reach worker 0 within 20 seconds."""
    # Through the store, since the first collective of NCCL may wait for a dead worker forever.
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
    """Connections of the workers that come in time, by rank. The token keeps strangers out."""
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
    """The connection to worker 0, under its rank; none if it cannot be reached."""
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
