import pytest

from tests import tiny


@pytest.fixture(params=tiny.SIZES, ids=lambda size: f"width{size.width}", scope="session")
def flux(request):
    """A transformer, a CLIP and a T5, of two sizes in turn."""
    return tiny.modules(request.param)
