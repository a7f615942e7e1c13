"""A URL to fetch, and the token that goes with it, to its own hosts only."""

from dataclasses import dataclass, field
from urllib.parse import urlsplit


def origin(url: str) -> tuple[str, str, int | None]:
    """Scheme, host and port of a URL, as far as they decide who may see a token."""
    parts = urlsplit(url)
    default = {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or default


@dataclass(frozen=True)
class Credential:
    """A token, the variable it came from, and the only origins that it may be sent to.

    Attributes:
        origin: of the source.
        others: of the same owner.
    """

    variable: str
    origin: str
    token: str | None = field(default=None, repr=False)
    others: tuple[str, ...] = ()

    def is_for(self, url: str) -> bool:
        """Whether a URL is on one of the origins."""
        return origin(url) in map(origin, (self.origin, *self.others))


@dataclass(frozen=True)
class Remote:
    """A URL, the name it goes by in messages and logs, and the credential of its host."""

    url: str = field(repr=False)
    name: str
    credential: Credential | None = None

    def headers(self) -> dict[str, str]:
        """Return the Authorization header if the URL is on an origin of the credential."""
        owner = self.credential
        if owner is None or not owner.token or not owner.is_for(self.url):
            return {}
        return {"Authorization": f"Bearer {owner.token}"}
