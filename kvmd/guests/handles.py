"""All that QEMU needs of the host, opened by root: images, taps, monitors, a kernel, vsock."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Literal

from kvmd.guest import Guest, Nic
from kvmd.guests.readiness import Readiness
from kvmd.network.kernel import netlink
from kvmd.network.lan import Lan
from kvmd.qemu import images
from kvmd.qemu.argv import Handles, Image, Tap, queues
from kvmd.qemu.process import Descriptors
from kvmd.runtime import Runtime


async def open_handles(
    guest: Guest,
    accelerator: Literal["kvm", "tcg"],
    runtime: Runtime,
    lan: Lan,
    readiness: Readiness,
    descriptors: Descriptors,
    undo: AsyncExitStack,
) -> Handles:
    """Put it all into ``descriptors``, creating the images that are missing. Raises ``KvmdError``."""
    boot = guest.boot
    if guest.nics:
        await lan.begun()
    return Handles(
        accelerator=accelerator,
        images=await _images(guest, descriptors),
        taps=[_tap(guest, nic, accelerator, lan, descriptors, undo) for nic in guest.nics],
        qmp_fd=descriptors.take(runtime.listen("qmp")),
        spare_qmp_fd=descriptors.take(runtime.listen("qmp.spare")),
        serial=runtime.path / "serial",
        kernel=descriptors.take(images.open_readable(boot.kernel, "kernel")) if boot.kernel else None,
        initrd=descriptors.take(images.open_readable(boot.initrd, "initrd")) if boot.initrd else None,
        vsock=await readiness.offer_vsock(descriptors),
    )


async def _images(guest: Guest, descriptors: Descriptors) -> list[Image]:
    chains: list[Image] = []
    for disk in guest.disks:
        await images.create(disk)
        files = enumerate(await images.chain(disk))
        chains.append(
            [
                (descriptors.take(images.open_file(path, "disk image", write=not (below or disk.readonly))), format)
                for below, (path, format) in files
            ]
        )
    chains += [[(descriptors.take(images.open_file(cdrom.path, "CD image")), "raw")] for cdrom in guest.cdroms]
    return chains


def _tap(
    guest: Guest,
    nic: Nic,
    accelerator: Literal["kvm", "tcg"],
    lan: Lan,
    descriptors: Descriptors,
    undo: AsyncExitStack,
) -> Tap:
    fds = lan.open_tap(nic, queues(guest, nic))
    undo.push_async_callback(_close_tap, lan, nic.tap, fds)
    vhosts = netlink.open_vhost(len(fds)) if accelerator == "kvm" and nic.model == "virtio" else ()
    return Tap([descriptors.lend(fd) for fd in fds], [descriptors.take(fd) for fd in vhosts], lan.mtu(nic))


async def _close_tap(lan: Lan, tap: str, fds: Sequence[int]) -> None:
    """Our own hold on the tap spares QEMU's exit the 16 ms that the kernel takes to remove it."""
    lan.give_up(tap)
    asyncio.get_running_loop().run_in_executor(None, netlink.close_all, fds)
    await lan.withdraw(tap)  # the name is free from here on; close(2) waits on for the kernel's readers (RCU)
