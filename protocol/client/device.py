"""Device: an in-kernel device's handle and its attributes."""

from __future__ import annotations

from array import array

from protocol.abi import structs
from protocol.client.handle import POINTEE, Handle
from protocol.codec import control


class Device(Handle):
    """For the AIA: group and attribute numbers of KVM_ABI 1.10."""

    kind = "device"

    def set_attr(self, group: int, attr: int, value: bytes | None) -> None:
        """Write an attribute; None for those that take no value."""
        argument = structs.DEVICE_ATTR.build(group=group, attr=attr, addr=POINTEE if value is not None else 0)
        self.ioctl("SET_DEVICE_ATTR", argument, {POINTEE: value} if value is not None else {})

    def get_attr(self, group: int, attr: int, size: int) -> bytes:
        """Read an attribute of `size` bytes."""
        value = bytearray(size)
        self.ioctl(
            "GET_DEVICE_ATTR",
            structs.DEVICE_ATTR.build(group=group, attr=attr, addr=POINTEE),
            {POINTEE: value},
        )
        return bytes(value)

    @staticmethod
    def keys(attributes: list[tuple[int, int]]) -> list[int]:
        """GET_STATE's keys of (group, attribute)."""
        return [group << 32 | attribute for group, attribute in attributes]

    @staticmethod
    def flat(values: list[tuple[int, int, int]]) -> list[int]:
        """SET_STATE's keys and values of (group, attribute, value)."""
        return [word for group, attribute, value in values for word in (group << 32 | attribute, value)]

    def set_attrs(self, values: list[tuple[int, int, int]]) -> None:
        """Many (group, attribute, value) at once, in order; those before one that fails are written."""
        self.control(control.SET_STATE, 0, array("Q", self.flat(values)).tobytes())

    def has_attr(self, group: int, attr: int) -> bool:
        """Whether it exists. KvmError only if the server is gone."""
        from errno import ENODEV, ENXIO

        from protocol.abi.errors import KvmError

        try:
            self.ioctl("HAS_DEVICE_ATTR", structs.DEVICE_ATTR.build(group=group, attr=attr))
        except KvmError as error:
            if error.errno in (ENXIO, ENODEV):
                return False
            raise
        return True
