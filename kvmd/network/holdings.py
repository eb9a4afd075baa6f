"""What the kernel holds for the guests, settings and all the rest as one: compared with what is wanted, and changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Container, Mapping, Sequence
from itertools import groupby

from kvmd.network.kernel.netlink import Kernel
from kvmd.network.kernel.sysctl import Sysctls
from kvmd.network.model.plan import Plan
from kvmd.network.model.things import (
    Failure,
    LinkState,
    Neighbour,
    Operation,
    Proxy,
    Route,
    Setting,
    TapAddress,
    Thing,
    diff,
)


class Holdings:
    """Settings by /proc, the rest by netlink. Every call blocks, for as long as the kernel takes."""

    def __init__(self, kernel: Kernel, sysctls: Sysctls) -> None:
        self._kernel, self._sysctls = kernel, sysctls
        self.plans: dict[str, Plan] = {}  # by tap, as last carried out
        self._uses: Counter[object] = Counter()  # how many of them want a thing, by its key
        self._seen: tuple[bytes, list[Setting]] = (b"", [])

    def touched(self) -> bool:
        """Whether what makes no events, proxy entries and settings, is neither as it was nor as it is wanted."""
        before, self._seen = self._seen, self._look()
        if self._seen == before:
            return False
        ours, foreign = self._kernel.proxies()
        taken = {proxy.key for proxy in foreign}
        wanted = {
            thing
            for plan in self.plans.values()
            for key, thing in plan.things.items()
            if isinstance(thing, Proxy) and key not in taken
        }
        return self._seen[1] != before[1] or wanted != {*ours}

    def _look(self) -> tuple[bytes, list[Setting]]:
        return self._kernel.proxies_unread(), self._sysctls.remembered()

    def apply(
        self, plans: Mapping[str, Plan | None], every: bool, settled: Container[int], volatile: Collection[int]
    ) -> tuple[list[Thing], list[Failure]]:
        """Carry out ``plans``, by tap, None where nothing is wanted any more; ``every``: what else is held goes, too.

        ``settled`` taps have had their settings: of those only what the journal has is read again. ``volatile`` ones
        end with their guest. Returns what has been made, and what was refused: that stops none of the rest.
        """
        before = [plan for name in plans if (plan := self.plans.get(name)) is not None]
        self._remember(plans)
        wanted = [plan for plan in plans.values() if plan is not None]
        over = {key: thing for plan in before for key, thing in plan.things.items() if not self._uses[key]}
        present, foreign = self._all(wanted, settled) if every else self._some(wanted, over, settled)
        operations = _difference(wanted, present, foreign)
        failures: list[Failure] = []
        for setting, group in groupby(operations, lambda operation: isinstance(operation.thing, Setting)):
            lot = list(group)
            failures += self._sysctls.apply(lot, volatile) if setting else self._kernel.apply(lot)
        if every:
            self._seen = self._look()
        refused = {failure.operation for failure in failures}
        return [item.thing for item in operations if item not in refused and item.action != "remove"], failures

    def _remember(self, plans: Mapping[str, Plan | None]) -> None:
        for name, plan in plans.items():
            before = self.plans.pop(name, None)
            if plan is before and plan is not None:
                self.plans[name] = plan
                continue
            if plan is not None:
                self.plans[name] = plan
                self._uses.update(plan.things.keys())
            for key in before.things if before is not None else ():
                self._uses[key] -= 1
                if not self._uses[key]:
                    del self._uses[key]

    def _all(self, wanted: Sequence[Plan], settled: Container[int]) -> tuple[list[Thing], list[Proxy]]:
        """What is held, in the order of making: settings, taps, neighbours, routes, proxies; and others' proxies."""
        settings = self._sysctls.remembered()
        known = {setting.key for setting in settings}
        present: list[Thing] = [*settings, *self._settings(wanted, settled, known), *_taps(wanted)]
        present += [*self._kernel.tap_addresses(), *self._kernel.neighbours(), *self._kernel.routes()]
        proxies, foreign = self._kernel.proxies()
        return [*present, *proxies], foreign

    def _some(
        self, wanted: Sequence[Plan], over: Mapping[object, Thing], settled: Container[int]
    ) -> tuple[list[Thing], list[Proxy]]:
        """As ``_all``, for some taps, and of what is ``over`` that which is still there."""
        present: list[Thing] = [*self._settings(wanted, settled, ()), *_taps(wanted)]
        if any(isinstance(thing, Setting) for thing in over.values()):
            present += [setting for setting in self._sysctls.remembered() if setting.key in over]
        left = [thing.device for thing in over.values() if isinstance(thing, Neighbour | Route | TapAddress)]
        for device in dict.fromkeys([*(plan.tap.index for plan in wanted if plan.nic.configure), *left]):
            present += self._kernel.tap_addresses(device)
        for device in dict.fromkeys([*(plan.tap.index for plan in wanted), *left]):
            present += self._kernel.neighbours(device)
            present += self._kernel.routes(device)
        things = [*(thing for plan in wanted for thing in plan.things.values()), *over.values()]
        proxies, foreign = self._kernel.proxies_like([thing for thing in things if isinstance(thing, Proxy)])
        return [*present, *proxies], foreign

    def _settings(self, plans: Sequence[Plan], settled: Container[int], known: Container[object]) -> list[Setting]:
        """What those that are wanted are now, but for ``settled`` taps, and for what is ``known``."""
        return self._sysctls.present(
            {
                key: thing
                for plan in plans
                for key, thing in plan.things.items()
                if isinstance(thing, Setting) and key not in known and thing.device not in settled
            }.values()
        )


def _taps(plans: Sequence[Plan]) -> list[LinkState]:
    return [LinkState(plan.tap.index, plan.tap.mac, plan.tap.mtu, plan.tap.up) for plan in plans]


def _difference(plans: Sequence[Plan], present: Sequence[Thing], foreign: Sequence[Proxy]) -> list[Operation]:
    taken = {proxy.key for proxy in foreign}  # answers already, and stays its owner's
    readable = {thing.key for thing in present if isinstance(thing, Setting)}
    wanted = {key: thing for plan in plans for key, thing in plan.things.items()}
    return diff(
        (
            thing
            for key, thing in wanted.items()
            if key not in taken and (not isinstance(thing, Setting) or key in readable)
        ),
        present,
    )
