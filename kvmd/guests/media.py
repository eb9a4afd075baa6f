"""What is in a guest's CD drives: changed while it runs, known to the next daemon, asked of QEMU before each change.

Each drive has two places for media, with a descriptor set and nodes of their own, which take turns: what comes next is
open before the last is taken out, and of what is out nothing is left.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from kvmd.config.values import Wrong, image
from kvmd.errors import Busy, StartFailed, Timeout, Unavailable
from kvmd.guest import Guest
from kvmd.guests.stall import Stall
from kvmd.qemu.drives import TURNS, Image, medium_name, medium_nodes, medium_set
from kvmd.qemu.files import open_file
from kvmd.qemu.qmp import Qmp, QmpRefused
from kvmd.runtime import Runtime

PATIENCE = 10.0  # seconds for storage
ASKED = 5.0  # seconds in which a guest that has locked its drive may open it


class Medium(NamedTuple):
    """An image, by path, and by device and inode."""

    path: str
    device: int
    inode: int


@dataclass
class Drive:
    """``media`` by turn; what ``holds`` says is in it, the other one comes or has gone."""

    media: dict[int, Medium] = field(default_factory=dict)
    holds: int | None = None
    opened: asyncio.Event = field(default_factory=asyncio.Event)  # its tray

    @property
    def medium(self) -> Medium | None:
        return None if self.holds is None else self.media.get(self.holds)


class Media:
    """Of one guest. Methods that change something raise ``KvmdError``."""

    def __init__(self, guest: Guest, runtime: Runtime, qmp: Qmp, stall: Stall) -> None:
        self._guest = guest
        self._runtime = runtime
        self._qmp = qmp
        self._stall = stall
        self._drives = {f"cdrom{number}": Drive() for number in range(len(guest.cdroms))}
        self._changing = False
        self._opening: asyncio.Task[int] | None = None

    @property
    def paths(self) -> dict[str, str]:
        """What is in each drive; "" in an empty one."""
        return {name: drive.medium.path if drive.medium else "" for name, drive in self._drives.items()}

    @property
    def uses(self) -> list[tuple[int, int, str, bool]]:
        """The images, as ``Machine.uses``."""
        media = (drive.medium for drive in self._drives.values())
        return [(medium.device, medium.inode, medium.path, False) for medium in media if medium]

    def begin(self, images: Sequence[Image]) -> None:
        """The guest starts with these, which are open: disks, CDs, and what else there is. Raises ``StartFailed``."""
        cds = zip(self._drives.values(), self._guest.cdroms, images[len(self._guest.disks) :], strict=False)
        for drive, cdrom, layers in cds:
            if layers:
                drive.media, drive.holds = {0: _medium(cdrom.path or Path(), layers[0].fd)}, 0
        self._save()

    def recall(self) -> None:
        """Of a guest that an earlier daemon started: what that one knew."""
        known = self._runtime.media()
        for (name, drive), cdrom in zip(self._drives.items(), self._guest.cdroms, strict=True):
            if name in known:
                drive.holds, media = known[name]
                drive.media = {turn: Medium(*medium) for turn, medium in media.items()}
            elif cdrom.path:  # started by a version that did not write it
                drive.media, drive.holds = {0: Medium(str(cdrom.path), 0, 0)}, 0
            self._tell(name)

    async def look(self) -> None:
        """What the drives have in them by now: an earlier daemon may have ended amid a change. Raises ``QmpError``."""
        for name in self._drives:
            await self._look(name)

    async def _look(self, name: str) -> None:
        with suppress(QmpRefused):  # a device of another kind, by [qemu] args
            node = await self._qmp.execute("qom-get", path=f"/machine/peripheral/{name}", property="drive")
            self._drives[name].holds = next((turn for turn in TURNS if node == medium_name(name, turn)), None)
            self._tell(name)

    def hear(self, event: Mapping[str, Any]) -> None:
        """DEVICE_TRAY_MOVED."""
        drive = self._drives.get(str(event.get("id", "")))
        if drive and event.get("tray-open") is True:
            drive.opened.set()

    async def insert(
        self, name: str, path: str, uid: int, in_use: Mapping[tuple[int, int], tuple[str, str, bool]]
    ) -> None:
        """In place of what is there. ``path``: as in a guest file, of one that user ``uid`` may read.

        ``in_use``: images of guests that run.
        """
        drive = self._drive(name)
        try:
            file = image(path)
        except Wrong as wrong:
            raise Unavailable(f"{wrong.what} ({wrong.hint})") from None
        with self._alone():
            fd = await self._open(file, uid)
            try:
                medium = self._claim(file, fd, in_use)
                await self._look(name)
                turn = next(turn for turn in TURNS if turn != drive.holds)
                await self._drop(name, turn)  # left by a daemon that was killed
                drive.media[turn] = medium
                self._save()
                try:
                    await self._add(name, turn, file, fd)
                    await self._take_out(name, force=False)
                    await self._qmp.execute("blockdev-insert-medium", id=name, **{"node-name": medium_name(name, turn)})
                except BaseException:
                    await self._drop(name, turn)
                    raise
                drive.holds = turn
                await self._qmp.execute("blockdev-close-tray", id=name)
            finally:
                os.close(fd)
                self._tell(name)

    async def eject(self, name: str, *, force: bool = False) -> None:
        """``force``: also where the guest has locked the drive, and may lose what it is reading."""
        self._drive(name)
        with self._alone():
            await self._look(name)
            await self._take_out(name, force=force)
            await self._qmp.execute("blockdev-close-tray", id=name)

    def _drive(self, name: str) -> Drive:
        if name in self._drives:
            return self._drives[name]
        has = (
            f"has {', '.join(self._drives)}" if self._drives else "has none: add [[cdrom]] to its file, and restart it"
        )
        raise Unavailable(f"guest {self._guest.name} has no drive {name!r} (it {has})")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """A change is not long, but for storage that does not answer: nobody queues for it."""
        if self._changing or (self._opening and not self._opening.done()):
            raise Busy(f"a drive of guest {self._guest.name} is just being changed (try again)")
        self._changing = True
        try:
            yield
        finally:
            self._changing = False

    async def _open(self, path: Path, uid: int) -> int:
        """In a thread, which goes on for as long as the storage takes."""
        self._opening = opening = asyncio.create_task(asyncio.to_thread(open_file, path, "CD image", uid=uid))
        try:
            if (await asyncio.wait((opening,), timeout=PATIENCE))[0]:
                return opening.result()
        except StartFailed as error:
            raise Unavailable(str(error)) from error
        except asyncio.CancelledError:
            opening.add_done_callback(_close)
            raise
        opening.add_done_callback(_close)
        raise Timeout(f"the storage of {path} does not answer (nothing was changed)")

    def _claim(self, path: Path, fd: int, in_use: Mapping[tuple[int, int], tuple[str, str, bool]]) -> Medium:
        medium = _medium(path, fd)
        guest, _path, write = in_use.get((medium.device, medium.inode), ("", "", False))
        if write:
            raise Unavailable(f"the CD image {path} is a disk that guest {guest} writes to (insert a copy of it)")
        return medium

    async def _add(self, name: str, turn: int, path: Path, fd: int) -> None:
        await self._qmp.execute_with(fd, "add-fd", **{"fdset-id": medium_set(name, turn)})
        for node in medium_nodes(name, turn, path):
            await self._qmp.execute("blockdev-add", **node)

    async def _take_out(self, name: str, *, force: bool) -> None:
        """The tray is open then."""
        drive = self._drives[name]
        await self._open_tray(name, force=force)
        before, drive.holds = drive.holds, None
        if before is not None:
            await self._drop(name, before)
        self._tell(name)

    async def _open_tray(self, name: str, *, force: bool) -> None:
        """And take out what was in it. Of a drive that is locked QEMU only asks the guest, and says nothing."""
        opened = self._drives[name].opened
        for patience in (ASKED, None):
            opened.clear()
            await self._qmp.execute("blockdev-open-tray", id=name, force=force)
            try:
                await self._qmp.execute("blockdev-remove-medium", id=name)
                return
            except QmpRefused:
                if patience:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(patience):
                            await opened.wait()
        hint = "unmount it there and try again, or ForceEjectMedia takes it away"
        raise Busy(f"guest {self._guest.name} has locked {name} and does not open it ({hint})")

    async def _drop(self, name: str, turn: int) -> None:
        """Close the image, and forget it."""
        node = medium_name(name, turn)
        for each in (node, f"{node}-file"):
            with suppress(QmpRefused):
                await self._qmp.execute("blockdev-del", **{"node-name": each})
        with suppress(QmpRefused):
            await self._qmp.execute("remove-fd", **{"fdset-id": medium_set(name, turn)})
        self._drives[name].media.pop(turn, None)

    def _tell(self, name: str) -> None:
        self._stall.name(name, self.paths[name])
        with suppress(StartFailed):  # /run is full; QEMU is asked what is where
            self._save()

    def _save(self) -> None:
        self._runtime.write_media({name: (drive.holds, drive.media) for name, drive in self._drives.items()})


def _medium(path: Path, fd: int) -> Medium:
    status = os.fstat(fd)
    return Medium(str(path), status.st_dev, status.st_ino)


def _close(opening: asyncio.Task[int]) -> None:
    """Nobody waits for it any more."""
    if not opening.cancelled() and not opening.exception():
        os.close(opening.result())
