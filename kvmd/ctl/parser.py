"""The verbs of kvmctl and their options. Each names the room that does it: ``kvmd.ctl.ROOM.run(arguments)``."""

from __future__ import annotations

import argparse
from typing import Any

from kvmd import __version__

DESCRIPTION = "Steers the guests of kvmd."
EPILOG = """Guests are named by their files, /etc/kvmd/NAME.toml; where several can be named, so can patterns: 'web*'.

Exit status: 0 done, 1 failed, 2 wrong usage, 3 not running (status), 4 no such guest, 130 interrupted.
See kvmctl(1), and kvmd.toml(5) for what a guest file may say."""


class Parser(argparse.ArgumentParser):
    """Knows the verbs, for tests and completion."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.verbs: dict[str, Parser] = {}


def parser() -> Parser:
    top = Parser(prog="kvmctl", description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"kvmctl {__version__}")
    _common(top, json=False, host=None)
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, room: str, text: str, **options: Any) -> Parser:
        added: Parser = verbs.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog="See kvmctl(1).",
            allow_abbrev=False,
            **options,
        )
        added.set_defaults(room=room)
        _common(added, json=argparse.SUPPRESS, host=argparse.SUPPRESS)
        top.verbs[name] = added
        return added

    def several(parser: Parser, least: str = "+") -> None:
        parser.add_argument("names", nargs=least, metavar="NAME", help="a guest, or a pattern")

    def one(parser: Parser) -> None:
        parser.add_argument("name", metavar="NAME", help="a guest")

    def waits(parser: Parser) -> None:
        parser.add_argument("--no-wait", action="store_true", help="return once it is under way")
        parser.add_argument("--timeout", type=float, metavar="SECONDS", help="how long to wait; the guest goes on")

    added = verb("list", "listing", "list guests, those that are off, too")
    several(added, "*")
    added.add_argument("-w", "--watch", action="store_true", help="go on as they change")
    added.add_argument("--no-legend", action="store_true", help="without the names of columns")
    added.add_argument("--all-hosts", action="store_true", help="those of group.hosts in kvmd.conf, by ssh")
    added = verb("status", "listing", "show guests with their last serial lines")
    several(added, "*")
    added.add_argument("-n", "--lines", type=int, default=5, metavar="COUNT", help="how many of these (default 5)")
    added = verb("top", "listing", "show what running guests use, again and again")
    several(added, "*")
    added.add_argument(
        "-d", "--delay", type=float, default=2.0, metavar="SECONDS", help="from look to look (default 2)"
    )
    added.add_argument("--once", action="store_true", help="look once only")

    added = verb("start", "steering", "start guests, and wait until they are ready")
    several(added)
    waits(added)
    added.add_argument("--boot", choices=("disk", "cdrom", "network"), help="boot from it, this once")
    added.add_argument("--cdrom", metavar="ISO", help="with this in the CD drive, this once")
    added.add_argument("--console", action="store_true", help="attach to the console of the one guest")
    added = verb("stop", "steering", "shut guests down: gracefully, then by force after their stop_timeout")
    several(added)
    waits(added)
    added.add_argument("--now", action="store_true", help="cut the power")
    added = verb("restart", "steering", "shut guests down and start them again")
    several(added)
    waits(added)
    several(verb("reset", "steering", "press the reset button"))
    several(verb("pause", "steering", "freeze guests"))
    several(verb("resume", "steering", "let frozen guests go on, and wake sleeping ones"))

    added = verb("console", "console", "attach to a guest's serial console; ^] three times within a second leaves")
    one(added)
    added.add_argument("--escape", default="]", metavar="CHAR", help="leave by this control character instead of ^]")
    added.add_argument("--resize", action="store_true", help="tell the guest's shell the size of this terminal")
    added.add_argument("--lines", type=int, default=20, metavar="COUNT", help="of the log to show first (default 20)")
    added = verb("log", "log", "show what a guest has printed")
    one(added)
    added.add_argument("-f", "--follow", action="store_true", help="go on as it prints")
    added.add_argument("-n", "--lines", type=int, metavar="COUNT", help="only the last ones")
    added.add_argument("-b", "--boot", action="store_true", help="only since its last start")

    added = verb("install", "install", "install a system from a CD image onto a new guest, or one that there is")
    one(added)
    added.add_argument("--cdrom", metavar="ISO", required=True, help="the installer")
    added.add_argument("--size", metavar="SIZE", help="of a new disk (default 20G)")
    added.add_argument("--no-console", action="store_true", help="do not attach to the console")
    _new(added)
    added = verb("media", "screen", "show what is in a guest's CD drives, put something in, or take it out")
    one(added)
    added.add_argument("device", nargs="?", metavar="DEVICE", help="a drive: cdrom0, cdrom1 …")
    added.add_argument("image", nargs="?", metavar="ISO", help="to put in")
    added.add_argument("--eject", action="store_true", help="take out what is in it")
    added.add_argument("--force", action="store_true", help="with --eject: also where the guest has locked the drive")
    added = verb("screenshot", "screen", "save a picture of a guest's screen")
    one(added)
    added.add_argument("file", nargs="?", metavar="FILE", help="a PNG; - is standard output (default NAME-TIME.png)")
    added = verb("view", "screen", "show a guest's screen in a viewer that is installed")
    one(added)
    added.add_argument("--viewer", metavar="PROGRAM", help="by this one: remote-viewer, vncviewer, gvncviewer …")

    added = verb("new", "files", "write the file of a new guest")
    one(added)
    added.add_argument("--size", metavar="SIZE", help="of its disk, made at the first start (default 20G)")
    added.add_argument("--disk", metavar="IMAGE", help="an image that there is, instead")
    added.add_argument("--base", metavar="IMAGE", help="a ready-made image that its disk is laid over")
    added.add_argument("--cdrom", metavar="ISO", help="an image for its CD drive")
    _new(added)
    one(verb("edit", "files", "edit a guest's file, and check it before it counts"))
    added = verb("import", "imports", "write a guest file from what another tool has")
    added.add_argument("source", metavar="FILE", help="libvirt XML, Proxmox or quickemu .conf; - is the standard input")
    added.add_argument("--command", action="store_true", help="FILE holds a kvm or qemu-system command line")
    added.add_argument("--name", metavar="NAME", help="of the guest (default: as it was called)")
    added.add_argument("--print", action="store_true", dest="print_only", help="show the file instead of writing it")
    added = verb("check", "files", "check guest files: every problem with file, line and key")
    added.add_argument("files", nargs="*", metavar="FILE", help="default: all of /etc/kvmd")
    verb("doctor", "doctor", "say what this host has for guests, and what it lacks")
    return top


def _common(parser: Parser, json: Any, host: Any) -> None:
    parser.add_argument("--json", action="store_true", default=json, help="for programs")
    parser.add_argument("-H", "--host", metavar="[USER@]HOST", default=host, help="on another host, by ssh")


def _new(parser: Parser) -> None:
    """What a file may say that is not there yet."""
    parser.add_argument("--memory", metavar="SIZE", help="default 1G, for Windows 4G")
    parser.add_argument("--cpus", type=int, metavar="COUNT", help="default 1")
    parser.add_argument("--profile", choices=("linux", "bsd", "windows", "legacy"), help="kind of system")
    parser.add_argument("--firmware", choices=("bios", "uefi"), help="default bios")
    parser.add_argument("--address", action="append", metavar="ADDRESS", help="of the LAN; more than once for more")
    parser.add_argument("--configure", action="store_true", help="tell the guest its addresses by DHCP")
