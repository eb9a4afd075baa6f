"""A screen as QEMU's arguments: a VGA, which boot loaders and installers want even if nobody looks, and VNC."""

from __future__ import annotations

from kvmd.guest import Display

SCREEN = "video0"  # id of the device
DISPLAY_0 = 5900  # VNC's port of that number


def display_args(display: Display, password: int | None) -> list[str]:
    """``password``: a descriptor that QEMU can open again, of what a viewer by TCP has to know.

    Without an address VNC listens nowhere: each viewer is handed over (add_client), and needs no password. An idle
    VNC server costs a thread and 0.4 MB. Of several viewers none may send the others away.
    """
    args = ["-device", f"VGA,id={SCREEN}"]
    vnc = "none,share=ignore"
    if display.address:
        host, _, port = str(display.address).rpartition(":")
        vnc = f"{host}:{int(port) - DISPLAY_0},share=ignore"
    if password is not None:
        args += ["-object", f"secret,id=vnc-password,file=/proc/self/fd/{password}"]
        vnc += ",password-secret=vnc-password"
    return [*args, "-vnc", vnc]
