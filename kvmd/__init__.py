"""kvmd: virtual machines on a plain systemd host, each with a real address of the LAN and no bridge.

The way data flows, one way::

    /etc/kvmd/NAME.toml → guest → plans (QEMU argv · scope properties · network state)     pure
                        → one running guest: spawn, scope, tap                             act
                        ← QMP events · pidfd · rtnetlink · serial FIFO                     observe
                        → all guests, reconciled → D-Bus objects · journal                 publish
"""

__version__ = "0.1.0"
