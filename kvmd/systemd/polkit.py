"""Who may do what: root always, others as polkit says, and where there is no polkit nobody else."""

from __future__ import annotations

import asyncio
from itertools import count
from weakref import WeakValueDictionary

from kvmd.errors import AccessDenied
from kvmd.systemd.sysbus import BusError, Incoming, SystemBus, Variant

AUTHORITY = (
    "org.freedesktop.PolicyKit1",
    "/org/freedesktop/PolicyKit1/Authority",
    "org.freedesktop.PolicyKit1.Authority",
)
MANAGE = "org.kvmd1.manage-guests"
CONSOLE = "org.kvmd1.console"
ALLOW_USER_INTERACTION = 1  # polkit's CheckAuthorizationFlags
ABSENT = ("org.freedesktop.DBus.Error.ServiceUnknown", "org.freedesktop.DBus.Error.NameHasNoOwner")

# Questions at a time. With WAITING they stay below the 128 replies that the bus lets one connection wait for.
RULES = 16  # polkit answers these by itself,
PEOPLE = 32  # these by somebody who types a password, or does not,
PEOPLE_OF_USER = 4
PATIENCE = 300.0  # seconds for that


class Polkit:
    """polkit's answers, and room for the questions: nobody waits for another user's password."""

    def __init__(self, bus: SystemBus) -> None:
        self._bus = bus
        self._rules = asyncio.Semaphore(RULES)
        self._people = asyncio.Semaphore(PEOPLE)
        self._of_user: WeakValueDictionary[int, asyncio.Semaphore] = WeakValueDictionary()
        self._in_turn: WeakValueDictionary[int, asyncio.Lock] = WeakValueDictionary()
        self._cancellations = count(1)

    async def authorise(self, call: Incoming, uid: int, action: str, guest: str) -> None:
        """Return if ``uid``, the sender of ``call``, may do ``action`` to ``guest``, if any. Raises ``AccessDenied``.

        A rule sees the guest and the method: ``action.lookup("guest")``, ``action.lookup("verb")``.
        """
        if uid == 0:
            return
        async with self._in_turn.setdefault(uid, asyncio.Lock()):
            allowed, challenge = await self._check(call, action, guest, self._rules)
        if challenge and call.interactive:
            allowed, challenge = await self._ask(call, uid, action, guest)
        if not allowed:
            hint = "authenticate, or try sudo" if challenge else "try sudo, or have a polkit rule allow it"
            raise AccessDenied(f"{call.member} refused: polkit's action {action} is not allowed to you ({hint})")

    async def _ask(self, call: Incoming, uid: int, action: str, guest: str) -> tuple[bool, bool]:
        """Have polkit ask a person, who may take their time; where the caller leaves the bus it gives that up."""
        of_user = self._of_user.setdefault(uid, asyncio.Semaphore(PEOPLE_OF_USER))
        if of_user.locked():
            raise AccessDenied(f"{call.member} refused: too many of your calls wait for polkit (answer it, or cancel)")
        if self._people.locked():
            raise AccessDenied(f"{call.member} refused: too many users' calls wait for polkit (try sudo, or later)")
        cancellation = f"kvmd-{next(self._cancellations)}"
        async with of_user:
            try:
                return await self._check(
                    call, action, guest, self._people, ALLOW_USER_INTERACTION, cancellation, PATIENCE
                )
            except BaseException:
                self._bus.post(AUTHORITY, "CancelCheckAuthorization", "s", cancellation)
                raise

    async def _check(
        self,
        call: Incoming,
        action: str,
        guest: str,
        room: asyncio.Semaphore,
        flags: int = 0,
        cancellation: str = "",
        patience: float = 30.0,
    ) -> tuple[bool, bool]:
        """Whether it is allowed, and if not, whether it may be to who authenticates."""
        subject = ["system-bus-name", {"name": Variant("s", call.sender)}]
        try:
            (result,) = await self._bus.call(
                AUTHORITY,
                "CheckAuthorization",
                "(sa{sv})sa{ss}us",
                *(subject, action, {"guest": guest, "verb": call.member}, flags, cancellation),
                returns="(bba{ss})",
                patience=patience,
                room=room,
            )
        except BusError as error:
            if error.name in ABSENT:
                text = f"{call.member} is for root only: there is no polkit on this host (try sudo)"
                raise AccessDenied(text) from error
            raise AccessDenied(f"{call.member} refused: polkit does not answer: {error}") from error
        allowed, challenge, _details = result
        return allowed, challenge
