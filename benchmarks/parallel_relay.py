"""A link between two namespaces, of so many Mbit/s and so many milliseconds each way.

    python parallel_relay.py DEVICE MEGABITS MILLISECONDS NAMESPACE NAMESPACE

It is what `tc qdisc ... netem` and `tbf` would be, with two differences: netem is not in every kernel, and tbf does not
keep its rate where computing threads hold the cores, since what it misses in that time is lost. Here a packet leaves
when those before it have left at the given rate, whenever this process gets to run, and arrives that much later. No
packet is lost: the sender's device holds what does not fit. Packets stay as large as TCP makes them.
"""

import fcntl
import os
import select
import struct
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field

TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
CHECKSUM, TSO4 = 0x01, 0x02
AHEAD = 0.002  # seconds of packets that are taken from the sender before they may leave


@dataclass
class Way:
    """One direction. `free`: when the last packet has left; `held`: packets, and when they arrive."""

    source: int
    target: int
    free: float = 0.0
    held: deque[tuple[float, bytes]] = field(default_factory=deque)


def open_tun(device: str, namespace: str) -> int:
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(file, TUNSETIFF, struct.pack("16sH22x", device.encode(), IFF_TUN | IFF_NO_PI | IFF_VNET_HDR))
    fcntl.ioctl(file, TUNSETOFFLOAD, CHECKSUM | TSO4)
    subprocess.run(["ip", "link", "set", device, "netns", namespace], check=True)
    return file


def relay(ways: list[Way], rate: float, delay: float) -> None:
    """For ever: `rate` in bytes and `delay` in seconds."""
    while True:
        now = time.monotonic()
        for way in ways:
            while way.held and way.held[0][0] <= now:
                with suppress(OSError):  # that end is not up yet
                    os.write(way.target, way.held.popleft()[1])
        open_ways = [way for way in ways if way.free - now < AHEAD]
        due = [way.held[0][0] for way in ways if way.held] + [way.free - AHEAD for way in ways if way not in open_ways]
        patience = max(min(due) - time.monotonic(), 0) if due else None
        ready = select.select([way.source for way in open_ways], [], [], patience)[0]
        for way in open_ways:
            if way.source in ready:
                take(way, rate, delay)


def take(way: Way, rate: float, delay: float) -> None:
    packet = os.read(way.source, 1 << 17)
    way.free = max(way.free, time.monotonic()) + len(packet) / rate
    way.held.append((way.free + delay, packet))


def main() -> None:
    device, megabits, milliseconds, *namespaces = sys.argv[1:]
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))  # a link does not wait for a core
    one, other = (open_tun(device, namespace) for namespace in namespaces)
    print("ready", flush=True)
    relay([Way(one, other), Way(other, one)], float(megabits) * 1e6 / 8, float(milliseconds) / 1e3)


if __name__ == "__main__":
    main()
