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
from kvmd.qemu.argv import Handles, Image, Layer, Tap, queues
from kvmd.qemu.files import open_file, open_readable
from kvmd.qemu.process import Descriptors, User
from kvmd.qemu.used import Used
from kvmd.runtime import Runtime


async def open_handles(
    guest: Guest,
    accelerator: Literal["kvm", "tcg"],
    user: User,
    runtime: Runtime,
    lan: Lan,
    readiness: Readiness,
    descriptors: Descriptors,
    undo: AsyncExitStack,
) -> tuple[list[str], Handles]:
    """Put it all into ``descriptors``, creating the images that are missing; and what a person should be told.

    ``user`` is whom QEMU will run as. Raises ``KvmdError``.
    """
    if guest.nics:
        await lan.begun()
    warnings, chains, kernel, initrd = await asyncio.to_thread(_open_files, guest, user, descriptors)
    return warnings, Handles(
        accelerator=accelerator,
        images=chains,
        taps=[_tap(guest, nic, accelerator, lan, descriptors, undo) for nic in guest.nics],
        qmp_fd=descriptors.take(runtime.listen("qmp")),
        spare_qmp_fd=descriptors.take(runtime.listen("qmp.spare")),
        serial=runtime.path / "serial",
        kernel=kernel,
        initrd=initrd,
        vsock=await readiness.offer_vsock(descriptors),
    )


def _open_files(
    guest: Guest, user: User, descriptors: Descriptors
) -> tuple[list[str], list[Image], int | None, int | None]:
    """Warnings, images, kernel, initrd. Blocks as long as the storage takes. Raises ``StartFailed``."""
    chains: list[Image] = []
    warnings: list[str] = []
    used = Used(guest.name)
    for disk in guest.disks:
        images.create(disk, user, used)
        layers = images.open_disk(disk, descriptors)
        chains.append(layers)
        warnings += [*images.doubts(disk, layers), used.note(disk, layers)]
    warnings.append(used.save())
    for cdrom in guest.cdroms:
        chains.append([Layer(descriptors.take(open_file(cdrom.path, "CD image")), "raw")])
    boot = guest.boot
    kernel = descriptors.take(open_readable(boot.kernel, "kernel", guest.memory)) if boot.kernel else None
    initrd = descriptors.take(open_readable(boot.initrd, "initrd", guest.memory)) if boot.initrd else None
    return list(filter(None, warnings)), chains, kernel, initrd


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
