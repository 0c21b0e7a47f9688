"""What the warm parent is asked, as bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_user.warm.request import LENGTH, MOST_FDS, Request, decode

WORDS = st.binary(max_size=20).filter(lambda word: b"\0" not in word)
NAMES = st.binary(min_size=1, max_size=9).filter(lambda word: not set(word) & set(b"\0="))
REQUESTS = st.builds(
    Request, WORDS, st.lists(WORDS, max_size=5), st.dictionaries(NAMES, WORDS, max_size=5), st.integers(0, 0o777),
    st.booleans(), st.lists(st.integers(0, 1 << 20), max_size=6),
)  # fmt: skip


@given(REQUESTS)
def test_comes_as_it_went(request: Request) -> None:
    data = request.encode()
    assert LENGTH.unpack_from(data)[0] == len(data) - LENGTH.size
    assert decode(data[LENGTH.size :]) == request


@given(REQUESTS, st.data())
def test_what_is_damaged_is_an_error_or_another_request(request: Request, data: st.DataObject) -> None:
    body = bytearray(request.encode()[LENGTH.size :])
    body[data.draw(st.integers(0, len(body) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        assert isinstance(decode(bytes(body[: data.draw(st.integers(0, len(body)))])), Request)
    except ValueError:
        pass


def test_too_many_descriptors() -> None:
    request = Request(b"softkvm", [], {}, 0, False, list(range(MOST_FDS + 1)))
    with pytest.raises(ValueError, match="too many"):
        decode(request.encode()[LENGTH.size :])
