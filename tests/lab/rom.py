"""A guest that costs nothing: a BIOS of 64 KiB (-bios, machine q35) that speaks steadily and obeys the power button.

It prints numbered lines of 64 bytes on COM1, one per tick of the timer, 18 a second, and sleeps in between. When the
button is pressed it prints FAREWELL, as the last thing of all, and powers off. It runs some milliseconds after QEMU.
"""

from __future__ import annotations

LINE = b"%08d " % 0 + (b"the quick brown fox jumps over the lazy dog " * 2)[:54] + b"\n"
FAREWELL = "power button..."
TICK, GDT, TEXT, RESET = 0x120, 0x128, 0x150, 0xFFF0  # where in the ROM is what

# Real mode; assembled with `as --32`. Ports 0x600: the power management block (ICH9 data sheet, 13.8.3), which is
# mapped there first.
CODE = """
fa fc b800f0 8ed8 31c0 8ec0 8ed0 bc0070    cli; cld; ds = 0xf000, this ROM; es = ss = 0; sp = 0x7000
660f01163801 0f20c0 0c01 0f22c0 bb0800     gdt; protected mode for as long as it takes ...
8eeb 24fe 0f22c0 31c0                      ... to have 4 GiB in gs
be5001 bf0005 b95000 f3a4 8ed8             the texts to 0000:0500; ds = 0
baf80c 66b840f80080 66ef                   PCI 0:1f.0, register 0x40, PMBASE
bafc0c 66b801060000 66ef                   = 0x600
baf80c 66b844f80080 66ef                   register 0x44, ACPI_CNTL
bafc0c b080 ee                             = enabled
ba0206 b800BB ef                           PM1_EN = power button, or nothing
c70620002001 c706220000f0                  interrupt 8 = f000:TICK
6566 67c705 f000e0fe ff010000              the local APIC, SPIV = enabled
6566 67c705 5003e0fe 00070000              LINT0 = from the interrupt controller
b011 e620 b008 e621 b004 e621 b001 e621    the interrupt controller: from 8 on
b0fe e621                                  only the timer
b034 e643 31c0 e640 e640                   which ticks each 65536 periods of 1.19 MHz
fb f4 fa                                   sti; hlt; cli
bf0705                                     di = 0x507, the last digit
fe05 803d39 7606 c60530 4f ebf3            inc [di]; if above '9': make it '0', go to the digit before
be0005 b94000 e81c00                       print the line
ba0006 ed f6c401 74db                      until PM1_STS has the power button
be4005 b91000 e80a00                       print FAREWELL
ba0406 b80020 ef                           PM1_CNT: sleep, S5
f4 ebfd                                    halt
bafd03 ec a820 74fb ac baf803 ee e2f1 c3   print: when COM1's line status says empty: out, lodsb; loop; ret
"""
ACKNOWLEDGE = "50 b020 e620 58 cf"  # push ax; end of interrupt; pop ax; iret
SEGMENTS = "0000000000000000 ffff00000092cf00 0f00 28010f00"  # none; all memory; limit and base of this table


def steady(*, deaf: bool = False) -> bytes:
    """The ROM; if ``deaf`` it ignores the power button."""
    words = (line.split("   ")[0] for line in CODE.splitlines())
    code = bytes.fromhex("".join(words).replace("BB", "00" if deaf else "01"))
    image = code.ljust(TICK, b"\xf4") + bytes.fromhex(ACKNOWLEDGE)
    image = image.ljust(GDT, b"\xf4") + bytes.fromhex(SEGMENTS)
    image = image.ljust(TEXT, b"\xf4") + LINE + FAREWELL.encode() + b"\n"
    return image.ljust(RESET, b"\xf4") + bytes.fromhex("ea 0000 00f0").ljust(16, b"\xf4")
