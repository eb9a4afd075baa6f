"""All that QEMU needs of the host, opened by root: images, taps, monitors, a kernel, vsock."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Literal

from kvmd.errors import StartFailed
from kvmd.guest import BootDevice, CloudInit, Disk, Guest, Nic
from kvmd.guests.borrowed import Borrowed
from kvmd.guests.readiness import Readiness
from kvmd.guests.tpm import Tpm
from kvmd.network.dnsmasq import resolvers
from kvmd.network.kernel import netlink
from kvmd.network.lan import Lan
from kvmd.network.model.settings import Settings, network_config
from kvmd.qemu import images
from kvmd.qemu.argv import Handles, Tap, queues
from kvmd.qemu.drives import Image, Layer
from kvmd.qemu.files import open_file, open_readable
from kvmd.qemu.firmware import Firmware
from kvmd.qemu.nvram import open_firmware
from kvmd.qemu.password import open_password
from kvmd.qemu.process import Descriptors, User
from kvmd.qemu.seed import open_credentials, open_seed
from kvmd.qemu.tpm import open_state
from kvmd.qemu.used import STATE, Used
from kvmd.runtime import Runtime

PATIENCE = 5.0  # seconds

Use = tuple[int, int, str, bool]  # of an image by a guest: device and inode, its path, whether it is written to
InUse = Mapping[tuple[int, int], tuple[str, str, bool]]  # guest, path, whether it is written to


async def open_handles(
    guest: Guest,
    accelerator: Literal["kvm", "tcg"],
    user: User,
    runtime: Runtime,
    lan: Lan,
    readiness: Readiness,
    tpm: Tpm,
    borrowed: Borrowed,
    descriptors: Descriptors,
    undo: AsyncExitStack,
    say: Callable[[str], None],
    in_use: InUse,
    boot_once: BootDevice | None,
) -> tuple[list[str], list[Use], Handles]:
    """Put it all into ``descriptors``, creating the images that are missing; and what a person should be told.

    ``user`` is whom QEMU will run as; ``say`` is told what keeps it waiting; ``in_use`` are images of others. Raises
    ``KvmdError``.
    """
    if guest.nics:
        await lan.begun()
    settings = [(nic, lan.settings(nic)) for nic in guest.nics]
    with Descriptors() as for_tpm:
        files = Files(guest, user, descriptors, (tpm.user, for_tpm), in_use, settings)
        await files.open(say)
        stream = await tpm.start(for_tpm, descriptors, runtime.stderr, undo)
    return (
        files.warnings,
        files.uses,
        Handles(
            accelerator=accelerator,
            images=files.images,
            taps=[_tap(guest, nic, accelerator, lan, descriptors, undo) for nic in guest.nics],
            qmp_fd=descriptors.take(runtime.listen("qmp")),
            spare_qmp_fd=descriptors.take(runtime.listen("qmp.spare")),
            serial=runtime.path / "serial",
            kernel=files.kernel,
            initrd=files.initrd,
            credentials=files.credentials,
            boot_once=boot_once,
            vsock=await readiness.offer_vsock(descriptors),
            firmware=files.firmware,
            tpm=stream,
            vnc_password=files.vnc_password,
            of_the_host=await borrowed.open(user, descriptors, undo),
        ),
    )


class Files:
    """A guest's images, its firmware and its kernel, opened in a thread: storage may take its time."""

    def __init__(
        self,
        guest: Guest,
        user: User,
        descriptors: Descriptors,
        tpm: tuple[User | None, Descriptors],
        in_use: InUse,
        settings: Sequence[tuple[Nic, Settings | None]] = (),
    ) -> None:
        """``tpm``: whose its state is to be, and what to put it into; ``settings``: what is known of each NIC's LAN."""
        self._guest = guest
        self._settings = settings
        self._in_use = in_use
        self._user = user
        self._tpm_user, self._for_tpm = tpm
        self._descriptors = descriptors
        self._at = guest.file  # what the thread is at
        self.images: list[Image] = []
        self.kernel: int | None = None
        self.initrd: int | None = None
        self.credentials: list[int] = []
        self.firmware: Firmware | None = None
        self.vnc_password: int | None = None
        self.warnings: list[str] = []
        self.uses: list[Use] = []

    async def open(self, say: Callable[[str], None]) -> None:
        """Opened when it returns; what it waits for goes to ``say``. Raises ``StartFailed``."""
        opening = asyncio.create_task(asyncio.to_thread(self._open))
        try:
            if not (await asyncio.wait((opening,), timeout=PATIENCE))[0]:
                say(f"waits for its storage: {self._at} does not answer (systemctl stop ends the start)")
            await opening
        finally:
            opening.cancel()

    def _open(self) -> None:
        guest, take = self._guest, self._descriptors.take
        used = Used(guest.name)
        for disk in guest.disks:
            self._at = disk.path
            images.create(disk, self._user, used)
            layers = images.open_disk(disk, self._descriptors)
            self.images.append(layers)
            self._claim(disk, layers)
            self.warnings += filter(None, [*images.doubts(disk, layers), used.note(disk, layers)])
        for cdrom in guest.cdroms:
            if not (path := cdrom.path):
                self.images.append([])
                continue
            self._at = path
            self.images.append([Layer(take(open_file(path, "CD image", uid=cdrom.uid)), "raw")])
            self._refuse_used(self.images[-1][0].fd, f"CD image {path}", write=False)
        if guest.firmware == "uefi":
            self._at = STATE / guest.name
            self.firmware, lost = open_firmware(guest, self._descriptors, used)
            self.warnings += filter(None, [lost])
        if guest.boot.kernel:
            self._at = guest.boot.kernel
            self.kernel = take(open_readable(guest.boot.kernel, "kernel", guest.memory))
        if guest.boot.initrd:
            self._at = guest.boot.initrd
            self.initrd = take(open_readable(guest.boot.initrd, "initrd", guest.memory))
        if self._tpm_user:
            self._at = STATE / guest.name
            state, lost = open_state(guest, self._tpm_user, used)
            self._for_tpm.take(state)
            self.warnings += filter(None, [lost])
        if password := guest.display.password_file:
            self._at = password
            fd, doubts = open_password(password)
            self.vnc_password = take(fd)
            self.warnings += doubts
        self.warnings += filter(None, [used.save()])
        self.credentials += map(take, open_credentials(guest))
        if guest.cloud_init:
            self.images.append([Layer(take(self._open_seed(guest.cloud_init)), "raw")])

    def _open_seed(self, cloud_init: CloudInit) -> int:
        unknown = [nic.tap for nic, known in self._settings if not (known or nic.configure) and nic.addresses]
        if unknown and cloud_init.network_config is None:
            what = "cloud-init is told nothing of the network: the LAN is not known"
            self.warnings.append(f"{what} for {', '.join(unknown)} (is the uplink there? Start the guest again then)")
            self._settings = ()
        servers = network_config(self._settings, resolvers())
        return open_seed(self._guest, cloud_init, network_config(self._settings, ()), servers)

    def _claim(self, disk: Disk, layers: Sequence[Layer]) -> None:
        """QEMU's locks would refuse it as well, but cannot say whose it is. Raises ``StartFailed``."""
        for depth, layer in enumerate(layers):
            write = not (depth or disk.readonly)
            status = self._refuse_used(layer.fd, f"disk image {disk.path}", write=write)
            self.uses.append((status.st_dev, status.st_ino, str(disk.path), write))

    def _refuse_used(self, fd: int, what: str, *, write: bool) -> os.stat_result:
        status = os.fstat(fd)
        guest, path, others = self._in_use.get((status.st_dev, status.st_ino), ("", "", False))
        if guest and (write or others):
            raise StartFailed(f"the {what} is in use by guest {guest}, which knows it as {path}")
        return status


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
