"""Limits on what comes in at a Flight server. Layout, ownership and invariants: head of ``_gate.pyx``."""

def register() -> None:
    """Tell Arrow of the schemes ``marble`` and ``marble+tls``. Once in a process.

    Raises
    ------
    RuntimeError
        They are taken.
    """

def add(number: int, message_bytes_max: int, unpacked_bytes_max: int, schema_bytes_max: int, reuse_port: bool) -> None:
    """Make gate `number`: the location of its server ends in ``?gate=number``.

    Parameters
    ----------
    message_bytes_max
        Bytes of one gRPC message; below 2**31.
    unpacked_bytes_max
        Bytes of a record batch, and of all dictionaries of a stream, when they are unpacked.
    schema_bytes_max
        Bytes of the message that has a stream's schema.
    reuse_port
        Whether another server may listen on the same port.
    """

def drop(number: int) -> None:
    """Forget gate `number`. Its server, if it still runs, keeps its limits."""

def ask(number: int) -> tuple[int, int, int]:
    """Refused messages; whether gRPC's builder and the last call's reader were as known: 1 yes, -1 no, 0 there was none."""

def slow(number: int, seconds: float) -> list[str]:
    """Who has kept a write of this gate's server waiting for longer than `seconds`, as gRPC names them (``ipv4:host:port``)."""
