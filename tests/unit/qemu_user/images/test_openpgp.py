"""Signatures of Debian's index: what is signed is accepted, anything else refused, also around the signed text."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import pytest

from qemu_user.images import archive, openpgp
from qemu_user.images.errors import ImageError

#: A key of 1024 bits for this test only.
MODULUS = int(
    "b917e2ad6295804cd503939b6bb2c6babcfe2cf3d86e4441798994f861c45c6598db2db2abc6fa5a488e8a488a5842577aef"
    "c69ef60475dab9a1c0e1d4597945879ea485ed5dceda4d27ad0ad17c092907315da2be0fd1009e7aa769494098c7b9f2bacf"
    "e6de1631b2698e0b91a91030e1e47c1fefbf584c34fa7ac5ce923593",
    16,
)
PRIVATE = int(
    "51d75fe16e7fd05528b3062768bd89e5b3ff677d02abeefe4c712b2f907b34a7afa8ea51e06680f83eb0d8302f0bcb79c6e0"
    "12a0e30321e16ec738f421e2d61dc9d3597b95408070d8acf779de509fa04311c9943f1ed51f8a2c13e103c898a16a0621e1"
    "f891f3d7fd98388d5982987fa173f4c221d85c532fe0fa482d3691b1",
    16,
)
KEY = openpgp.Key("00112233445566778899AABBCCDDEEFF00112233", 0, MODULUS, 0x10001, "a test")
TEXT = "Origin: Debian\nCodename: trixie\nSHA256:\n " + "ab" * 32 + " 7 main/x\n- with a dash"


def _number(value: int) -> bytes:
    """As OpenPGP writes it: its length in bits, then its bytes."""
    return value.bit_length().to_bytes(2, "big") + value.to_bytes((value.bit_length() + 7) // 8, "big")


def signed(text: str, name: str = "sha256", issuer: str = KEY.fingerprint) -> str:
    """A clear-signed document by KEY."""
    number, prefix = next((number, prefix) for number, (hash_name, prefix) in openpgp._HASHES.items() if hash_name == name)
    subpackets = b"\x16\x21\x04" + bytes.fromhex(issuer)
    head = bytes((4, 1, 1, number)) + len(subpackets).to_bytes(2, "big") + subpackets
    data = "\r\n".join(line.rstrip() for line in text.split("\n")).encode()
    digest = hashlib.new(name, data + head + b"\x04\xff" + len(head).to_bytes(4, "big")).digest()
    tail = b"\0" + prefix + digest
    block = int.from_bytes(b"\0\1" + b"\xff" * (126 - len(tail)) + tail, "big")
    value = pow(block, PRIVATE, MODULUS)
    packet = head + b"\0\0" + digest[:2] + _number(value)
    armour = base64.b64encode(b"\x89" + len(packet).to_bytes(2, "big") + packet).decode()
    escaped = "\n".join("- " + line if line.startswith("-") else line for line in text.split("\n"))
    return (
        f"-----BEGIN PGP SIGNED MESSAGE-----\nHash: {name.upper()}\n\n{escaped}\n"
        f"-----BEGIN PGP SIGNATURE-----\n\n{armour}\n-----END PGP SIGNATURE-----\n"
    )


@pytest.mark.parametrize("name", ["sha256", "sha512"])
def test_signed_text_is_accepted(name: str) -> None:
    assert openpgp.verify(signed(TEXT, name), (KEY,)) == (TEXT, KEY)


def test_white_space_at_line_ends_is_not_signed() -> None:
    assert openpgp.verify(signed(TEXT).replace("trixie\n", "trixie \t\n"), (KEY,))[0] == TEXT


GOOD = signed(TEXT)
FORGED = "\nSHA256:\n " + "cd" * 32 + " 7 main/x\n"


@pytest.mark.parametrize(
    "document",
    [
        GOOD.replace("ab" * 32, "ab" * 31 + "ac"),
        FORGED + GOOD,  # gpgv passes this: the forged lines stand outside what is signed
        GOOD + FORGED,
        GOOD + GOOD,
        GOOD.replace("Hash: SHA256\n", "Hash: SHA256\nComment: x\n"),
        GOOD.replace("-----BEGIN PGP SIGNATURE-----", ""),
        GOOD.replace("-----BEGIN PGP SIGNATURE-----\n\n", "-----BEGIN PGP SIGNATURE-----\n\nAAAA"),
        signed(TEXT, issuer="FF" * 20),
        TEXT,
        "",
    ],
    ids=["changed", "before", "behind", "twice", "header", "no signature", "damaged", "stranger", "plain", "empty"],
)
def test_anything_else_is_refused(document: str) -> None:
    with pytest.raises(ImageError):
        openpgp.verify(document, (KEY,))


@pytest.mark.parametrize("key", openpgp.DEBIAN_KEYS, ids=lambda key: key.fingerprint[-16:])
def test_keys_are_those_that_debian_publishes(key: openpgp.Key) -> None:
    """The fingerprint (RFC 9580, 5.5.4.1) is that of the numbers."""
    numbers = b""
    for number in (key.modulus, key.exponent):
        numbers += _number(number)
    body = b"\x04" + key.created.to_bytes(4, "big") + b"\x01" + numbers
    assert hashlib.sha1(b"\x99" + len(body).to_bytes(2, "big") + body).hexdigest().upper() == key.fingerprint


def test_index_by_strangers_is_refused_with_gpgv_too(tmp_path: Path) -> None:
    path = tmp_path / "InRelease"
    path.write_text(GOOD)
    with pytest.raises(ImageError, match="not used"):
        archive.verified(path)
