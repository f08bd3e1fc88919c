"""Hosts of a test on this machine: each in a network namespace of its own, all plugged into one bridge that drops what it is told to drop.

Rule 1: the kernel cleans up. A namespace has no name and lives as long as the process that holds it, and that one ends when its
        standard input does, that is at the latest when the test's process ends, however it ends. With the namespace go its
        interfaces, the bridge, the rules and what is mounted in it. So runs beside each other cannot meet either.
Rule 2: rules are replaced all at once (one transaction of nft), and hold for what passes from one host to another, so that a cut
        is of one direction between two hosts. They are for IP: names of the link layer (ARP) are always answered.

The kernel here has no `netem`, so a delay needs a relay (`marble.testing.relay`). Loss is drawn for each packet by `numgen`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

NETWORK = "10.73.0"
_TOOLS = ("ip", "nft", "unshare", "nsenter", "mount")
_TIMEOUT_S = 60.0


class NamespacesForbidden(Exception):
    """This machine does not let the test have what it needs; the text says what, for the test's reason to be skipped."""


class CommandFailed(Exception):
    """A program on a host ended with an error; the text is what it said."""


@dataclass(frozen=True)
class Drop:
    """What the bridge drops of that which `source` sends to `target`.

    - ``percent``: by chance, each packet for itself; 100: all of it.
    - ``over_kib_s``: what exceeds this rate; 0: no limit.
    """

    source: str
    target: str
    percent: int = 100
    over_kib_s: int = 0


class Host:
    """A namespace of network and of mounts, and the process that holds it.

    Parameters
    ----------
    name, address
        How tests call it, and its address in the network; the bridge's own has none.
    """

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address
        # cat ends when its input does: when this process closes it, or is no more.
        self._holder = subprocess.Popen(
            ["unshare", "--net", "--mount", "--propagation", "private", "sh", "-c", "echo; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        if self._holder.stdout is None or not self._holder.stdout.readline():
            _, errors = self._holder.communicate(timeout=_TIMEOUT_S)
            raise NamespacesForbidden(f"it allows no namespaces: {errors.decode(errors='replace').strip()}")

    @property
    def pid(self) -> int:
        """Of its holder."""
        return self._holder.pid

    def command(self, *words: str) -> list[str]:
        """What runs these words on this host; the process is the program's own, so that signals reach it."""
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net", f"--mount=/proc/{self.pid}/ns/mnt", "--", *words]

    def run(self, *words: str, text: str = "") -> str:
        """Run these words on this host and wait for their end; what they printed. Raises CommandFailed."""
        done = subprocess.run(self.command(*words), input=text, capture_output=True, text=True, timeout=_TIMEOUT_S)
        if done.returncode:
            raise CommandFailed(f"{' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def close(self) -> None:
        """Let the namespace go, unless something else still runs in it."""
        self._holder.communicate(timeout=_TIMEOUT_S)


class Net:
    """A bridge and the hosts on it.

    Parameters
    ----------
    names
        Of the hosts, which get the addresses ``10.73.0.1``, ``.2`` and so on in this order.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.hosts: dict[str, Host] = {}
        self._numbers = {name: number for number, name in enumerate(names, start=1)}
        with contextlib.ExitStack() as stack:
            self._bridge = stack.enter_context(contextlib.closing(Host("bridge", "")))
            self._bridge.run("ip", "link", "add", "br0", "type", "bridge")
            self._bridge.run("ip", "link", "set", "br0", "up")
            for name, number in self._numbers.items():
                host = stack.enter_context(contextlib.closing(Host(name, f"{NETWORK}.{number}")))
                self._plug(host, number)
                self.hosts[name] = host
            self.drop()
            self._stack = stack.pop_all()

    def _plug(self, host: Host, number: int) -> None:
        port, peer = f"port{number}", ("netns", str(host.pid))
        self._bridge.run("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", *peer)
        self._bridge.run("ip", "link", "set", port, "master", "br0", "up")
        host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
        host.run("ip", "link", "set", "eth0", "up")
        host.run("ip", "link", "set", "lo", "up")

    def __enter__(self) -> Net:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def drop(self, *drops: Drop) -> None:
        """Drop this from now on, and nothing else; with nothing given, the network is whole."""
        lines = []
        for each in drops:
            way = f"iifname port{self._numbers[each.source]} oifname port{self._numbers[each.target]} ether type ip"
            if each.over_kib_s:
                lines.append(f"{way} limit rate over {each.over_kib_s} kbytes/second counter drop")
            elif each.percent:
                chance = "" if each.percent == 100 else f"numgen random mod 100 < {each.percent} "
                lines.append(f"{way} {chance}counter drop")
        chain = "type filter hook forward priority 0; policy accept;"
        rules = "".join(f"{line}\n" for line in lines)
        # The first line makes sure that there is a table to delete.
        text = f"table bridge faults\ndelete table bridge faults\ntable bridge faults {{\nchain forward {{\n{chain}\n{rules}}}\n}}\n"
        self._bridge.run("nft", "-f", "-", text=text)

    def lead(self, source: str, ways: dict[str, str]) -> None:
        """Let each connection that `source` opens to one ``address:port`` go to another one. Holds for those opened from now on."""
        rules = ""
        for given, other in ways.items():
            address, _, port = given.partition(":")
            rules += f"ip daddr {address} tcp dport {port} dnat to {other}\n"
        chain = "type nat hook output priority -100; policy accept;"
        text = f"table ip relays\ndelete table ip relays\ntable ip relays {{\nchain output {{\n{chain}\n{rules}}}\n}}\n"
        self.hosts[source].run("nft", "-f", "-", text=text)

    def dropped(self) -> int:
        """How many packets the rules in force have dropped."""
        words = self._bridge.run("nft", "list", "table", "bridge", "faults").split()
        return sum(int(count) for word, count in itertools.pairwise(words) if word == "packets")


def cut(one: Sequence[str], other: Sequence[str]) -> list[Drop]:
    """Nothing passes between these and those, either way."""
    return [drop for a in one for b in other for drop in (Drop(a, b), Drop(b, a))]


@contextlib.contextmanager
def network(names: Sequence[str]) -> Iterator[Net]:
    """A `Net`, or NamespacesForbidden with the reason."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        raise NamespacesForbidden(f"there is no {', '.join(missing)}")
    if os.geteuid() != 0:
        raise NamespacesForbidden("network namespaces need root")
    try:
        net = Net(names)
    except CommandFailed as error:
        raise NamespacesForbidden(f"it makes no bridge of namespaces: {error}") from None
    with net:
        yield net


class SmallDisk:
    """A file system of its own for one host: an image in a file, which can be filled, and whose writes can be held up.

    Parameters
    ----------
    host, image, directory, mib
        Who gets it; the image's file, which is made; where it is mounted, which only that host sees; its size.
    """

    def __init__(self, host: Host, image: Path, directory: Path, mib: int) -> None:
        self.directory = directory
        self._host = host
        self._group: Path | None = None
        for tool in ("mkfs.ext4", "fallocate"):
            if shutil.which(tool) is None:
                raise NamespacesForbidden(f"there is no {tool}")
        directory.mkdir()
        with image.open("wb") as file:
            file.truncate(mib << 20)
        # No blocks for root alone, and no lazy initialisation that would write in the background.
        options = ("-q", "-F", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0")
        host.run("mkfs.ext4", *options, str(image))
        try:
            host.run("mount", "-o", "loop", str(image), str(directory))
        except CommandFailed as error:
            raise NamespacesForbidden(f"it mounts no file as a disk: {error}") from None
        self._device = Path(self._of_mount())

    def _of_mount(self) -> str:
        for line in self._host.run("cat", "/proc/self/mounts").splitlines():
            device, place, *_ = line.split()
            if place == str(self.directory):
                return device
        raise NamespacesForbidden(f"{self.directory} was not mounted")

    def fill(self, leave_kib: int) -> None:
        """Let a file take all the space but so much."""
        free = self._host.run("stat", "-f", "-c", "%a %S", str(self.directory)).split()
        size = int(free[0]) * int(free[1]) - leave_kib * 1024
        self._host.run("fallocate", "-l", str(size), str(self._ballast))

    def empty(self) -> None:
        """Take that file away."""
        self._host.run("rm", "-f", str(self._ballast))

    @property
    def _ballast(self) -> Path:
        return self.directory / "ballast"

    def slow_down(self, pid: int, writes_per_s: int) -> None:
        """Let the process and all its threads do so many writes a second to this disk, and no more (cgroup ``blkio``)."""
        root = Path("/sys/fs/cgroup/blkio")
        if not (root / "cgroup.procs").exists():
            raise NamespacesForbidden("there is no blkio controller (cgroup v1) to slow a disk down with")
        number = self._host.run("cat", f"/sys/block/{self._device.name}/dev").strip()
        self._group = root / f"marble-test-{os.getpid()}-{self._device.name}"
        self._group.mkdir(exist_ok=True)
        (self._group / "blkio.throttle.write_iops_device").write_text(f"{number} {writes_per_s}")
        (self._group / "cgroup.procs").write_text(str(pid))

    def speed_up(self) -> None:
        """Lift that limit."""
        group, self._group = self._group, None
        if group is None:
            return
        for line in (group / "blkio.throttle.write_iops_device").read_text().splitlines():
            (group / "blkio.throttle.write_iops_device").write_text(f"{line.split()[0]} 0")
        for pid in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                (group.parent / "cgroup.procs").write_text(pid)
        group.rmdir()
