"""A process in which Python connects to nothing but its own machine."""

OFFLINE = """
import socket

class Refused(AssertionError):
    "Not an OSError, which a library that can do without a network would catch."

def _local_only(connect):
    def checked(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise Refused(f"a connection to {address}")
        return connect(self, address)
    return checked

socket.socket.connect = _local_only(socket.socket.connect)
socket.socket.connect_ex = _local_only(socket.socket.connect_ex)
"""
