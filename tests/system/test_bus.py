"""The D-Bus API as stock tools see it."""

from __future__ import annotations

import json
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import lab
import pytest

from .guests import Guests

DBUS = Path(__file__).parents[2] / "dbus"


def shape(interface: ElementTree.Element) -> set[tuple[str, ...]]:
    """All that a caller may rely on."""
    found = set()
    for element in interface:
        name = element.attrib["name"]
        if element.tag == "property":
            hints = (annotation.attrib["value"] for annotation in element.iter("annotation"))
            found.add(("property", name, element.attrib["type"], element.attrib["access"], *hints))
        else:
            args = (f"{arg.attrib.get('direction', 'out')} {arg.attrib['type']}" for arg in element.iter("arg"))
            found.add((element.tag, name, *args))
    return found


@pytest.mark.parametrize(
    ("interface", "path"), [("org.kvmd1.Manager", "/org/kvmd1"), ("org.kvmd1.Guest", "/org/kvmd1/guest/seen")]
)
def test_interface_is_as_its_xml_says(guests: Guests, interface: str, path: str) -> None:
    guests.linux("seen")
    live = guests.host.run("busctl", "introspect", "--xml-interface", "org.kvmd1", path).stdout
    (exported,) = [e for e in ElementTree.fromstring(live).iter("interface") if e.attrib["name"] == interface]
    (reference,) = ElementTree.parse(DBUS / f"{interface}.xml").getroot().iter("interface")
    assert shape(exported) == shape(reference)


def test_managed_objects_and_odd_names(guests: Guests) -> None:
    guests.linux("0a.b-c_d")
    path = "/org/kvmd1/guest/_30a_2eb_2dc_5fd"
    assert guests.call("GetGuest", "s", "0a.b-c_d") == [path]
    command = (
        "busctl",
        "--json=short",
        "call",
        "org.kvmd1",
        "/org/kvmd1",
        "org.freedesktop.DBus.ObjectManager",
        "GetManagedObjects",
    )
    objects = json.loads(guests.host.run(*command).stdout)["data"][0]
    assert objects[path]["org.kvmd1.Guest"]["Name"]["data"] == "0a.b-c_d"
    assert path.rpartition("/")[2] in guests.host.run("busctl", "tree", "--list", "org.kvmd1").stdout


@pytest.mark.parametrize(
    ("user", "call", "error"),
    [
        ("root", ("/org/kvmd1", "org.kvmd1.Manager", "StartGuest", "s", "ghost"), "org.kvmd1.Error.NoSuchGuest"),
        ("root", ("/org/kvmd1", "org.kvmd1.Manager", "GetGuestByPID", "u", "1"), "org.kvmd1.Error.NoSuchGuest"),
        ("root", ("/org/kvmd1/guest/api", "org.kvmd1.Guest", "Reset"), "org.kvmd1.Error.NotRunning"),
        ("root", ("/org/kvmd1/guest/ghost", "org.kvmd1.Guest", "Reset"), "org.kvmd1.Error.NoSuchGuest"),
        ("root", ("/org/kvmd1", "org.kvmd1.Manager", "Nonsense"), "org.freedesktop.DBus.Error.UnknownMethod"),
        ("root", ("/org/kvmd1", "org.kvmd1.Manager", "StartGuest", "u", "1"), "org.freedesktop.DBus.Error.InvalidArgs"),
        ("root", ("/org/kvmd1", "org.kvmd1.Nonsense", "X"), "org.freedesktop.DBus.Error.UnknownInterface"),
        ("root", ("/org/kvmd2", "org.kvmd1.Manager", "Reload"), "org.freedesktop.DBus.Error.UnknownObject"),
        (
            "nobody",
            ("/org/kvmd1", "org.kvmd1.Manager", "StartGuest", "s", "api"),
            "org.freedesktop.DBus.Error.AccessDenied",
        ),
        ("nobody", ("/org/kvmd1", "org.kvmd1.Manager", "Reload"), "org.freedesktop.DBus.Error.AccessDenied"),
        ("nobody", ("/org/kvmd1/guest/api", "org.kvmd1.Guest", "Start"), "org.freedesktop.DBus.Error.AccessDenied"),
    ],
)
def test_errors_have_names_and_sentences(guests: Guests, user: str, call: tuple[str, ...], error: str) -> None:
    guests.linux("api")
    done = guests.host.run("setpriv", f"--reuid={user}", "python3", "-c", CALLER, *call, check=False)
    name, _, sentence = done.stdout.strip().partition(" ")
    assert name == error
    assert len(sentence.splitlines()) == 1
    assert "Traceback" not in sentence


# busctl does not show an error's name.
CALLER = """
import asyncio, sys
from dbus_next.aio import MessageBus
from dbus_next import BusType, Message
async def main(path, interface, member, signature="", *words):
    bus = await MessageBus(bus_type=BusType.SYSTEM).connect()
    body = [int(word) if signature == "u" else word for word in words]
    reply = await bus.call(Message(destination="org.kvmd1", path=path, interface=interface, member=member,
                                   signature=signature, body=body))
    print(reply.error_name, *reply.body)
asyncio.run(main(*sys.argv[1:]))
"""


def test_everybody_may_read(guests: Guests) -> None:
    guests.linux("open")
    for command in (
        ("call", "org.kvmd1", "/org/kvmd1", "org.kvmd1.Manager", "ListGuests"),
        ("get-property", "org.kvmd1", "/org/kvmd1/guest/open", "org.kvmd1.Guest", "State"),
        (
            "call",
            "org.kvmd1",
            "/org/kvmd1/guest/open",
            "org.freedesktop.DBus.Properties",
            "GetAll",
            "s",
            "org.kvmd1.Guest",
        ),
    ):
        guests.host.run("setpriv", "--reuid=nobody", "busctl", *command)
    refused = guests.host.run(
        *("busctl", "set-property", "org.kvmd1", "/org/kvmd1/guest/open", "org.kvmd1.Guest", "State", "s", "running"),
        check=False,
    )
    assert refused.returncode == 1


def test_signals(guests: Guests) -> None:
    """GuestNew, a PropertiesChanged for each state, GuestRemoved."""
    monitor = guests.host.popen(
        "busctl",
        "--json=short",
        "monitor",
        "--match=type='signal',sender='org.kvmd1'",
        bufsize=0,
        text=False,
        errors=None,
    )
    lines = lab.machine.read_lines(monitor, time.monotonic() + 60)
    next(line for line in lines if "Monitoring" in line)
    guests.linux("news")
    guests.start("news")
    guests.guest("news", "Terminate")
    guests.host.run("rm", "/etc/kvmd/news.toml")
    seen = []
    for line in lines:
        message = json.loads(line)
        data = message["payload"]["data"]
        if message["member"] == "PropertiesChanged" and message["path"].endswith("/news"):
            if "State" in data[1]:
                seen.append(data[1]["State"]["data"])
        elif data[0] in ("news", "/org/kvmd1/guest/news"):
            seen.append(message["member"])
        if message["member"] == "GuestRemoved":
            break
    assert seen == [
        *(
            "InterfacesAdded",
            "GuestNew",
            "starting",
            "running",
            "stopping",
            "stopped",
            "InterfacesRemoved",
            "GuestRemoved",
        ),
    ]
