"""kvmd: virtual machines on a plain systemd host, each with a real address of the LAN and no bridge.

The way data flows, one way::

    /etc/kvmd/NAME.toml → guest → plans (QEMU argv · scope properties · network state)     pure
                        → one running guest: spawn, scope, tap                             act
                        ← QMP events · pidfd · rtnetlink · serial FIFO                     observe
                        → all guests, reconciled → D-Bus objects · journal                 publish

The rooms, and what each may import of the others: only what stands above it, and acting rooms never each other.
tests/unit/test_house.py reads this table and the imports::

    room        | what lives there                                      | may import

    pure: no asyncio, no files, no sockets, no clock
    errors      | what can go wrong: D-Bus name and sentence            |
    guest       | a guest as typed values, its disks, its NICs          | errors
    toml_lines  | TOML with line numbers                                | errors
    values      | one value of a guest file: text → what is meant       | guest toml_lines
    limits      | [limits]: systemd's resource settings                 | guest toml_lines values
    schema      | the keys of a guest file, and which of them work yet  | guest limits values
    claims      | what two guests cannot both have                      | errors guest toml_lines
    guestfile   | text → guest, or every problem with line and key      | errors guest toml_lines values schema claims
    qemu        | guest → QEMU's arguments                              | errors guest
    scope       | guest → scope properties; names of units and objects  | errors guest
    host        | what the host looks like: interfaces, addresses       | guest
    things      | what the kernel can hold for a guest; diff            | guest host
    survey      | the host as last seen                                 | guest host things
    network     | NICs + host → the things wanted                       | guest host things
    dhcp        | what a guest is told: dnsmasq's configuration, unit   | guest host network
    nicstatus   | how a NIC is doing: a word and a sentence             | guest host things dhcp
    vicinity    | what a guest may be told of its IPv6 neighbours       | guest host network
    barriers    | others' firewalls: which drops what is forwarded      |
    frames      | ARP and neighbour discovery as bytes                  |
    rtnetlink   | rtnetlink messages as bytes                           | guest host things
    terminal    | terminal output as text                               |

    ground: connections that the acting rooms share
    journal     | entries for journald; kvmd's own events               |
    sysbus      | the connection to the system bus                      | errors
    nftables    | libnftables: commands, listings, word of changes      | rtnetlink

    acting: each does one kind of thing to the world, and knows of no other
    accelerator | KVM or not, and why not                               | journal
    images      | disk images: created, opened                          | errors guest
    fdstore     | descriptors that PID 1 holds between two daemons      |
    runtime     | /run/kvmd/NAME, where the next daemon finds things   | errors
    process     | QEMU spawned: its user, its descriptors, its pidfd    | errors
    qmp         | the few QMP commands and events                       | errors
    serial      | a guest's FIFO → journal entries, each line once      | errors terminal journal
    polkit      | may the caller do this: root, or as polkit says       | errors sysbus
    interface   | a D-Bus interface as its XML states it: signatures    |
    systemd     | jobs, scopes and units of systemd                     | errors sysbus
    files       | the files of a directory: read, watched               | errors
    netlink     | the kernel's network: dump, apply, events; taps       | errors host things rtnetlink
    sysctl      | /proc/sys/net, and what it was before                 | things
    vsock       | a guest's vsock address, and who listens to it        | errors
    neighbours  | packets on taps and uplinks: questions and answers    | guest host network frames vicinity
    firewall    | what a guest may not send                             | guest nftables
    forwarding  | the way through others' firewalls, opened if allowed  | barriers nftables sysbus

    joining: each brings together what stands above it
    console     | a person at a guest's serial port                     | serial
    streams     | what a guest says: logged, shown at consoles          | errors journal acting console
    readiness   | when a guest is ready: by a line of text, by vsock    | pure journal acting
    dnsmasq     | guests told their addresses: one dnsmasq for each tap | pure ground systemd
    holdings    | what the kernel holds: compared, changed              | things network netlink sysctl
    presence    | guests' addresses on the LAN: announced, defended     | errors guest host survey vicinity neighbours
    lan         | all guests' NICs, reconciled with the kernel          | pure sysbus acting holdings presence
    handles     | what QEMU needs, opened by root: images, taps         | pure acting readiness lan
    nics        | one guest's NICs: claimed, told, given up              | errors guest dnsmasq lan
    machine     | one running guest: start, adopt, stop                 | pure ground acting joining
    config      | all of /etc/kvmd, read at once                        | pure files runtime
    recovery    | what an earlier daemon left: taken over or cleared    | pure ground acting streams machine config
    known       | a guest as known from its file and its machine        | pure lan machine config
    manager     | all guests: reconciled, start and stop by name        | pure ground acting joining
    bus         | the D-Bus objects: authorise, one manager call, reply | pure ground polkit interface manager
    __main__    | arguments and wiring                                  | everything
"""

__version__ = "0.1.0"
