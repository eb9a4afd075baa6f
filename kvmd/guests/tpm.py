"""A guest's TPM: swtpm, started before QEMU in a scope and as a user of its own."""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection
from contextlib import AsyncExitStack

from kvmd.guest import Guest
from kvmd.guests.helper import Helper
from kvmd.qemu import tpm, users
from kvmd.qemu.process import Descriptors, Process, User, spawn
from kvmd.systemd import scope
from kvmd.systemd.units import Systemd


class Tpm(Helper):
    """Nothing, where the guest has none."""

    def __init__(self, guest: Guest, systemd: Systemd, off: Callable[[], bool], say_lost: Callable[[], None]) -> None:
        super().__init__(guest.tpm_scope, systemd, off, say_lost)
        self._guest = guest
        self.user: User | None = None

    def choose_user(self, taken: Collection[int]) -> dict[str, bytes]:
        """What /run/kvmd/NAME has to say of it. Raises ``StartFailed``."""
        if not self._guest.tpm:
            return {}
        self.user = users.choose(self._guest.name, taken, "TPM")
        return {"tpm": f"{self.user.uid}\n".encode()}

    async def start(
        self, descriptors: Descriptors, for_qemu: Descriptors, stderr: Callable[[], int], undo: AsyncExitStack
    ) -> int | None:
        """With its state, which is in ``descriptors``; the stream ``for_qemu``. Raises ``StartFailed``."""
        if not self.user:
            return None
        [state] = descriptors.numbers
        ours, theirs = socket.socketpair()
        stream = for_qemu.take(ours.detach())
        command = tpm.swtpm(state, descriptors.take(theirs.detach()))
        users.publish(self._guest.name, self.user, "TPM")
        process, release, give_up = await spawn(command, descriptors, self.user, descriptors.take(stderr()))
        self.own(undo, process)
        try:
            await self._systemd.start_transient(self.unit, scope.tpm_properties(self._guest, process.pid))
        except BaseException:
            give_up()
            raise
        release()
        return stream

    async def adopt(self, qemu: Process, undo: AsyncExitStack) -> None:
        if self._guest.tpm:
            await super().adopt(qemu, undo)

    def watch(self, qemu: Process) -> None:
        if self._guest.tpm:
            super().watch(qemu)
