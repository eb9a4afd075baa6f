"""The network interfaces of one guest that runs: claimed on the LAN, told their addresses, given up."""

from __future__ import annotations

from collections.abc import Coroutine
from contextlib import AsyncExitStack
from typing import Any

from kvmd.errors import KvmdError, Unavailable
from kvmd.guest import Guest, Nic
from kvmd.network.dnsmasq import Dnsmasq
from kvmd.network.lan import Lan


class Nics:
    """From the moment their taps are there."""

    def __init__(self, guest: Guest, lan: Lan, dnsmasq: Dnsmasq) -> None:
        self._guest = guest
        self._lan = lan
        self._dnsmasq = dnsmasq

    def claims(self) -> list[Coroutine[Any, Any, None]]:
        """For each one: claim its addresses, once nobody else turns out to have them; raises ``KvmdError``."""
        return [self._claim(nic) for nic in self._guest.nics]

    async def _claim(self, nic: Nic) -> None:
        await self._lan.check(nic)
        try:
            await self._lan.ready(nic.tap)
        except Unavailable:
            if nic.uplink:
                raise  # a default route may still come, a name that was typed wrong does not

    async def configure(self, undo: AsyncExitStack) -> None:
        """Tell the guest, where it is to be told. Raises ``StartFailed``."""
        for nic in self._guest.nics:
            undo.push_async_callback(self._dnsmasq.end, nic)
            await self._configure(nic)

    async def _configure(self, nic: Nic) -> None:
        if terms := self._lan.status(nic.tap).terms:
            await self._dnsmasq.serve(self._guest, terms)

    async def configure_again(self) -> list[KvmdError]:
        """The LAN has changed, perhaps; what it cannot be told."""
        errors: list[KvmdError] = []
        for nic in self._guest.nics:
            try:
                await self._configure(nic)
            except KvmdError as error:
                errors.append(error)
        return errors

    def adopt(self, undo: AsyncExitStack) -> None:
        """An earlier daemon claimed and configured them."""
        for nic in self._guest.nics:
            undo.push_async_callback(self._lan.withdraw, nic.tap)
            undo.push_async_callback(self._dnsmasq.end, nic)

    async def forget(self) -> None:
        """The guest boots anew: so do those who tell it its addresses."""
        for nic in self._guest.nics:
            await self._dnsmasq.forget(nic)

    def give_up(self) -> None:
        """The guest is about to end."""
        for nic in self._guest.nics:
            self._lan.give_up(nic.tap)

    def indexes(self) -> list[int]:
        """Of those taps that there are."""
        return [index for nic in self._guest.nics if (index := self._lan.status(nic.tap).index)]
