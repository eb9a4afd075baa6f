"""What a guest is told by its host at its first boot: a NoCloud seed for cloud-init, and systemd's credentials.

docs.cloud-init.io, "NoCloud": a file system labelled cidata with user-data, meta-data and network-config.
systemd.system-credentials(7): SMBIOS strings of type 11. Both are made in memory, and QEMU is given descriptors: they
stand in no argument, and in no file.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping

from kvmd.errors import StartFailed
from kvmd.guest import CloudInit, Guest

NOTHING = "#cloud-config\n{}\n"


def open_seed(guest: Guest, cloud_init: CloudInit, network: Mapping[str, object], servers: Mapping[str, object]) -> int:
    """A descriptor of the seed, read-only. ``network``: the network-config made for it, ``servers``: with name servers.

    Other name servers alone do not make the guest a new instance. Raises ``StartFailed``.
    """
    user_data = cloud_init.user_data or NOTHING
    config = cloud_init.network_config or (json.dumps(servers, indent=1) + "\n" if servers else "")
    known = [user_data, cloud_init.meta_data, cloud_init.network_config or network]
    identity = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
    files = {"user-data": user_data, "meta-data": meta_data(guest, cloud_init, identity), "network-config": config}
    return _read_only(_iso({name: text.encode() for name, text in files.items() if text}), "seed")


def meta_data(guest: Guest, cloud_init: CloudInit, identity: str) -> str:
    """What the file gives, with what it leaves out: without instance-id cloud-init takes no seed."""
    given = cloud_init.meta_data or ""
    made = {"instance-id": f"{guest.name}-{identity}", "local-hostname": guest.name}
    missing = {key: value for key, value in made.items() if not re.search(rf"""(?m)(^|[{{,])\s*["']?{key}\b""", given)}
    if given.lstrip().startswith("{"):  # JSON, which is YAML
        return given.replace("{", "{" + "".join(f'"{key}": "{value}", ' for key, value in missing.items()), 1)
    return "".join(f"{key}: {value}\n" for key, value in missing.items()) + given


def open_credentials(guest: Guest) -> Iterator[int]:
    """For each one a descriptor of its SMBIOS string. Raises ``StartFailed``."""
    for name, value in guest.credentials.items():
        yield _read_only(credential(name, value), "credential")


def credential(name: str, value: str) -> bytes:
    """As an SMBIOS string; what is not plain text goes in base64."""
    if re.fullmatch(r"[ -~]+", value):
        return f"io.systemd.credential:{name}={value}".encode()
    return f"io.systemd.credential.binary:{name}={base64.b64encode(value.encode()).decode()}".encode()


def _read_only(data: bytes, name: str) -> int:
    """In memory, for whoever is given the descriptor."""
    writable = -1
    try:
        writable = os.memfd_create(f"kvmd-{name}", os.MFD_CLOEXEC)
        with os.fdopen(os.dup(writable), "wb") as file:
            file.write(data)
        os.fchmod(writable, 0o444)
        return os.open(f"/proc/self/fd/{writable}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise StartFailed(f"cannot make its {name} in memory: {error.strerror}") from error
    finally:
        if writable >= 0:
            os.close(writable)


def _iso(files: Mapping[str, bytes]) -> bytes:
    """Raises ``StartFailed``."""
    try:
        import pycdlib  # 5 MiB, which most hosts can do without
    except ImportError as error:
        raise StartFailed("[cloud_init] needs pycdlib, which is not installed (install python3-pycdlib)") from error
    image = pycdlib.PyCdlib()
    image.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident="cidata")
    for name, data in files.items():
        plain = re.sub("[^A-Z]", "_", name.upper())
        image.add_fp(io.BytesIO(data), len(data), f"/{plain}.;1", rr_name=name, joliet_path=f"/{name}")
    written = io.BytesIO()
    image.write_fp(written)
    image.close()
    return written.getvalue()
