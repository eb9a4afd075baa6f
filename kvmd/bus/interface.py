"""A D-Bus interface as its XML states it: those of ``dbus/``, and the standard ones of every object."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from pathlib import Path

from kvmd.systemd.sysbus import Variant

STANDARD_XML = """
<node>
  <interface name="org.freedesktop.DBus.Introspectable">
    <method name="Introspect"><arg name="xml" type="s" direction="out"/></method>
  </interface>
  <interface name="org.freedesktop.DBus.Properties">
    <method name="Get">
      <arg name="interface" type="s" direction="in"/><arg name="property" type="s" direction="in"/>
      <arg name="value" type="v" direction="out"/>
    </method>
    <method name="GetAll">
      <arg name="interface" type="s" direction="in"/><arg name="properties" type="a{sv}" direction="out"/>
    </method>
    <method name="Set">
      <arg name="interface" type="s" direction="in"/><arg name="property" type="s" direction="in"/>
      <arg name="value" type="v" direction="in"/>
    </method>
    <signal name="PropertiesChanged">
      <arg name="interface" type="s"/><arg name="changed" type="a{sv}"/><arg name="invalidated" type="as"/>
    </signal>
  </interface>
  <interface name="org.freedesktop.DBus.Peer">
    <method name="Ping"/>
    <method name="GetMachineId"><arg name="machine" type="s" direction="out"/></method>
  </interface>
</node>
"""
OBJECT_MANAGER_XML = """
<node>
  <interface name="org.freedesktop.DBus.ObjectManager">
    <method name="GetManagedObjects"><arg name="objects" type="a{oa{sa{sv}}}" direction="out"/></method>
    <signal name="InterfacesAdded">
      <arg name="object" type="o"/><arg name="interfaces" type="a{sa{sv}}"/>
    </signal>
    <signal name="InterfacesRemoved"><arg name="object" type="o"/><arg name="interfaces" type="as"/></signal>
  </interface>
</node>
"""


class Interface:
    """One interface: signatures of methods, properties and signals."""

    def __init__(self, element: ElementTree.Element) -> None:
        self.element = element
        self.name = element.attrib["name"]
        self.methods = {
            method.attrib["name"]: (self._signature(method, "in"), self._signature(method, "out"))
            for method in element.iter("method")
        }
        self.signals = {signal.attrib["name"]: self._signature(signal, None) for signal in element.iter("signal")}
        self.properties = {prop.attrib["name"]: prop.attrib["type"] for prop in element.iter("property")}
        self.silent = {
            prop.attrib["name"]
            for prop in element.iter("property")
            for annotation in prop.iter("annotation")
            if annotation.attrib["value"] in ("const", "false")
        }

    @staticmethod
    def _signature(element: ElementTree.Element, direction: str | None) -> str:
        args = (arg for arg in element.iter("arg") if arg.attrib.get("direction") == direction)
        return "".join(arg.attrib["type"] for arg in args)

    @classmethod
    def parse(cls, text: str) -> list[Interface]:
        return [cls(element) for element in ElementTree.fromstring(text).iter("interface")]

    @classmethod
    def load(cls, name: str) -> Interface:
        """From where the package installs it, or from the checkout."""
        installed = Path("/usr/share/dbus-1/interfaces")
        checkout = Path(__file__).parents[2] / "dbus"
        directory = checkout if checkout.is_dir() else installed
        return cls.parse((directory / f"{name}.xml").read_text())[0]

    def variants(self, values: Mapping[str, object]) -> dict[str, Variant]:
        return {name: Variant(self.properties[name], value) for name, value in values.items()}
