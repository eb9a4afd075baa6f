"""polkit decides for those who are not root, by its defaults and by a rule of the administrator."""

from __future__ import annotations

import pytest

from .guests import Guests

RULE = """
polkit.addRule(function(action, subject) {
    if (action.id.indexOf("org.kvmd1.") == 0 && subject.isInGroup("operators")) {
        return polkit.Result.YES;
    }
});
"""
METHODS = (("Start",), ("ReadLog", "t", "5"), ("OpenConsole",))


@pytest.mark.complaints("could not be started")
def test_a_rule_lets_a_group_in(guests: Guests) -> None:
    guests.linux("shared", extra="[[cdrom]]\n")
    host = guests.host
    host.run("groupadd", "operators")
    host.run("useradd", "-G", "operators", "olga")

    def ask(*method: str) -> tuple[int, str]:
        call = ("busctl", "call", "org.kvmd1", "/org/kvmd1/guest/shared", "org.kvmd1.Guest", *method)
        done = host.run("setpriv", "--reuid=olga", "--regid=olga", "--init-groups", *call, check=False)
        return done.returncode, done.stderr

    for method in METHODS:
        assert ask(*method) == (1, "Call failed: Access denied\n")
    host.write("/etc/polkit-1/rules.d/10-kvmd.rules", RULE)
    host.run("systemctl", "restart", "polkit")
    for method in METHODS:
        assert ask(*method) == (0, "")
    host.run("truncate", "-s", "1M", "/srv/cd.iso")
    for owner, mode, directory, works in (
        ("root", "0600", "0755", False),
        ("root", "0644", "0755", True),
        ("root", "0644", "0700", False),
        ("olga", "0400", "0755", True),
        ("olga", "0044", "0755", False),
    ):
        host.run("sh", "-c", f"chmod {directory} /srv; chown {owner} /srv/cd.iso; chmod {mode} /srv/cd.iso")
        status, said = ask("InsertMedia", "ss", "cdrom0", "/srv/cd.iso")
        assert (status, "cannot open the CD image /srv/cd.iso: Permission denied" in said) == (not works, not works)
    guests.guest_off("shared")
    for mode, status in (("0044", 1), ("0400", 0)):
        host.run("chmod", mode, "/srv/cd.iso")
        assert ask("StartWith", "a{sv}", "1", "cdrom", "s", "/srv/cd.iso")[0] == status
    host.run("sh", "-c", "chmod 755 /srv; rm /srv/cd.iso")
    host.run("rm", "/etc/polkit-1/rules.d/10-kvmd.rules")
    host.run("userdel", "olga")
    host.run("groupdel", "operators")


ONE_GUEST = """
polkit.addRule(function(action, subject) {
    if (action.id == "org.kvmd1.manage-guests" && subject.user == "olga" &&
        action.lookup("guest") == "hers" && action.lookup("verb").indexOf("Start") == 0) {
        return polkit.Result.YES;
    }
});
"""


def test_a_rule_for_one_guest(guests: Guests) -> None:
    """It knows the guest, however it is called, and what is to be done to it."""
    for name in ("hers", "theirs"):
        guests.linux(name)
    host = guests.host
    host.run("useradd", "olga")
    host.write("/etc/polkit-1/rules.d/10-kvmd.rules", ONE_GUEST)
    host.run("systemctl", "restart", "polkit")

    def ask(*call: str) -> int:
        as_olga = ("setpriv", "--reuid=olga", "--regid=olga", "--init-groups")
        return host.run(*as_olga, "busctl", "call", *call, check=False).returncode

    manager = ("org.kvmd1", "/org/kvmd1", "org.kvmd1.Manager")
    for name, allowed in (("hers", 0), ("theirs", 1)):
        guest = ("org.kvmd1", f"/org/kvmd1/guest/{name}", "org.kvmd1.Guest")
        assert ask(*guest, "Start") == allowed
        assert ask(*manager, "StartGuest", "s", name) == allowed
        assert ask(*manager, "StopGuest", "s", name) == 1
        assert ask(*guest, "Stop") == 1
    host.run("rm", "/etc/polkit-1/rules.d/10-kvmd.rules")
    host.run("userdel", "olga")
