"""Who may do what: root always, others as polkit says, and where there is no polkit nobody else."""

from __future__ import annotations

from kvmd.errors import AccessDenied
from kvmd.systemd.sysbus import BusError, Message, MessageFlag, SystemBus, Variant

AUTHORITY = (
    "org.freedesktop.PolicyKit1",
    "/org/freedesktop/PolicyKit1/Authority",
    "org.freedesktop.PolicyKit1.Authority",
)
MANAGE = "org.kvmd1.manage-guests"
CONSOLE = "org.kvmd1.console"
ALLOW_USER_INTERACTION = 1  # polkit's CheckAuthorizationFlags
ABSENT = ("org.freedesktop.DBus.Error.ServiceUnknown", "org.freedesktop.DBus.Error.NameHasNoOwner")


async def authorise(bus: SystemBus, call: Message, action: str) -> None:
    """Return if the sender of ``call`` may do ``action``. Raises ``AccessDenied``, also for a sender unknown."""
    try:
        uid = await bus.uid(call.sender)
    except BusError as error:
        raise AccessDenied(f"{call.member} refused: the caller has left the bus") from error
    if uid == 0:
        return
    subject = ["system-bus-name", {"name": Variant("s", call.sender)}]
    flags = ALLOW_USER_INTERACTION if call.flags & MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION else 0
    try:
        (result,) = await bus.call(AUTHORITY, "CheckAuthorization", "(sa{sv})sa{ss}us", subject, action, {}, flags, "")
    except BusError as error:
        if error.name in ABSENT:
            raise AccessDenied(f"{call.member} is for root only: there is no polkit on this host (try sudo)") from error
        raise AccessDenied(f"{call.member} refused: polkit does not answer: {error}") from error
    allowed, challenge, _ = result
    if not allowed:
        hint = "authenticate, or try sudo" if challenge else "try sudo, or have a polkit rule allow it"
        raise AccessDenied(f"{call.member} refused: polkit's action {action} is not allowed to you ({hint})")
