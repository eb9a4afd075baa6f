"""How a guest ended: by QEMU's last word, and by what systemd knows of its units."""

from __future__ import annotations

from kvmd.guest import Guest
from kvmd.systemd.journal import Event
from kvmd.systemd.units import Systemd

SUCCESS, TIMEOUT, PANIC, CRASH, OOM = "success", "timeout", "guest-panic", "crashed", "oom-kill"  # Result on the bus
ASKED_FOR = (SUCCESS, TIMEOUT)
EVENTS = {
    SUCCESS: Event.STOPPED,
    TIMEOUT: Event.CUT,
    PANIC: Event.PANICKED,
    CRASH: Event.CRASHED,
    OOM: Event.OUT_OF_MEMORY,
}
REASONS = {
    CRASH: "QEMU was killed or crashed",
    PANIC: "its kernel panicked",
    OOM: "it was killed for lack of memory (its MemoryMax must exceed the guest's memory by some 100 MiB)",
}

LOST_TPM = "its TPM, swtpm, was killed or crashed, and QEMU ends when a guest without its TPM is reset"


async def judge(systemd: Systemd, guest: Guest, last_word: str, timed_out: bool, adopted: bool) -> str:
    """The result. ``last_word``: of the last SHUTDOWN event (qapi/run-state.json); killed or crashed, QEMU sends none.

    An ``adopted`` one may have ended before anybody listened. Raises ``BusError``.
    """
    limits = await systemd.scope_result(guest.scope) if not last_word else ""
    if timed_out:
        return TIMEOUT
    if last_word:
        return PANIC if last_word == PANIC else SUCCESS
    if adopted:
        await systemd.settled(guest.unit)
        if (await systemd.service_result(guest.unit))[0] == "success":
            return SUCCESS
    return OOM if limits == "oom-kill" else CRASH
