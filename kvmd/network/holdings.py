"""What the kernel holds for the guests, settings and all the rest as one: compared with what is wanted, and changed."""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping
from itertools import groupby

from kvmd.network.kernel.netlink import Kernel
from kvmd.network.kernel.sysctl import Sysctls
from kvmd.network.model.plan import Plan
from kvmd.network.model.things import Failure, LinkState, Operation, Setting, Thing, diff


class Holdings:
    """Settings by /proc, the rest by netlink. Every call blocks, for as long as the kernel takes."""

    def __init__(self, kernel: Kernel, sysctls: Sysctls) -> None:
        self._kernel, self._sysctls = kernel, sysctls
        self._seen: tuple[bytes, list[Setting]] = (b"", [])

    def touched(self) -> bool:
        """Whether what makes no events, proxy entries and settings, is different from when this was last asked."""
        before, self._seen = self._seen, (self._kernel.proxies_unread(), self._sysctls.remembered())
        return self._seen != before

    def apply(
        self, plans: Mapping[str, Plan], every: bool, settled: Container[int], volatile: Collection[int]
    ) -> tuple[list[Thing], list[Failure]]:
        """Carry out ``plans``, by tap; ``every``: there are no others, and what else is held goes.

        ``settled`` taps have had their settings: of those only what the journal has is read again. ``volatile`` ones
        end with their guest. Returns what has been made, and what was refused: that stops none of the rest.
        """
        operations = self._difference(plans, every, settled)
        failures: list[Failure] = []
        for setting, group in groupby(operations, lambda operation: isinstance(operation.thing, Setting)):
            lot = list(group)
            failures += self._sysctls.apply(lot, volatile) if setting else self._kernel.apply(lot)
        refused = {failure.operation for failure in failures}
        return [item.thing for item in operations if item not in refused and item.action != "remove"], failures

    def _difference(self, plans: Mapping[str, Plan], every: bool, settled: Container[int]) -> list[Operation]:
        """Present is, in the order it is made in: settings, taps, neighbours, routes, proxies."""
        wanted = {key: thing for plan in plans.values() for key, thing in plan.things.items()}
        settings = self._sysctls.remembered() if every else []
        known = {setting.key for setting in settings}
        settings += self._sysctls.present(
            thing
            for key, thing in wanted.items()
            if isinstance(thing, Setting) and key not in known and thing.device not in settled
        )
        readable = {setting.key for setting in settings}
        present: list[Thing] = [*settings]
        taps = [plan.tap for plan in plans.values()]
        present += [LinkState(tap.index, tap.mac, tap.mtu, tap.up) for tap in taps]
        for device in (0,) if every else [plan.tap.index for plan in plans.values() if plan.nic.configure]:
            present += self._kernel.tap_addresses(device)
        for device in (0,) if every else [tap.index for tap in taps]:
            present += self._kernel.neighbours(device)
            present += self._kernel.routes(device)
        proxies, foreign = self._kernel.proxies()
        present += [proxy for proxy in proxies if every or proxy.key in wanted]
        taken = {proxy.key for proxy in foreign}  # answers already, and stays its owner's
        return diff(
            (
                thing
                for key, thing in wanted.items()
                if key not in taken and (not isinstance(thing, Setting) or key in readable)
            ),
            present,
        )
