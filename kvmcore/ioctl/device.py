"""Ioctls of a device handle: one function per row of protocol/abi/ioctls.py, same name in lower case.

Called by kvmcore.ioctl.call on the VM process's I/O thread. The device says what its attributes are;
kvm_device_attr.flags means nothing to any.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvmcore.vm.irqchip.aia import Aia


def set_device_attr(device: Aia, argument: Any) -> None:
    """Write an attribute; addr points at its value."""
    device.set_attr(argument.group, argument.attr, argument.addr)


def get_device_attr(device: Aia, argument: Any) -> None:
    """Read an attribute to where addr points."""
    device.get_attr(argument.group, argument.attr, argument.addr)


def has_device_attr(device: Aia, argument: Any) -> None:
    """0 if the attribute exists."""
    device.has_attr(argument.group, argument.attr)
