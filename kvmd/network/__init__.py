"""The guests' network, without a bridge: host routes, proxy neighbours and filters, kept as the guest files want them.

One way: ``model`` says what is wanted, ``kernel`` shows what is held and changes it, ``wire`` speaks for the guests,
``firewalls`` stops what they may not send and opens what others close; ``lan`` is the pass that joins them.

A room imports, of this wing, only the rooms named with it; * is pure: no asyncio, files, sockets, clock::

    room      |   | what lives there                                          | imports
    model     | * | the host as seen, and what is wanted for each NIC         |
    kernel    |   | rtnetlink, nftables, /proc/sys/net: asked, changed, heard | model
    wire      |   | ARP and neighbour discovery in the guests' name           | model
    firewalls |   | what a guest may not send, and what others drop           | kernel
    holdings  |   | what the kernel holds: compared, changed                  | model kernel
    dnsmasq   |   | guests told their addresses: one dnsmasq for each tap     | model
    lan       |   | all guests' NICs, reconciled with the kernel              | model kernel wire firewalls holdings
"""
