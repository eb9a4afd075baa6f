"""The lab: disposable systemd hosts with a LAN around them, and guests to run on them.

store     the cache: build once, under a lock, whole or not at all
roots     Debian trees, a kvmd package on top, and where packages are built
guests    kernel, initrd and ROM of guests
media     installer on a CD, systems that are not Linux
rom       a guest that costs nothing: it speaks steadily and obeys the power button
runs      directory and cgroup of one run; cleaning up after the dead
machine   what one can do with a host: run, write, journal, state
lan       switch, router, neighbours, as network namespaces inside a host
host      Host: a container, up in half a second
vm        VM: a whole machine with /dev/kvm, cgroup controllers and a real reboot
"""

from . import guests, media, roots, vm
from .host import Host
from .lan import Lan, Neighbour
from .machine import Entry, Failed, Machine, read_lines
from .roots import deb
from .store import LabError
from .vm import VM

__all__ = [
    "VM",
    "Entry",
    "Failed",
    "Host",
    "LabError",
    "Lan",
    "Machine",
    "Neighbour",
    "deb",
    "guests",
    "media",
    "read_lines",
    "roots",
    "vm",
]
