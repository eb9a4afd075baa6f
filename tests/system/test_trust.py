"""What others wrote is not believed: lines in a guest's name, files that are none, images with others' files below."""

from __future__ import annotations

import lab
import pytest

from .guests import Guests


def forge(host: lab.Host, **fields: str) -> None:
    """Log as an ordinary user, with any field."""
    text = "".join(f"{key}={value}\n" for key, value in fields.items())
    host.run("setpriv", "--reuid=12345", "--regid=12345", "--clear-groups", "logger", "--journald", input=text)


def test_lines_in_a_guests_name(guests: Guests) -> None:
    """Neither shown as its own, nor an end of its log, nor of the daemon that takes it over."""
    host = guests.host
    guests.linux("honest")
    guests.start("honest")
    invocation = host.read("/run/kvmd/honest/invocation")
    mine = {"KVMD_GUEST": "honest", "KVMD_STREAM": "serial", "KVMD_INVOCATION_ID": invocation}
    for offset in (str(1 << 40), "xyz", "-1"):
        forge(host, MESSAGE="guest: forged", KVMD_OFFSET=offset, KVMD_LENGTH="1", **mine)
    forge(host, MESSAGE="guest: forged", SYSLOG_IDENTIFIER="honest", OBJECT_SYSTEMD_UNIT="kvmd@honest.service", **mine)
    host.run("journalctl", "--sync")
    assert host.journal("KVMD_GUEST=honest", "_UID=12345")
    [log] = guests.guest("honest", "ReadLog", "t", "1000")
    assert log
    assert "guest: forged" not in log
    assert "guest: forged" not in guests.status("honest")

    since = host.cursor()
    host.run("systemctl", "kill", "--signal=KILL", "--kill-whom=main", "kvmd")
    guests.host.run("sh", "-c", "echo 'echo still here' > /run/kvmd/honest/serial.in")
    host.wait_journal("KVMD_GUEST=honest", "_UID=0", message="was running already", since=since)
    assert guests.wait("honest", "still here", since)
    entries = host.journal("_UID=0", "KVMD_GUEST=honest", "KVMD_STREAM=serial")
    position = 0
    for entry in entries:
        assert int(entry["KVMD_OFFSET"]) == position
        position += int(entry["KVMD_LENGTH"])


@pytest.mark.complaints("guest odd", "Guest odd")
def test_remains_that_make_no_sense(guests: Guests) -> None:
    """Whatever lies in /run/kvmd: the daemon starts, and other guests are taken over."""
    host = guests.host
    guests.linux("well")
    guests.start("well", ready=False)
    host.run("systemctl", "stop", "kvmd")
    host.run("mkdir", "-p", "/run/kvmd/odd", "/run/kvmd/odder/serial.out", "/run/kvmd/odder/serial.spool")
    for name in ("odd", "odder"):
        host.write(f"/run/kvmd/{name}/invocation", "\n\0=")
    host.write("/run/kvmd/odd/serial.out", "no pipe")
    host.write("/run/kvmd/odd/qemu.pid", "x")
    host.run("systemctl", "start", "kvmd")
    assert guests.get("well", "State") == "running"
    assert host.run("ls", "/run/kvmd").stdout.split() in (["well"], ["sysctl.json", "well"])


@pytest.mark.complaints("/etc/kvmd/")
def test_files_that_are_none(guests: Guests) -> None:
    host = guests.host
    guests.linux("zz-last", top="autostart = true")
    script = """
        cd /etc/kvmd
        mkfifo pipe.toml
        mkdir directory.toml
        ln -s /dev/zero zero.toml
        python3 -c 'print("a = " + "[" * 5000 + "]" * 5000)' > deep.toml
        head -c 100000000 /dev/zero | tr '\\0' '#' > huge.toml
        printf 'autostart = true\\n' > "$(printf 'not-\\377-utf8.toml')"
        printf 'autostart = true\\n' > "$(printf 'line\\nbreak.toml')"
        printf 'autostart = true\\n' > kvmd.toml
        printf 'memory = "secret"\\n' > private.toml
        chmod 600 private.toml
    """
    host.run("sh", "-c", script)
    try:
        host.run("systemctl", "daemon-reload", timeout=20)
        assert "multi-user.target.wants" in host.run("find", "/run/systemd/generator", "-name", "kvmd@zz-last*").stdout
        host.run("systemctl", "restart", "kvmd", timeout=20)
        said = host.run(
            "busctl", "--json=short", "get-property", "org.kvmd1", "/org/kvmd1", "org.kvmd1.Manager", "Problems"
        )
        for line in (
            "pipe.toml:1: cannot be read: it is no file",
            "directory.toml:1: cannot be read: Is a directory",
            "zero.toml:1: cannot be read: it is no file",
            "deep.toml:1: nested too deeply",
            "huge.toml:1: the file is larger than 64 KiB",
            "not-\\\\udcff-utf8.toml:1: ",
            "line\\\\nbreak.toml:1: ",
            "kvmd.toml:1: ",
            "private.toml:1: memory: cannot be used (kvmd --check FILE says why to who may read it)",
        ):
            assert line in said.stdout, line
        assert "secret" not in said.stdout
        assert '"secret" is not a size' in host.run("kvmd", "--check", check=False).stdout
        refused = guests.call("GetGuest", "s", "private", check=False)
        assert "secret" not in refused.stderr
        guests.start("zz-last", ready=False)
    finally:
        host.run("sh", "-c", "cd /etc/kvmd; find . -name '*.toml' ! -name 'zz-last*' -exec rm -r {} +")
        guests.call("Reload")


@pytest.mark.complaints("could not be started")
def test_images_from_elsewhere(guests: Guests) -> None:
    """One that names a file of the host is refused, an honest overlay made; in a directory that belongs to a user."""
    host = guests.host
    script = """
        mkdir -p /srv/theirs
        cd /srv/theirs
        qemu-img create -q -f qcow2 -u -b /etc/shadow -F raw evil.qcow2 1M
        qemu-img create -q -f qcow2 base.qcow2 64M
        ln -s /etc/shadow cd.iso
        ln -s /etc/shadow .new.qcow2.new
        mkfifo pipe.iso
        chown -R -h 12345 .
    """
    host.run("sh", "-c", script)

    def refusal(extra: str) -> str:
        guests.linux("careful", extra=extra)
        refused = guests.call("StartGuest", "s", "careful", check=False)
        return str(refused.stderr)

    said = refusal('[[disk]]\npath = "/srv/theirs/evil.qcow2"\n')
    assert "the header of /srv/theirs/evil.qcow2 names '/etc/shadow' below it" in said
    said = refusal('[[cdrom]]\npath = "/srv/theirs/cd.iso"\n')
    assert "a link of user 12345 leads there, to a file of user 0" in said
    said = refusal('[[cdrom]]\npath = "/srv/theirs/pipe.iso"\n')
    assert "it is neither a file nor a block device" in said
    guests.linux(
        "careful",
        extra='[[disk]]\npath = "/srv/theirs/new.qcow2"\nbase = "/srv/theirs/base.qcow2"\n',
    )
    guests.start("careful")
    assert host.run("stat", "-c", "%u %a", "/srv/theirs/new.qcow2", "/etc/shadow").stdout.split("\n")[0] == "0 600"
    assert host.read("/etc/shadow").count("root:") == 1
    guests.guest_off("careful")
    host.run("rm", "-r", "/srv/theirs")
