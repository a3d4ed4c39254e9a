"""Network addresses that servers listen on."""

import ipaddress
import re
import socket

from metaalign_rl.core.errors import UserError


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_loopback_name(authority: str) -> bool:
    """Whether a host with an optional port, as in the header Host, names this machine: localhost or 127.0.0.1."""
    host = authority.rpartition("]")[0].removeprefix("[") or authority.partition(":")[0]
    host = host.lower().removesuffix(".")
    return is_loopback(host) or host.endswith(".localhost")


def check_url(key: str, url: str, token: str) -> None:
    """Check the URL of a server: it has a scheme, and no secrets, which would be kept in configs, logs and errors.

    Args:
        key: the setting or argument, for the error.
        token: the environment variable that has the server's token.

    Raises:
        UserError: the URL has no scheme, or a user, a password, a query or a fragment. It does not repeat them.
    """
    if "@" in url:
        raise UserError(f"{key}: expected a URL without a user or password; set {token} to the server's token instead")
    if re.search(r"[?#]", url):
        raise UserError(f"{key}: expected a URL without '?' or '#'; set {token} to the server's token")
    if not re.match(r"https?://[^/]", url, re.IGNORECASE):
        raise UserError(f"{key}: expected a URL such as http://127.0.0.1:8300, found {url!r}")


def listen(host: str, port: int) -> socket.socket:
    """A TCP socket that listens on the address.

    Raises:
        UserError: the address is in use, or does not belong to this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen()
    except (OSError, OverflowError) as error:
        found.close()
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--host {host} --port {port}: cannot listen there ({reason}); give another") from None
    return found


def url_of(host: str, port: int) -> str:
    """The address as an HTTP URL, with brackets around an IPv6 host."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
