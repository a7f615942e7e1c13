"""Which addresses count as public, and that nothing else is connected to."""

import socket
from ipaddress import ip_address

import pytest

from weights.download.addresses import is_public, public_addresses
from weights.download.http import HttpClient, HttpSettings
from weights.download.remote import Remote
from weights.serving.errors import ForbiddenAddressError, SourceUnavailableError


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "2002:808:808::", "::ffff:8.8.8.8"]
)
def test_public(address):
    assert is_public(ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::7f00:1",
        "::ffff:10.0.0.1",
        "fe80::1",
        "fec0::1",
        "fd00:ec2::254",
        "ff0e::1",
        "64:ff9b::7f00:1",
        "64:ff9b::808:808",
        "64:ff9b:1::1",
        "2002:7f00:1::",
    ],
)
def test_not_public(address):
    assert not is_public(ip_address(address))


def resolving(monkeypatch, answers):
    """Let names resolve to these addresses, one list per time they are asked."""
    asked = []

    def getaddrinfo(host, port, *args, **kwargs):
        asked.append(host)
        addresses = answers[min(len(asked), len(answers)) - 1]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


def test_one_private_address_among_public_ones_is_enough_to_refuse(monkeypatch):
    resolving(monkeypatch, [["8.8.8.8", "10.0.0.1"]])
    with pytest.raises(ForbiddenAddressError, match=r"mixed\.example"):
        public_addresses("mixed.example", 443)


def test_name_is_resolved_once_and_the_checked_address_is_used(monkeypatch):
    """A name that turns private on the second look-up has no second look-up."""
    asked = resolving(monkeypatch, [["8.8.8.8", "1.1.1.1"], ["127.0.0.1"]])
    connected = []

    def connect(address, *args, **kwargs):
        connected.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr("weights.download.addresses.create_connection", connect)
    client = HttpClient(HttpSettings())
    with (
        pytest.raises(SourceUnavailableError),
        client.open(Remote("http://rebinding.example/x.tar", "x")),
    ):
        pass
    client.close()
    assert asked == ["rebinding.example"]
    assert connected == [("8.8.8.8", 80), ("1.1.1.1", 80)]


def test_redirect_to_loopback_is_refused(monkeypatch, hub):
    """The first host passes for public here; the one that it redirects to does not."""
    hub.add_file("/secret.tar", b"secret")
    url = hub.add_redirect("/x.tar", hub.storage_url + "/secret.tar")
    real = public_addresses
    monkeypatch.setattr(
        "weights.download.addresses.public_addresses",
        lambda host, port: [host] if host == "127.0.0.1" else real(host, port),
    )
    client = HttpClient(HttpSettings())
    with pytest.raises(ForbiddenAddressError, match="localhost"), client.open(Remote(url, "x")):
        pass
    client.close()
    assert hub.count("GET", "/x.tar") == 1
    assert hub.count("GET", "/secret.tar") == 0


@pytest.mark.parametrize("target", ["file:///etc/passwd", "gopher://host/", "http://[bad/"])
def test_redirect_to_another_scheme_is_refused(hub, target):
    url = hub.add_redirect("/x.tar", target)
    client = HttpClient(HttpSettings(allow_private_hosts=True))
    with (
        pytest.raises(ValueError, match="not a valid http or https URL"),
        client.open(Remote(url, "x")),
    ):
        pass
    client.close()
