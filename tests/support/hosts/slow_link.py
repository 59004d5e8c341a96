"""Delays and loses what comes out of a network interface, where the kernel lacks netem: a pair of TAP devices, with
this program in between. Stands for `tc qdisc add dev INTERFACE root netem delay D loss P`.

usage: python slow_link.py IN OUT DELAY_MS LOSS_PERCENT SEED
Frames from TAP device IN come out of OUT late, or never; those from OUT come out of IN at once. Needs root; the devices
are made here, and gone when this ends.
"""

import fcntl
import heapq
import os
import random
import select
import struct
import sys
import time

SET_INTERFACE = 0x400454CA  # TUNSETIFF
TAP, WITHOUT_HEADER = 0x0002, 0x1000
MAX_FRAME_BYTES = 65_536
READY = "ready"


def open_tap(name: str) -> int:
    """Makes a TAP device. Without offload, so that the kernel cuts frames to size, and completes their checksums."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(device, SET_INTERFACE, struct.pack("16sH22x", name.encode(), TAP | WITHOUT_HEADER))
    return device


def relay(late: int, prompt: int, *, delay_s: float, loss: float, chance: random.Random) -> None:
    """Passes frames on until it is killed. late, prompt: the devices whose frames are delayed and lost, or are not."""
    waiting: list[tuple[float, int, bytes]] = []  # by when they are due; numbered, so that none overtakes another
    count = 0
    while True:
        timeout_s = max(waiting[0][0] - time.monotonic(), 0.0) if waiting else None
        for device in select.select([late, prompt], [], [], timeout_s)[0]:
            for frame in frames(device):
                if device == prompt:
                    write(late, frame)
                elif chance.random() >= loss:
                    count += 1
                    heapq.heappush(waiting, (time.monotonic() + delay_s, count, frame))
        now_s = time.monotonic()
        while waiting and waiting[0][0] <= now_s:
            write(prompt, heapq.heappop(waiting)[2])


def frames(device: int) -> list[bytes]:
    """Returns what a device has by now."""
    found: list[bytes] = []
    try:
        while len(found) < 256:
            found.append(os.read(device, MAX_FRAME_BYTES))
    except BlockingIOError:
        pass
    return found


def write(device: int, frame: bytes) -> None:
    """Lets a frame come out of a device; a full queue loses it, as on any link."""
    try:
        os.write(device, frame)
    except OSError:
        return


if __name__ == "__main__":
    into, out_of, delay_ms, loss_percent, seed = sys.argv[1:]
    devices = open_tap(into), open_tap(out_of)
    print(READY, flush=True)
    relay(
        *devices,
        delay_s=float(delay_ms) / 1000,
        loss=float(loss_percent) / 100,
        chance=random.Random(int(seed)),
    )
