"""One end for all processes of a run: of an error, of a process that is gone, of success.

Every rank holds a connection to rank 0, on which nothing is sent until its end. A process that is
killed closes its own; of a machine that is gone the kernel's keepalive tells within `SILENCE` seconds.
Neither needs the process to answer, so that a long microbatch is no sign of death. Who fails asks rank
0 whether it is the first, and speaks only then: one error has one line.
"""

import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from .ending import SIGNALS, UNBROKEN, status, words

JOINING = 300  # seconds in which all processes of a launch are to come
SILENCE = 20  # seconds without a sign of the other machine's kernel
ANSWER = 10.0  # seconds for an answer of a process that is alive
GRACE = 2.0  # seconds in which a reason for SIGTERM may be found, as that another rank is gone
WRITING = 10.0  # seconds for a file that is being written


class Watch:
    """Of one rank; `store` is that of the rendezvous, `address` the host of rank 0."""

    def __init__(self, rank: int, size: int, store: Any, address: str) -> None:
        self._rank, self._lock = rank, threading.Lock()
        self._ended = False  # someone failed, and is or was the one to speak
        self._done: dict[int, bool] = dict.fromkeys(range(1, size), False)
        self._all_done = threading.Event()
        self._peers: dict[int, socket.socket] = {}
        self._answer: str | None = None
        self._answered = threading.Event()
        if rank:
            port, token = store.get("funcprobe/watch").decode().split()
            self._first = socket.create_connection((address, int(port)), timeout=60)
            self._first.settimeout(None)
            _keep_alive(self._first)
            _send(self._first, f"{token} {rank} {socket.gethostname()} {os.getpid()}")
            _thread(self._listen)
        else:
            self._accept(store)
        _on_signals(self._ended_by)

    def succeed(self) -> None:
        """Wait for the others, whose success this one's is."""
        if self._rank:
            _send(self._first, "done")
            self._answered.wait()
            return
        self._all_done.wait()
        self._tell("end 0")

    def fail(self, status: int, said: str | None) -> NoReturn:
        """End all processes; print `said` if no other rank failed before."""
        if self._rank:
            _send(self._first, f"fail {status}")
            if self._answered.wait(ANSWER) and self._answer == "speak" and said:
                _say(said)
            _send(self._first, "said")
            _leave(status)
        if not self._claims():
            threading.Event().wait()  # the thread of the rank that failed ends this process
        if said:
            _say(said)
        self._end(status)

    def _claims(self) -> bool:
        with self._lock:
            first, self._ended = not self._ended, True
        return first

    def _end(self, status: int) -> NoReturn:
        self._tell(f"end {status}")
        _leave(status)

    def _tell(self, line: str) -> None:
        for peer in self._peers.values():
            _send(peer, line)

    def _accept(self, store: Any) -> None:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        with socket.create_server(("", 0), family=family, dualstack_ipv6=dual) as server:
            server.settimeout(JOINING)
            token = secrets.token_hex(16)
            store.set("funcprobe/watch", f"{server.getsockname()[1]} {token}")
            while len(self._peers) < len(self._done):
                peer, _ = server.accept()
                peer.settimeout(ANSWER)
                hello = _lines(peer)
                said = next(hello, "").split()
                if len(said) != 4 or not secrets.compare_digest(said[0], token):
                    peer.close()  # a stranger's
                    continue
                peer.settimeout(None)
                _keep_alive(peer)
                rank = int(said[1])
                self._peers[rank] = peer
                _thread(partial(self._follow, rank, hello, *said[2:]))

    def _follow(self, rank: int, lines: Any, host: str, process: str) -> None:
        """Rank 0, of another rank: until it is done, fails, or is gone."""
        for line in lines:
            word, _, rest = line.partition(" ")
            if word == "done":
                self._done[rank] = True
                if all(self._done.values()):
                    self._all_done.set()
            elif word == "fail":
                first = self._claims()
                _send(self._peers[rank], "speak" if first else "quiet")
                if first:
                    self._peers[rank].settimeout(ANSWER)
                    next(lines, None)  # "said", or the end of the connection
                    self._end(int(rest))
        if not self._done[rank] and self._claims():
            _say(
                f"funcprobe: rank {rank} ({host}, process {process}) is gone: killed, perhaps because "
                "memory ran out; all ranks end"
            )
            self._end(1)

    def _listen(self) -> None:
        """Another rank, of rank 0."""
        for line in _lines(self._first):
            word, _, rest = line.partition(" ")
            if word == "end" and int(rest):
                _leave(int(rest))
            self._answer = word
            self._answered.set()
        if self._answer is None:
            if self._rank == 1:
                _say("funcprobe: rank 0 is gone: killed, perhaps because memory ran out; all ranks end")
            _leave(1)

    def _ended_by(self, received: signal.Signals) -> None:
        time.sleep(GRACE)
        if self._rank == 0 and self._claims():
            _say(f"funcprobe: {words(received)}")
            self._tell(f"end {status(received)}")
        _leave(status(received))


def _on_signals(act: Callable[[signal.Signals], None]) -> None:
    """act() in a thread: the main one may be inside a collective, where no handler runs.

    SIGINT, which also interrupts the main thread, ends it in this way if it does not end by itself.
    """
    read, write = socket.socketpair()
    write.setblocking(False)
    for one in SIGNALS:
        if signal.getsignal(one) == signal.SIG_DFL:
            signal.signal(one, lambda *_: None)
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, UNBROKEN.handle)
    signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)

    def wait() -> None:
        assert write.fileno() >= 0  # kept, with the thread
        while signals := read.recv(64):
            if found := [one for one in SIGNALS if one in signals]:
                act(found[0])

    _thread(wait)


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    every = SILENCE // 4
    for name, value in (("TCP_KEEPIDLE", every), ("TCP_KEEPINTVL", every), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _lines(connection: socket.socket) -> Any:
    """Lines until the connection ends, in whatever way."""
    try:
        with connection.makefile("r", encoding="ascii", errors="backslashreplace") as stream:
            for line in stream:
                yield line.strip()
    except OSError:
        return


def _send(connection: socket.socket, line: str) -> None:
    try:
        connection.sendall(f"{line}\n".encode("ascii"))
    except OSError:  # the other is gone, which its reader sees
        return


def _thread(target: Callable[[], None]) -> None:
    threading.Thread(target=target, daemon=True).start()


def _say(text: str) -> None:
    stream = sys.__stderr__
    if stream is not None:
        stream.write(f"{text}\n")
        stream.flush()


def _leave(status: int) -> NoReturn:
    """End the process wherever its main thread is, but not while it writes."""
    UNBROKEN.acquire(WRITING)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)
