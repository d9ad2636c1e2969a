"""Two hosts on one machine: network namespaces, and a link of a given rate between them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from parallel_launch import HERE, Place

LINK, ADDRESSES = "link0", ("10.77.0.1", "10.77.0.2")
CONGESTION = "cubic"


@dataclass(frozen=True)
class Hosts:
    """Where workers run, and the process that is the link between them."""

    places: tuple[Place, ...]
    relay: int

    def relay_seconds(self) -> float:
        """What the link has used of a core, which a real one would not."""
        fields = Path(f"/proc/{self.relay}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def missing() -> str | None:
    """Why two hosts cannot be made here; None if they can."""
    if sys.platform != "linux":
        return f"network namespaces are a thing of Linux, and this is {sys.platform}"
    if shutil.which("ip") is None:
        return "`ip` is not installed (Debian and Ubuntu: apt install iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with two_hosts(1000, 1):
            return None
    except RuntimeError as error:
        return str(error)


@contextmanager
def two_hosts(megabits: float, delay_ms: float) -> Iterator[Hosts]:
    """Namespaces joined by a link of so many Mbit/s and so many milliseconds each way; removed afterwards.

    A process is the link, see parallel_relay.py: `netem`, which could delay packets, is not in every kernel.

    Raises:
        RuntimeError: a command that failed, and what it said.
    """
    names = [f"fastmoe-{os.getpid()}-{side}" for side in "ab"]
    relay = None
    try:
        for name in names:
            command("ip", "netns", "add", name)
        relay = _start_relay(names, megabits, delay_ms)
        for name, address in zip(names, ADDRESSES, strict=True):
            _set_up(name, address)
        yield Hosts(
            tuple(Place(("ip", "netns", "exec", name), {"GLOO_SOCKET_IFNAME": LINK}, ADDRESSES[0]) for name in names),
            relay.pid,
        )
    finally:
        if relay is not None:
            relay.kill()
            relay.wait()
        for name in names:
            with suppress(RuntimeError):
                command("ip", "netns", "delete", name)


def _set_up(name: str, address: str) -> None:
    def inside(*words: str) -> None:
        command("ip", "netns", "exec", name, *words)

    inside("ip", "address", "add", f"{address}/24", "dev", LINK)
    inside("ip", "link", "set", LINK, "up", "txqueuelen", "10000")
    inside("ip", "link", "set", "lo", "up")
    inside("sysctl", "-qw", "net.ipv4.tcp_slow_start_after_idle=0")
    inside("ip", "route", "replace", "10.77.0.0/24", "dev", LINK, "src", address, "congctl", CONGESTION)


def _start_relay(names: list[str], megabits: float, delay_ms: float) -> subprocess.Popen:
    script = [sys.executable, str(HERE / "parallel_relay.py"), LINK, str(megabits), str(delay_ms), *names]
    relay = subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert relay.stdout is not None
    if relay.stdout.readline() != "ready\n":
        reason = relay.communicate()[1].strip().splitlines()[-1:]
        raise RuntimeError(f"the process that is the link did not start: {''.join(reason)}")
    return relay


def command(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(words)}` failed: {done.stderr.strip() or done.returncode}")
    return done.stdout
