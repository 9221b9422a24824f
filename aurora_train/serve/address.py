"""Where a server listens, and who may ask it: this machine alone, unless a token is shared."""

from __future__ import annotations

import ipaddress
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

from aurora_train.errors import UserError

LOCAL = "127.0.0.1"


@dataclass(frozen=True)
class Address:
    """A TCP port of a host, or the path of a Unix socket. `token` is what a client must send first, if anything."""

    host: str = LOCAL
    port: int = 0
    path: Path | None = None
    token: str | None = None


def address(host: str | None, port: int, path: Path | None, token_file: Path | None) -> Address:
    """The address that options ask for. UserError for a host that others can reach without a token."""
    if path is not None and host is not None:
        raise UserError("a Unix socket has no host", where="--socket", hint="leave one of --host and --socket out")
    if host is not None and not _is_loopback(host) and token_file is None:
        raise UserError(
            "other machines could reach this server, and anyone on them could ask it", where="--host",
            hint="--token-file FILE with a secret that clients send first, or leave --host out",
        )  # fmt: skip
    if not 0 <= port < 1 << 16:
        raise UserError(f"{port} is not a port", where="--port", hint="1024 to 65535, or 0 for any that is free")
    token = None if token_file is None else _token(token_file)
    return Address(host or LOCAL, port, path and path.expanduser(), token)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _token(file: Path) -> str:
    make = f"(umask 077; openssl rand -hex 32 > {file})"
    try:
        token, mode = file.expanduser().read_text().strip(), file.expanduser().stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the token cannot be read: {error}", where=f"--token-file {file}", hint=make) from error
    if mode & 0o077:
        raise UserError("other users can read this token", where=f"--token-file {file}", hint=f"chmod 600 {file}")
    if len(token) < 16:
        raise UserError("a token has at least 16 characters", where=f"--token-file {file}", hint=make)
    return token


def make_way(path: Path) -> None:
    """Remove the socket file that a killed server left behind. UserError for anything else at its place."""
    if not os.path.lexists(path):
        return
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise UserError("this file exists and is no socket", where=f"--socket {path}", hint="name another path")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError as error:
            raise UserError(f"this socket cannot be used: {error.strerror}", where=f"--socket {path}") from error
    raise UserError("another server listens here", where=f"--socket {path}", hint="name another path")


def cannot_listen(address: Address, error: OSError) -> UserError:
    """The error that an address gave, as the user has to hear it."""
    where = f"--socket {address.path}" if address.path else f"{address.host}:{address.port}"
    hint = "name another path" if address.path else "if another server listens there: --port 0 takes a free one"
    return UserError(f"cannot listen: {error.strerror or error}", where=where, hint=hint)
