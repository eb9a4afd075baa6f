"""The kernel's nftables: commands and listings through libnftables(3), and word of every change.

libnftables does it within the process, in 0.2 ms per command; nft(8) as a child would take 10 to 30.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import json
import os
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from kvmd.network.kernel.rtnetlink import HEADER, NLM_F_DUMP, NLM_F_REQUEST, messages

NETLINK_NETFILTER, NFNLGRP_NFTABLES, NFNL_SUBSYS_NFTABLES = 12, 7, 10  # linux/netfilter/nfnetlink.h
SOL_NETLINK, ADD_MEMBERSHIP = 270, 1

# nf_tables.h, NFT_MSG_*
TABLE_CHANGES, CHAIN_CHANGES, RULE_CHANGES, SET_CHANGES, ELEMENT_CHANGES = (0, 2), (3, 5), (6, 8), (9, 11), (12, 14)
DELETIONS = frozenset(pair[1] for pair in (TABLE_CHANGES, CHAIN_CHANGES, RULE_CHANGES, SET_CHANGES, ELEMENT_CHANGES))
STRUCTURE = frozenset({*TABLE_CHANGES, *CHAIN_CHANGES, *RULE_CHANGES})  # all but sets
GENERATION = 15  # ends each transaction, and belongs to no table

# nf_tables.h, nfnetlink.h, netlink.h
GETSETELEM, LIST_TABLE, LIST_SET, LIST_ELEMENTS, LIST_ELEM, ELEM_KEY, DATA_VALUE = 13, 1, 2, 3, 1, 1, 1
NFGENMSG, ATTRIBUTE, NFPROTO_INET = struct.Struct("=BBH"), struct.Struct("=HH"), 1
NLMSG_ERROR, NLMSG_DONE, NLA_TYPE_MASK = 2, 3, 0x3FFF

SO_RCVBUFFORCE = 33  # asm-generic/socket.h
RECEIVE_BUFFER = 4 << 20  # bytes; the table of a thousand guests, made at once, takes less

# nftables/libnftables.h, NFT_CTX_OUTPUT_*: handles, JSON, and no elements of named sets (there may be 100,000).
HANDLE, JSON, TERSE = 1 << 3, 1 << 4, 1 << 11


class Changes:
    """A subscription to the changes of the ruleset, by whomever."""

    def __init__(self, heard: Callable[[], object]) -> None:
        """``heard()``: there is something to ``read``. Needs a running loop. Raises OSError."""
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
        self._socket.setblocking(False)
        self._socket.bind((0, 0))
        self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
        self._socket.setsockopt(SOL_NETLINK, ADD_MEMBERSHIP, NFNLGRP_NFTABLES)
        asyncio.get_running_loop().add_reader(self._socket.fileno(), heard)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._socket.close()

    def read(self) -> list[tuple[int, str]] | None:
        """NFT_MSG_* and table of each since the last call; None: more than the socket holds.

        GENERATION, of no table, comes after those of each transaction.
        """
        changes: list[tuple[int, str]] = []
        lost = False
        while True:
            try:
                answer = self._socket.recv(1 << 16)
            except BlockingIOError:
                return None if lost else changes
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                lost = True  # the rest waits, and is older than the next look
                continue
            for message in messages(answer):
                if message.kind >> 8 == NFNL_SUBSYS_NFTABLES:
                    number = message.kind & 0xFF
                    table = "" if number == GENERATION else message.read().get_attr("NFTA_TABLE_NAME", "")
                    changes.append((number, table))


class Elements:
    """What sets hold, asked by netlink: libnftables would read the whole ruleset for it."""

    def __init__(self) -> None:
        """Raises OSError."""
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
        self._socket.bind((0, 0))
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    def of(self, table: str, name: str) -> list[bytes]:
        """The keys of a set of an inet table, each part padded to 4 bytes; none if there is no such set.

        Blocks for as long as the kernel takes. Source: linux/netfilter/nf_tables.h, nft_set_elem_list_attributes.
        """
        self._sequence += 1
        body = NFGENMSG.pack(NFPROTO_INET, 0, 0)
        body += _attribute(LIST_TABLE, table.encode() + b"\0") + _attribute(LIST_SET, name.encode() + b"\0")
        kind, flags = NFNL_SUBSYS_NFTABLES << 8 | GETSETELEM, NLM_F_REQUEST | NLM_F_DUMP
        self._socket.send(HEADER.pack(HEADER.size + len(body), kind, flags, self._sequence, 0) + body)
        found: list[bytes] = []
        while True:
            for message in messages(self._socket.recv(1 << 16)):
                if message.sequence != self._sequence:
                    continue
                if message.kind in (NLMSG_ERROR, NLMSG_DONE):
                    return found
                for elements in _attributes(message.payload[NFGENMSG.size :], LIST_ELEMENTS):
                    for element in _attributes(elements, LIST_ELEM):
                        for key in _attributes(element, ELEM_KEY):
                            found += _attributes(key, DATA_VALUE)


def _attribute(number: int, value: bytes) -> bytes:
    return ATTRIBUTE.pack(ATTRIBUTE.size + len(value), number) + value + bytes(-len(value) % 4)


def _attributes(data: bytes, wanted: int) -> Iterator[bytes]:
    """Values of all attributes with this number."""
    offset = 0
    while offset + ATTRIBUTE.size <= len(data):
        length, number = ATTRIBUTE.unpack_from(data, offset)
        if number & NLA_TYPE_MASK == wanted:
            yield data[offset + ATTRIBUTE.size : offset + length]
        offset += max(length + 3 & ~3, ATTRIBUTE.size)


class Nftables:
    """libnftables(3)."""

    def __init__(self) -> None:
        """Raises OSError."""
        library = ctypes.CDLL("libnftables.so.1")
        pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint
        signatures: Mapping[str, tuple[object, list[object]]] = {
            "nft_ctx_new": (pointer, [ctypes.c_uint32]),
            "nft_ctx_buffer_output": (ctypes.c_int, [pointer]),
            "nft_ctx_buffer_error": (ctypes.c_int, [pointer]),
            "nft_ctx_get_output_buffer": (text, [pointer]),
            "nft_ctx_get_error_buffer": (text, [pointer]),
            "nft_ctx_output_set_flags": (None, [pointer, number]),
            "nft_run_cmd_from_buffer": (ctypes.c_int, [pointer, text]),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self._library = library
        self._context = library.nft_ctx_new(0)
        if not self._context:
            raise OSError(0, "libnftables does not start")
        library.nft_ctx_buffer_output(self._context)
        library.nft_ctx_buffer_error(self._context)

    def run(self, commands: str) -> str:
        """One transaction. Returns the complaint's first line, or ""."""
        if not self._library.nft_run_cmd_from_buffer(self._context, commands.encode()):
            return ""
        complaint = self._library.nft_ctx_get_error_buffer(self._context) or os.strerror(0).encode()
        return str(complaint.decode(errors="replace").strip().partition("\n")[0])

    def list(self, what: str) -> list[dict[str, Any]]:
        """What ``nft -j -a -t list WHAT`` prints, libnftables-json(5). Raises OSError."""
        self._library.nft_ctx_output_set_flags(self._context, HANDLE | JSON | TERSE)
        try:
            if complaint := self.run(f"list {what}"):
                raise OSError(0, complaint)
            listing = json.loads(self._library.nft_ctx_get_output_buffer(self._context) or b"{}")
        except ValueError as error:
            raise OSError(0, f"libnftables' listing of {what} is no JSON: {error}") from error
        finally:
            self._library.nft_ctx_output_set_flags(self._context, 0)
        found: list[dict[str, Any]] = listing.get("nftables", [])
        return found
