"""OpenPGP signatures of Debian's archive, checked without gpgv: RFC 9580, as much as an InRelease file needs.

A clear-signed text (section 7) with RSA signatures of version 4 over SHA-256 or SHA-512, against keys that are written
down here. Called by archive.py where gpgv or Debian's keyring is missing. Pure: text in, signed text and key out. Must
never return a text of which not every line was signed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterator
from typing import NamedTuple

from qemu_user.images.errors import ImageError


class Key(NamedTuple):
    """An RSA public key, as its fingerprint (hexadecimal) is made from."""

    fingerprint: str
    created: int
    """Seconds since 1970."""
    modulus: int
    exponent: int
    owner: str


#: The subkeys that sign Debian's indexes by machine, from the package debian-archive-keyring 2025.1.
DEBIAN_KEYS = (
    Key(
        "B8E5F13176D2A7A75220028078DBA3BC47EF2265",
        1743339029,
        int(
            "b282758b1a82252f371d946a2a3e294bb204906ff3cde29c3ea3750931f99636d1ee961566fdba50afebadff83ceae9d7d93"
            "1698534b41e6f70f3c0cf93e91b4d24c38edce365ced1602782af99f1cfd7ee90eed29ac68935c79d67f4ac83475e7e34dd2"
            "37b1084860a54a24e253b97c8ce842954cb765b54d318146cd56b955f052ce9f22ed005c007dd84be15d135bd0408def675d"
            "d3db9b379e0853e801c29939d245d1e3744a0a63cfc5a534e52dcfb1dd0de2e6aa94630c23f6b39dd85b7267ea6e74e216fc"
            "2417d3e3c678d4c691592e0e2080f01e2fcd9f27272327a10f007832ec6fd3d59333c22fd370b41d16adab7999c02ad34a10"
            "183dc9f0e28db511eec7be9f200fccd557a68f129b0bbf649c67c261a3adc8d0bb35ab2370a9ce24bbb2e4394d9e75e45e99"
            "9008ee9fda659eb6cabba94019696d36bbbb10e102ecfb32be730cf915c9e2e4ba341517ec59d215198263b716596342e1ee"
            "a4736044affca221c67abc2229befebb567c7acf72af618f2905437bed64a15f22184324c83a70d87e7aff89ac76fed91704"
            "9e882d631c879a1f446f4892bd837b5318bc85cff07669fafa5fc9fef4ab8d7acdcfc7fd994b78f0c8cba64b2c30f5477ccd"
            "a63da2e8a8120d3fbcd2dee54b67999a6146912434e483bd9eb3d0c583db770f15520b0b0f4deb7c30344f0c4155eead9c0d"
            "74ea1e8574273adb15c58143",
            16,
        ),
        0x10001,
        "Debian Archive Automatic Signing Key (13/trixie)",
    ),
    Key(
        "4CB50190207B4758A3F73A796ED0E7B82643E131",
        1674301461,
        int(
            "e5222912ee10d4ecf1bae2d179bce4dd51206e8b7e873e87b4b7bc1fa1bb640c2ccab26f25572cfb0c0828f88923eb317ba1"
            "c33bb7c3eb37c6f473674d470e460dc54cc5d3440b4ebf05ebbbf265a772b1ff60cad605b952603110714469647b72314f42"
            "e49c02253d7e03cace4ffba41d399b649bd1fc3845331979240501a989b6333468fb20824e70d722e3d2f818cfe4cb39c316"
            "7501f107c70fba418ff9bc6a91869948efc0f50e815b45251ed7b9f72520790909ea3897ea69a5d7904e0f2e6767a5588a84"
            "34067409b8fa58bfb2da85bf0e19660ee147920bdffe12a5713b50306207db664d40a8e37aa2a85539e3d89177810cbcc494"
            "3ef6773f6190f75d120308ab4cbecd19071c1682860763713ccd1844ff2c72aae017feef014da212e0edf0e6d975b65e83bf"
            "6b083635eb6fc15301cc1ee2dba8e71b49812ad893849d6d42288763209f6f26c3821abcfd0734cdda1506bf165e98fd5906"
            "2c80a8af55137b7fbd76f4c01e48f0d0b6c7baaf607948ae0ea479fa165df920464c27629997d32c2d2c5daddd4ef17c3624"
            "b1077c90fff4db960261e074b7ed0e0e20c7365167995114e5bc762fd1f0ed20a50273a865d08a7779a1ad79780e573ad4db"
            "409e70726d636c1485c904e25c4c85f53d875c040ec13c181eae980061510b7ab859ba4b210169a6a9a0179bff1c86849e58"
            "475f9c1529bed99d806f00b7",
            16,
        ),
        0x10001,
        "Debian Archive Automatic Signing Key (12/bookworm)",
    ),
)
_BEGIN = "-----BEGIN PGP SIGNED MESSAGE-----"
_SIGNATURE, _END = "-----BEGIN PGP SIGNATURE-----", "-----END PGP SIGNATURE-----"
#: Hash algorithm (section 9.5) -> its name and the DER prefix of its digest (RFC 8017, section 9.2).
_HASHES = {
    8: ("sha256", bytes.fromhex("3031300d060960864801650304020105000420")),
    10: ("sha512", bytes.fromhex("3051300d060960864801650304020305000440")),
}
_TEXT_SIGNATURE, _RSA, _ISSUER, _ISSUER_FINGERPRINT = 1, 1, 16, 33


class _Signature(NamedTuple):
    hash: int
    issuer: str
    """The end of the signing key's fingerprint: 16 digits, or all 40."""
    signed: bytes
    """What is hashed behind the text."""
    value: int


def split(document: str) -> tuple[str, str]:
    """(signed text with LF, armoured signature) of a clear-signed document and nothing else. ImageError.

    Text before or behind the signed part is refused, not skipped: a reader must not find lines that nobody signed.
    """
    lines = document.replace("\r\n", "\n").rstrip("\n").split("\n")
    if lines[0] != _BEGIN or lines[-1] != _END:
        raise ImageError("the index is not a signed text, or there is something around it")
    try:
        body, signature = lines.index("") + 1, lines.index(_SIGNATURE)
    except ValueError:
        raise ImageError("the index is not a whole signed text") from None
    text = lines[body:signature]
    if not all(line.startswith("Hash: ") for line in lines[1 : body - 1]) or body > signature:
        raise ImageError("the index has an unknown header")
    if any(line.startswith("-") and not line.startswith("- ") for line in (*text, *lines[signature + 1 : -1])):
        raise ImageError("the index holds more than one signed text")
    plain = "\n".join(line.removeprefix("- ").rstrip(" \t") for line in text)
    return plain, "\n".join(lines[signature + 1 : -1])


def verify(document: str, keys: tuple[Key, ...] = DEBIAN_KEYS) -> tuple[str, Key]:
    """The signed text, and the key by which it is signed. ImageError: it is not signed by any of `keys`."""
    plain, armour = split(document)
    data = plain.replace("\n", "\r\n").encode("utf-8", "surrogateescape")
    try:
        signatures = list(_signatures(_dearmour(armour)))
    except (IndexError, ValueError) as error:
        raise ImageError(f"the index carries a damaged signature ({error})") from error
    for signature in signatures:
        for key in keys:
            if signature.issuer and key.fingerprint.endswith(signature.issuer):
                if _is_right(signature, key, data):
                    return plain, key
                raise ImageError(f"the index is not what {key.owner} has signed")
    raise ImageError("the index is not signed by a key of Debian's archive that is known here")


def _is_right(signature: _Signature, key: Key, data: bytes) -> bool:
    """RSASSA-PKCS1-v1_5 (RFC 8017, 8.2.2): the whole padded block is compared."""
    name, prefix = _HASHES[signature.hash]
    digest = hashlib.new(name, data + signature.signed).digest()
    size = (key.modulus.bit_length() + 7) // 8
    if not 0 < signature.value < key.modulus:
        return False
    block = pow(signature.value, key.exponent, key.modulus).to_bytes(size, "big")
    tail = b"\0" + prefix + digest
    return block == b"\0\1" + b"\xff" * (size - 2 - len(tail)) + tail


def _dearmour(armour: str) -> bytes:
    lines = armour.split("\n")
    if "" in lines:
        lines = lines[lines.index("") + 1 :]  # headers such as Version:
    text = "".join(line for line in lines if not re.fullmatch(r"=[A-Za-z0-9+/]{4}", line))
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from error


def _signatures(data: bytes) -> Iterator[_Signature]:
    """The signatures that we can check; others (another algorithm or version) are passed over."""
    at = 0
    while at < len(data):
        tag = data[at]
        at += 1
        if tag & 0x40:  # the newer format of lengths
            size, at = _length(data, at)
            kind = tag & 0x3F
        else:
            width = 1 << (tag & 3)
            if width == 8:
                raise ValueError("a packet without length")
            size, at, kind = int.from_bytes(data[at : at + width], "big"), at + width, tag >> 2 & 15
        packet = data[at : at + size]
        if len(packet) != size:
            raise ValueError("it is cut off")
        at += size
        if kind == 2 and packet[:3] == bytes((4, _TEXT_SIGNATURE, _RSA)) and packet[3] in _HASHES:
            yield _signature(packet)


def _length(data: bytes, at: int) -> tuple[int, int]:
    """A length (section 4.2.1) and where it ends. Partial lengths do not occur in signatures."""
    first = data[at]
    if first < 192:
        return first, at + 1
    if first < 224:
        return ((first - 192) << 8) + data[at + 1] + 192, at + 2
    if first == 255:
        return int.from_bytes(data[at + 1 : at + 5], "big"), at + 5
    raise ValueError("a partial length")


def _signature(packet: bytes) -> _Signature:
    """Version 4 (section 5.2.3)."""
    end = 6 + int.from_bytes(packet[4:6], "big")
    signed = packet[:end] + b"\x04\xff" + end.to_bytes(4, "big")
    behind = end + 2 + int.from_bytes(packet[end : end + 2], "big") + 2  # unhashed subpackets, 16 bits of the digest
    bits = int.from_bytes(packet[behind : behind + 2], "big")
    value = packet[behind + 2 :]
    if len(value) != (bits + 7) // 8:
        raise ValueError("a number of the wrong size")
    return _Signature(packet[3], _issuer(packet[6:end]) or _issuer(packet[end + 2 : behind - 2]), signed,
                      int.from_bytes(value, "big"))  # fmt: skip


def _issuer(area: bytes) -> str:
    at = 0
    while at < len(area):
        size, at = _length(area, at)
        kind, body = area[at] & 0x7F, area[at + 1 : at + size]
        at += size
        if kind == _ISSUER_FINGERPRINT and len(body) == 21:
            return body[1:].hex().upper()
        if kind == _ISSUER and len(body) == 8:
            return body.hex().upper()
    return ""
