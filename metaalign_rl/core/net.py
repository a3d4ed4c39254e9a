"""Network addresses: those that servers listen on, and the proxies on the way to them."""

import ipaddress
import re
import socket
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

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


def proxy_for(url: str) -> str | None:
    """The proxy for requests to `url`, from the environment (`http_proxy`, `https_proxy`, `all_proxy`); None: none.

    As with curl, `no_proxy` lists names, domains and addresses that need none, and ranges such as 10.0.0.0/8. Unlike
    curl, addresses of this machine and of private networks never need one: a proxy leads out of the network.
    """
    parts, proxies = urlsplit(url), getproxies()
    host = parts.hostname or ""
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or is_loopback(host) or proxy_bypass(host) or _is_direct(host, proxies.get("no", "")):
        return None
    return proxy


def _is_direct(host: str, no_proxy: str) -> bool:
    """Whether `host` is an address of a private network or of a range in `no_proxy`."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_private or address.is_link_local or any(_contains(part, address) for part in no_proxy.split(","))


def _contains(part: str, address: "ipaddress.IPv4Address | ipaddress.IPv6Address") -> bool:
    try:
        return address in ipaddress.ip_network(part.strip(), strict=False)
    except ValueError:
        return False


def transport(proxy: str | None) -> Any:
    """The `transport` of a `httpx.Client` for what `proxy_for` found. httpx itself cannot read ranges in no_proxy."""
    import httpx

    return httpx.HTTPTransport(proxy=proxy)


def via(proxy: str | None) -> str:
    """The proxy for an error message, without its password; empty without a proxy."""
    if not proxy:
        return ""
    parts = urlsplit(proxy)
    return (
        f" through the proxy {parts.hostname}:{parts.port} of the environment; if the server needs no proxy, add its "
        "name to no_proxy"
    )
