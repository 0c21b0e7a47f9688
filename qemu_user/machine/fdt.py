"""The flattened device tree: nodes in, a blob out (Devicetree Specification 0.4, chapter 5).

Called by machine/machine.py with what machine/virt.py and the devices describe. Knows nothing of what the
nodes mean.
"""

from __future__ import annotations

import struct

from qemu_user.devices.device import FdtNode, PropertyValue

_MAGIC, _VERSION, _COMPATIBLE_VERSION = 0xD00DFEED, 17, 16
_BEGIN_NODE, _END_NODE, _PROP, _END = 1, 2, 3, 9
_HEADER = struct.Struct(">10I")


def property_bytes(value: PropertyValue) -> bytes:
    """A property's value in the blob."""
    if value is True:
        return b""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode() + b"\0"
    if isinstance(value, int):
        return value.to_bytes(4, "big")
    return b"".join(property_bytes(part) for part in value)


def cells64(value: int) -> list[int]:
    """A 64-bit number as two cells."""
    return [value >> 32, value & 0xFFFFFFFF]


def flatten(root: FdtNode, boot_cpu: int = 0) -> bytes:
    """The blob of a tree; properties that are False are left out."""
    strings = bytearray()
    offsets: dict[str, int] = {}
    words = bytearray()

    def name_offset(name: str) -> int:
        if name not in offsets:
            offsets[name] = len(strings)
            strings.extend(name.encode() + b"\0")
        return offsets[name]

    def pad() -> None:
        words.extend(bytes(-len(words) % 4))

    def emit(node: FdtNode) -> None:
        words.extend(struct.pack(">I", _BEGIN_NODE) + node.name.encode() + b"\0")
        pad()
        for name, value in node.properties.items():
            if value is False:
                continue
            data = property_bytes(value)
            words.extend(struct.pack(">III", _PROP, len(data), name_offset(name)) + data)
            pad()
        for child in node.children:
            emit(child)
        words.extend(struct.pack(">I", _END_NODE))

    emit(root)
    words.extend(struct.pack(">I", _END))
    reserved = bytes(16)
    structure = _HEADER.size + len(reserved)
    text = structure + len(words)
    total = text + len(strings)
    header = _HEADER.pack(
        _MAGIC,
        total,
        structure,
        text,
        _HEADER.size,
        _VERSION,
        _COMPATIBLE_VERSION,
        boot_cpu,
        len(strings),
        len(words),
    )
    return header + reserved + bytes(words) + bytes(strings)
