"""A guest as the manager knows it: from its file, from a running QEMU, or both."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from kvmd.config.directory import Entry
from kvmd.errors import InvalidConfiguration
from kvmd.guest import Guest, Nic
from kvmd.guests.machine import Machine, State
from kvmd.network.lan import Lan
from kvmd.systemd.sysbus import Variant


@dataclass
class Known:
    name: str
    file: Entry = field(default_factory=Entry)
    run: Machine | None = None
    starting: asyncio.Task[None] | None = None
    failed: str = ""  # the result of a run before this daemon's time

    @property
    def state(self) -> State:
        if self.run:
            return self.run.state
        return State.FAILED if self.failed else State.STOPPED

    @property
    def result(self) -> str:
        return self.run.result if self.run else self.failed or "success"

    @property
    def on(self) -> bool:
        """Whether there is a QEMU, or about to be."""
        return self.run is not None and not self.run.closed.is_set()

    @property
    def up(self) -> bool:
        """Whether its QEMU runs, and is neither being started nor stopped."""
        return self.state in (State.RUNNING, State.PAUSED)

    @property
    def shown(self) -> bool:
        """On the bus: guests with a usable file, and those that run."""
        return self.file.guest is not None or self.on

    @property
    def current(self) -> Guest | None:
        """As it was started if it runs, else as in its file."""
        return self.run.guest if self.run and self.on else self.file.guest

    def guest(self) -> Guest:
        """As in its file. Raises ``InvalidConfiguration`` with all that is wrong there."""
        if self.file.guest is None:
            raise InvalidConfiguration(self.file.problems)
        return self.file.guest

    def properties(self, lan: Lan) -> dict[str, object]:
        """org.kvmd1.Guest, for everybody. Raises ``InvalidConfiguration`` if it is off and has no usable file."""
        run = self.run if self.on else None
        guest = self.current
        if guest is None:
            raise InvalidConfiguration([problem.for_everybody() for problem in self.file.problems])
        return {
            "Name": self.name,
            "Description": guest.description,
            "UUID": str(guest.uuid),
            "State": self.state.value,
            "StateReason": run.reason if run else "",
            "Result": self.result,
            "Ready": run is not None and run.ready.is_set(),
            "Unit": guest.unit,
            "PID": run.pid if run else 0,
            "Accelerator": run.accelerator if run else "",
            "ConfigFile": str(guest.file),
            "NeedsRestart": run is not None and self.file.guest != run.guest,
            "Autostart": self.file.guest.autostart if self.file.guest else False,
            "TimeoutStopUSec": round(guest.stop_timeout * 1_000_000),
            "StartTimestamp": run.started if run else 0,
            "Networks": [_network(nic, lan) for nic in guest.nics],
            "Media": run.steering.media.paths if run else _media(guest),
            "SerialBytes": self.run.serial_bytes if self.run else 0,
            "SerialPending": self.run.serial_pending if self.run else 0,
        }


def _media(guest: Guest) -> dict[str, str]:
    return {f"cdrom{number}": str(cdrom.path or "") for number, cdrom in enumerate(guest.cdroms)}


def _network(nic: Nic, lan: Lan) -> dict[str, Variant]:
    status = lan.status(nic.tap)
    values = {"tap": nic.tap, "uplink": status.uplink, "mac": nic.mac, "state": status.state, "detail": status.detail}
    return {
        **{key: Variant("s", value) for key, value in values.items()},
        "ifindex": Variant("u", status.index),
        "addresses": Variant("as", [str(address) for address in nic.addresses]),
    }
