"""A kvm or qemu-system command line → draft. Source: qemu(1), of 2008 and of today."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from posixpath import basename, join

from kvmd.ctl.foreign import shell
from kvmd.ctl.foreign.draft import CHOOSE, FRESH, SEALED, Draft, NotReadable
from kvmd.ctl.foreign.drives import Drives
from kvmd.ctl.foreign.options import key_values, on, size
from kvmd.ctl.foreign.passed import Passed

PROGRAM = re.compile(r"(.*/)?(kvm|qemu|qemu-kvm|qemu-system-(x86_64|i386))")
BEFORE = re.compile(r"(.*/)?(sudo|exec|nohup|env|nice|ionice|taskset|setsid|time)|-.*|[0-9,-]+|\w+=.*")
LETTERS = {"c": "disk", "d": "cdrom", "n": "network"}

FLAGS = {
    *("enable-kvm", "no-kvm", "no-reboot", "no-shutdown", "nographic", "snapshot", "S", "s", "daemonize", "usb"),
    *("no-acpi", "no-hpet", "no-fd-bootchk", "win2k-hack", "full-screen", "nodefaults", "no-user-config"),
    *("mem-prealloc", "localtime", "sdl", "curses", "no-quit", "alt-grab", "ctrl-grab", "no-frame", "std-vga"),
    *("singlestep", "portrait", "only-migratable", "preconfig", "enable-fips", "show-cursor", "no-kvm-irqchip"),
    *("no-kvm-pit", "nodefconfig"),
}

# How QEMU's process and its windows are run, which is kvmd's, and tuning.
OURS = {
    *("enable-kvm", "no-kvm-irqchip", "no-kvm-pit", "S", "s", "daemonize", "usb", "no-fd-bootchk", "win2k-hack"),
    *("sdl", "full-screen", "nodefaults", "no-user-config", "nodefconfig", "mem-prealloc", "curses", "no-quit"),
    *("alt-grab", "ctrl-grab", "no-frame", "std-vga", "display", "vga", "pidfile", "chroot", "sandbox"),
    *("msg", "overcommit", "chardev", "mon", "no-shutdown", "nographic", "D", "d", "gdb", "show-cursor", "portrait"),
    *("debugcon", "only-migratable", "preconfig", "enable-fips", "tdf", "L", "rtc-td-hack", "no-hpet"),
    *("balloon", "k"),
}
UNKNOWN = ("kvmd does not know it", "[qemu] args takes it, if you need it")
FORWARDS = ("no ports are forwarded", "the guest has addresses of its own")
ELSEWHERE = {
    "snapshot": ("kvmd writes to the image", "lay a disk over it: base = the image, path = a new one"),
    "no-reboot": ("a guest that reboots goes on", ""),
    "no-acpi": ("a guest has ACPI", ""),
    "fda": ("a guest has no floppy", "kvmctl install, from a CD"),
    "fdb": ("a guest has no floppy", ""),
    "spice": ("kvmd shows screens by VNC", "kvmctl view"),
    "smbios": ("kvmd does not know it", "[credentials] hands credentials of systemd over"),
    "monitor": ("QEMU's monitor is kvmd's alone", "kvmctl steers the guest"),
    "qmp": ("QEMU's monitor is kvmd's alone", "kvmctl steers the guest"),
    "loadvm": ("kvmd has no snapshots of a running guest", ""),
    "incoming": ("kvmd does not migrate guests", ""),
    "soundhw": ("a guest has no sound", ""),
    "audiodev": ("a guest has no sound", ""),
    "audio": ("a guest has no sound", ""),
    "tftp": ("a guest boots from its LAN", "[boot] order with network"),
    "redir": FORWARDS,
}
SILENT_SERIAL = ("stdio", "mon:stdio", "pty", "null", "none", "vc", "chardev:")


def read(text: str, directory: str, environment: Mapping[str, str]) -> Draft:
    """``directory``: what paths are relative to, unless the script changes it. Raises ``NotReadable``."""
    commands, _variables = shell.read(text, environment)
    for words in commands:
        if words[0] == "cd" and len(words) == 2:
            directory = join(directory, words[1])
        at = next((at for at, word in enumerate(words) if not BEFORE.fullmatch(word)), len(words))
        if at < len(words) and PROGRAM.fullmatch(words[at]):
            return Command(directory).read(words[at + 1 :])
    raise NotReadable("it has no command line of kvm, qemu-kvm or qemu-system-x86_64 in it")


class Command:
    """Gathers the options, then puts drives and interfaces together, which are spread over several."""

    def __init__(self, directory: str) -> None:
        self.draft = Draft()
        self.drives = Drives(self.draft, directory)
        self.passed = Passed(self.draft, self.drives.absolute)
        self._nics: list[tuple[str, str, str]] = []  # model, MAC address, id of the backend
        self._backends: dict[str, dict[str, str]] = {}
        self._localtime = False
        self._machine = "pc"
        self._handlers: dict[str, Callable[[str], None]] = {
            "m": self._memory,
            "smp": self._cpus,
            "cpu": self._cpu,
            **dict.fromkeys(("machine", "M"), self._machine_of),
            "accel": lambda said: self._accel(key_values(said, "accel").get("accel", "")),
            "no-kvm": lambda _said: self._accel("tcg"),
            "name": lambda said: setattr(self.draft, "name", key_values(said, "guest").get("guest", "")),
            "uuid": self.draft.set_uuid,
            "boot": self._boot,
            **dict.fromkeys(("kernel", "initrd"), lambda _said: None),
            "append": lambda said: self.draft.boot.update(cmdline=" ".join(said.split())),
            "bios": self._bios,
            "net": self._net,
            "netdev": self._netdev,
            "nic": self._nic,
            "device": self._device,
            "tpmdev": self._tpm,
            "vnc": self._vnc,
            "serial": self._serial,
            "rtc": self._rtc,
            "localtime": lambda _said: setattr(self, "_localtime", True),
            "object": self._object,
        }

    def read(self, words: list[str]) -> Draft:
        rest = iter(words)
        for word in rest:
            if not word.startswith("-"):
                if re.match(r"[0-9]*[<>]", word):  # the shell's
                    break
                self.drives.option("hda", word)
                continue
            option = word.removeprefix("-").removeprefix("-")
            value = "" if option in FLAGS else next(rest, "")
            self._option(option, value)
        self._finish()
        return self.draft

    def _option(self, option: str, value: str) -> None:
        if option in ("kernel", "initrd"):
            self.draft.set_boot(option, self.drives.absolute(value))
        elif option in self._handlers:
            self._handlers[option](value)
        elif self.drives.option(option, value) or self.passed.option(option, value) or option in OURS:
            return
        elif option in ELSEWHERE and not (option in ("monitor", "qmp") and value in ("none", "stdio", "vc", "null")):
            self.draft.miss(f"-{option} {value}".rstrip(), *ELSEWHERE[option])
        elif option not in ELSEWHERE:
            self.draft.miss(f"-{option} {value}".rstrip(), *UNKNOWN)

    def _memory(self, said: str) -> None:
        found = size(key_values(said, "size").get("size", ""), 1 << 20)
        if found is None:
            self.draft.miss(f"-m {said}", "it is no size", "the file says nothing: 512M")
        else:
            self.draft.set_memory(found)

    def _cpus(self, said: str) -> None:
        given = key_values(said, "cpus")
        counts = {key: int(value) for key, value in given.items() if value.isdecimal()}
        count = counts.get("cpus", counts.get("sockets", 1) * counts.get("cores", 1) * counts.get("threads", 1))
        if 1 <= count <= 1024:
            self.draft.top["cpus"] = count
        if len(counts.keys() - {"cpus"}) and count > 1:
            self.draft.miss(f"-smp {said}", f"the guest has {count} CPUs, as QEMU arranges them", "-smp in [qemu] args")

    def _cpu(self, said: str) -> None:
        if said != "host":
            self.draft.set_cpu(said)

    def _machine_of(self, said: str) -> None:
        given = key_values(said, "type")
        self._machine = given.get("type", self._machine)
        self._accel(given.get("accel", ""))
        if "pflash0" in given:
            self._uefi(given["pflash0"])

    def _accel(self, said: str) -> None:
        if said.split(":")[0] == "tcg":
            self.draft.top["accelerator"] = "tcg"

    def _uefi(self, path: str) -> None:
        if self.draft.top.get("firmware") != "uefi":
            self.draft.top["firmware"] = "uefi"
            self.draft.miss("UEFI's variables", FRESH, CHOOSE)
        if "secboot" in basename(path) or basename(path).endswith(".ms.fd"):
            self.draft.top["secure_boot"] = True
            self.draft.miss(
                "Secure Boot's keys", "Microsoft's are enrolled", "remove secure_boot if it had others, or none"
            )

    def _bios(self, said: str) -> None:
        if re.search("ovmf|edk2|uefi", said, re.IGNORECASE):
            self._uefi(said)
        else:
            self.draft.miss(f"-bios {said}", "kvmd has SeaBIOS and OVMF", 'firmware = "uefi" is OVMF')

    def _boot(self, said: str) -> None:
        given = key_values(said, "order")
        order = [LETTERS[letter] for letter in given.get("order", "") if letter in LETTERS]
        if order:
            self.draft.boot["order"] = [*order, *(["disk"] if "disk" not in order else [])]
        if order[:1] == ["cdrom"]:
            todo = "remove boot.order once the system is on its disk"
            self.draft.miss("boot from CD", "it is at each start, as it was", todo)
        if "a" in given.get("order", ""):
            self.draft.miss("boot from a floppy", "a guest has none")
        if once := given.get("once"):
            kind = LETTERS.get(once[0], "cdrom")
            self.draft.miss(f"-boot once={once}", "a file is for each start", f"kvmctl start NAME --boot {kind}")

    def _net(self, said: str) -> None:
        """The old way: -net nic and -net tap meet by their number, or by an id."""
        given = key_values(said, "type")
        kind = given.get("type", "")
        if kind == "nic":
            self._nics.append((given.get("model", "?"), given.get("macaddr", ""), given.get("netdev", "")))
        elif kind != "none":
            self._backends[f"-net {len(self._backends)}"] = given

    def _netdev(self, said: str) -> None:
        given = key_values(said, "type")
        self._backends[given.get("id", "")] = given

    def _nic(self, said: str) -> None:
        given = key_values(said, "type")
        if given.get("type") != "none":
            name = f"-nic {len(self._nics)}"
            self._backends[name] = given
            self._nics.append((given.get("model", "?"), given.get("mac", ""), name))

    def _device(self, said: str) -> None:
        given = key_values(said, "driver")
        driver = given.get("driver", "")
        if "netdev" in given:
            model = re.sub(r"^virtio-net.*", "virtio", driver)
            self._nics.append((model, given.get("mac", ""), given["netdev"]))
        elif driver == "virtserialport":
            self._port(given.get("name", ""))
        elif not self.passed.device(driver, given, said) and not self.drives.device(driver, given):
            self.draft.miss(f"-device {said}", *UNKNOWN)

    def _port(self, name: str) -> None:
        if name == "org.qemu.guest_agent.0":
            self.draft.agent = True
        elif not name.startswith("com.redhat.spice"):
            self.draft.miss(f"port {name}", "kvmd has none")

    def _object(self, said: str) -> None:
        if not said.startswith(("rng-", "memory-backend-", "iothread", "secret")):
            self.draft.miss(f"-object {said}", *UNKNOWN)

    def _tpm(self, said: str) -> None:
        if said.startswith("emulator"):
            self.draft.tpm = True
            self.draft.miss("the TPM's state", "the guest gets an empty one", SEALED)
        else:
            self.draft.miss(f"-tpmdev {said}", "kvmd emulates a TPM", "enabled = true under [tpm]")

    def _vnc(self, said: str) -> None:
        match = re.fullmatch(r"(?:vnc=)?(.*):([0-9]{1,4})(,.*)?", said)
        if match:
            self.draft.set_vnc(match[1], 5900 + int(match[2]))
        elif said.split(",")[0] != "none":
            self.draft.miss(f"-vnc {said}", "kvmd has a socket of its own for it", "kvmctl view")

    def _serial(self, said: str) -> None:
        if not said.startswith(SILENT_SERIAL):
            self.draft.miss(f"-serial {said}", "the serial port is in the journal", "kvmctl log, kvmctl console")

    def _rtc(self, said: str) -> None:
        base = key_values(said, "base").get("base", "")
        if base == "localtime":
            self._localtime = True
        elif base not in ("", "utc"):
            self.draft.miss(f"-rtc {said}", "the clock is the host's", "set it in the guest")

    def _finish(self) -> None:
        self.draft.set_machine(self._machine)
        self.drives.finish()
        self.passed.finish()
        if self.drives.pflash:
            self._uefi(self.drives.pflash)
        self._interfaces()
        hyperv = "hv_" in str(self.draft.top.get("cpu", "")) or "hv-" in str(self.draft.top.get("cpu", ""))
        if hyperv:
            self.draft.top["profile"] = "windows"
            cpu = self.draft.top.pop("cpu")
            self.draft.miss(f"CPU {cpu}", 'Hyper-V\'s interfaces come with profile = "windows"', "set cpu for another")
        elif self._localtime:
            self.draft.local_time()

    def _interfaces(self) -> None:
        """An interface without a model has QEMU's default of the machine; without -net at all QEMU makes one, too."""
        named = {backend for _model, _mac, backend in self._nics if backend}
        free = [key for key in self._backends if key not in named]
        for model, mac, wanted in self._nics:
            backend = self._backends.get(wanted or (free.pop(0) if free else ""), {})
            kind, tap = backend.get("type", ""), backend.get("ifname", "")
            default = "e1000" if self.draft.machine == "pc" else "e1000e"
            self.draft.add_nic(f"{kind} {backend.get('br', '')}".strip(), default if model == "?" else model, mac)
            label = f"network interface {len(self.draft.nics)}"
            self.draft.name_interface("tap", tap)
            if backend.get("script", "no") != "no":
                script = f"{label}: script {backend['script']}"
                self.draft.miss(script, "kvmd sets up the host's side", "what else it does is yours")
            if "hostfwd" in backend:
                self.draft.miss(f"{label}: hostfwd={backend['hostfwd']}", *FORWARDS)
            if on(backend.get("restrict", "off")):
                self.draft.miss(f"{label}: restrict", "the guest is on the LAN", "leave address out")
