"""Which network addresses a URL from a user may reach, and connections that hold to it.

A check of the URL's text proves nothing: 127.1, 0x7f.1 and 2130706433 are all loopback, a public
name can resolve to a private address, and can resolve differently the second time it is asked. So
the check sits where the socket is opened: the name is resolved once, every address it has must be
public, and the connection goes to one of those very addresses. Each redirect opens its own
connection and is checked by the same line. TLS still verifies the name, not the address.
"""

import socket
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address

from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import NameResolutionError, NewConnectionError
from urllib3.util.connection import create_connection

from weights.serving.errors import ForbiddenAddressError


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether the address belongs to the public internet.

    More than Python's is_global: that is true of multicast, of 6to4 (judged here by the IPv4
    address it carries) and of NAT64 (64:ff9b::/96, refused here as part of the reserved ::/8).
    """
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address.sixtofour is not None:
            return is_public(address.sixtofour)
        if address.is_site_local:
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def public_addresses(host: str, port: int) -> list[str]:
    """Resolve a host once and return its addresses, in the resolver's order.

    Raises:
        ForbiddenAddressError: any of them is not public.
        OSError: the name is unknown.
    """
    found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    for address in addresses:
        if not is_public(ip_address(address.partition("%")[0])):
            raise ForbiddenAddressError(
                f"The host {host!r} leads to an address that is not on the public internet, and "
                f"weights are not fetched from there. Give a URL that is reachable from anywhere."
            )
    return addresses


def _connect(connection: HTTPConnection, addresses: Sequence[str]) -> socket.socket:
    error: OSError | None = None
    for address in addresses:
        try:
            return create_connection(
                (address, connection.port),
                connection.timeout,
                source_address=connection.source_address,
                socket_options=connection.socket_options,
            )
        except OSError as failure:
            error = failure
    raise NewConnectionError(connection, f"no address of {connection.host} answers") from error


class _PublicOnly(HTTPConnection):
    def _new_conn(self) -> socket.socket:
        try:
            addresses = public_addresses(self.host, self.port)
        except (socket.gaierror, UnicodeError) as error:
            reason = error if isinstance(error, socket.gaierror) else socket.gaierror(str(error))
            raise NameResolutionError(self.host, self, reason) from error
        return _connect(self, addresses)


class _PublicOnlyTLS(_PublicOnly, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _PublicOnly


class _PoolTLS(HTTPSConnectionPool):
    ConnectionCls = _PublicOnlyTLS


class PublicOnlyAdapter(HTTPAdapter):
    """A requests adapter whose connections reach public addresses only."""

    def init_poolmanager(self, *args: object, **kwargs: object) -> None:
        """Build the pool manager, with connections that check where they go."""
        super().init_poolmanager(*args, **kwargs)  # type: ignore[arg-type]
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _PoolTLS}
