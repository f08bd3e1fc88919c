"""`marble._core.packing`, slow and obvious."""

from __future__ import annotations

from marble.errors import ProtocolError


class Outbox:
    def __init__(self, bytes_max: int, count_max: int) -> None:
        self.limits = bytes_max, count_max
        self.waiting: list[bytes] = []
        self.taken: list[bytes] = []
        self.accepting = True

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.waiting + self.taken))

    @property
    def count(self) -> int:
        return len(self.waiting + self.taken)

    def put(self, data: bytes) -> bool:
        bytes_max, count_max = self.limits
        full = self.count > 0 and (self.count + 1 > count_max or self.nbytes + len(data) > bytes_max)
        if not self.accepting or full:
            return False
        self.waiting.append(data)
        return True

    def take(self, bytes_max: int, count_max: int) -> list[bytes]:
        taken: list[bytes] = []
        while self.waiting and len(taken) < count_max:
            if taken and sum(map(len, taken)) + len(self.waiting[0]) > bytes_max:
                break
            taken.append(self.waiting.pop(0))
        self.taken += taken
        return taken

    def release(self, taken: list[bytes]) -> int:
        for data in taken:
            self.taken.remove(data)
        return sum(map(len, taken))

    def drain(self) -> list[bytes]:
        left, self.waiting = self.waiting, []
        self.taken += left
        return left


def pack(items: list[bytes]) -> tuple[bytes, bytes]:
    """The run and the lengths."""
    return b"".join(items), b"".join(len(item).to_bytes(4, "little") for item in items)


def unpack(run: bytes, lengths: bytes) -> list[bytes]:
    if len(lengths) % 4:
        raise ProtocolError("lengths")
    numbers = [int.from_bytes(lengths[at : at + 4], "little") for at in range(0, len(lengths), 4)]
    if sum(numbers) != len(run):
        raise ProtocolError("sizes")
    messages = []
    for number in numbers:
        messages.append(run[:number])
        run = run[number:]
    return messages
