"""kvmd: virtual machines on a plain systemd host, each with a real address of the LAN and no bridge.

The way data flows, one way::

    /etc/kvmd/NAME.toml → guest → plans (QEMU argv · scope properties · network state)     pure
                        → one running guest: spawn, scope, tap                             act
                        ← QMP events · pidfd · rtnetlink · serial FIFO                     observe
                        → all guests, reconciled → D-Bus objects · journal                 publish

The wings. Each imports only what stands on a floor below its own; what its rooms are, its own docstring says.
tests/unit/test_house.py reads these tables and the imports::

    floor | wing     | what lives there
    6     | __main__ | arguments and wiring
    6     | ctl      | kvmctl: the command line, over D-Bus only
    5     | bus      | the D-Bus objects: dispatch → authorise → one manager call → reply
    4     | guests   | one running guest, all guests by name, what an earlier daemon left
    3     | network  | what the kernel should hold for the guests, what it holds, what is said on the wire
    3     | config   | text → guest, or all problems with line and key; /etc/kvmd read and watched
    3     | qemu     | guest → argv; images, the process, KVM or not, QMP
    3     | console  | serial bytes → lines → journal, each once; people at the serial port
    2     | systemd  | the bus connection, units and scopes, journal, descriptor store, polkit
    2     | profile  | what an unmodified system expects of its machine; pure
    2     | runtime  | /run/kvmd/NAME, where the next daemon finds things
    1     | guest    | a guest as typed values, its disks, its NICs; pure
    1     | errors   | what can go wrong: D-Bus name and sentence; pure
"""

__version__ = "0.2.0"
