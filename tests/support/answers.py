"""Answers that servers and proxies give in place of MLflow's, when nothing was stored."""

from __future__ import annotations

import zlib
from functools import cache

from support.proxy import reply
from support.recorder import Reply

LOGIN_PAGE = "<!doctype html><html><head><title>Sign in</title></head><body><h1>Please sign in</h1></body></html>"

BOMB_BYTES = 400_000_000
_BLOCK = 1_000_000


def error(code: str, message: str = "made up by the test") -> dict[str, str]:
    """Return the body of an error answer of MLflow's."""
    return {"error_code": code, "message": message}


def login_page(status: int = 200) -> Reply:
    """Return the page with which a single sign-on proxy answers users who are not signed in."""
    return reply(status, LOGIN_PAGE)


def gzip_bomb() -> Reply:
    """Return 400 MB of JSON in a body of 0.4 MB."""
    return reply(200, _bomb(), {"Content-Type": "application/json", "Content-Encoding": "gzip"})


@cache
def _bomb() -> bytes:
    """
    Build `{"pad": "000..."}` as a gzip file (RFC 1952) in milliseconds: after a full flush, the same deflate block may
    be repeated.
    """
    head, tail, block = b'{"pad": "', b'"}', b"0" * _BLOCK
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    stream = deflate.compress(head) + deflate.flush(zlib.Z_FULL_FLUSH)
    repeated = deflate.compress(block) + deflate.flush(zlib.Z_FULL_FLUSH)
    stream += repeated * (BOMB_BYTES // _BLOCK) + deflate.compress(tail) + deflate.flush()
    checksum = zlib.crc32(head)
    for _ in range(BOMB_BYTES // _BLOCK):
        checksum = zlib.crc32(block, checksum)
    length = len(head) + BOMB_BYTES + len(tail)
    header = b"\x1f\x8b\x08\x00" + bytes(4) + b"\x02\xff"
    return header + stream + zlib.crc32(tail, checksum).to_bytes(4, "little") + length.to_bytes(4, "little")
