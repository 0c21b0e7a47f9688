"""Many requests to one VM in one message, for a moment at which each way there and back counts: the guest stands."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from protocol.abi import structs
from protocol.abi.errors import KvmError
from protocol.abi.ioctls import BY_NAME
from protocol.client.handle import ARGUMENT, POINTEE, Handle
from protocol.client.link import Channel, Link
from protocol.codec import control
from protocol.codec.envelope import COPY_IN, COPY_OUT, Copy, Reply

NO_FD = 0xFFFFFFFF


class Answer:
    """What a request of a batch is answered with, once the batch was sent."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.reply: Reply | None = None

    def checked(self) -> Reply:
        """The reply. KvmError: the errno that came back."""
        assert self.reply is not None
        if self.reply.errno:
            raise KvmError(self.reply.errno, self._name, self.reply.extra.decode(errors="replace"))
        return self.reply

    def words(self) -> list[int]:
        """The values of a GET_STATE."""
        return list(array("Q", self.checked().extra))

    def number(self) -> int:
        """The value of a struct of one number."""
        return int.from_bytes(self.checked().copies[0][1], "little")


class Batch:
    """Requests over `channel`, served in the order in which they are added, control.MAX_BATCH in a message; descriptors
    that they name are made known beforehand, over `link`."""

    def __init__(self, channel: Channel, link: Link) -> None:
        self._channel, self._link = channel, link
        self._files: dict[int, None] = {}
        self._answers: list[Answer] = []
        self._requests: list[tuple[int, int, int, tuple[Copy, ...], bytes]] = []

    def _add(self, name: str, handle: Handle, number: int, arg: int, copies: tuple[Copy, ...], payload: bytes) -> Answer:
        answer = Answer(name)
        self._answers.append(answer)
        self._requests.append((handle.number, number, arg, copies, payload))
        return answer

    def get_state(self, handle: Handle, keys: Iterable[int]) -> Answer:
        """GET_STATE of a vCPU or device: Answer.words()."""
        return self._add("GET_STATE", handle, control.GET_STATE, 0, (), array("Q", keys).tobytes())

    def set_state(self, handle: Handle, flat: Iterable[int]) -> Answer:
        """SET_STATE: key, value, key, value, ..."""
        return self._add("SET_STATE", handle, control.SET_STATE, 0, (), array("Q", flat).tobytes())

    def get_mp_state(self, vcpu: Handle) -> Answer:
        """KVM_GET_MP_STATE: Answer.number()."""
        copy = Copy(ARGUMENT, structs.MP_STATE.size, COPY_OUT, b"")
        return self._add("GET_MP_STATE", vcpu, BY_NAME["GET_MP_STATE"].number, ARGUMENT, (copy,), b"")

    def _ioctl(self, name: str, handle: Handle, data: bytes) -> Answer:
        """One with a struct that only goes in."""
        return self._add(name, handle, BY_NAME[name].number, ARGUMENT, (Copy(ARGUMENT, len(data), COPY_IN, data),), b"")

    def set_mp_state(self, vcpu: Handle, state: int) -> Answer:
        """KVM_SET_MP_STATE."""
        return self._ioctl("SET_MP_STATE", vcpu, structs.MP_STATE.build(mp_state=state))

    def set_attr(self, device: Handle, group: int, attr: int, value: bytes | None) -> Answer:
        """KVM_SET_DEVICE_ATTR; None for those that take no value."""
        data = structs.DEVICE_ATTR.build(group=group, attr=attr, addr=POINTEE if value is not None else 0)
        copies = [Copy(ARGUMENT, len(data), COPY_IN, data)]
        copies += [Copy(POINTEE, len(value), COPY_IN, value)] if value is not None else []
        number = BY_NAME["SET_DEVICE_ATTR"].number
        return self._add("SET_DEVICE_ATTR", device, number, ARGUMENT, tuple(copies), b"")

    def irqfd(self, vm: Handle, eventfd: int, gsi: int) -> Answer:
        """KVM_IRQFD."""
        self._files[eventfd] = None
        data = structs.IRQFD.build(fd=eventfd, gsi=gsi, flags=0, resamplefd=NO_FD)
        return self._ioctl("IRQFD", vm, data)

    def ioeventfd(self, vm: Handle, eventfd: int, addr: int, length: int, datamatch: int | None, flags: int = 0) -> Answer:
        """KVM_IOEVENTFD."""
        self._files[eventfd] = None
        flags |= structs.IOEVENTFD_FLAG_DATAMATCH if datamatch is not None else 0
        data = structs.IOEVENTFD.build(datamatch=datamatch or 0, addr=addr, len=length, fd=eventfd, flags=flags)
        return self._ioctl("IOEVENTFD", vm, data)

    def send(self) -> None:
        """Have them served, all of them even if some fail; every Answer is there then. KvmError: the server is gone."""
        if self._files:
            self._link.pass_files(list(self._files))
        for at in range(0, len(self._requests), control.MAX_BATCH):
            replies = self._channel.request_all(self._requests[at : at + control.MAX_BATCH])
            for answer, reply in zip(self._answers[at : at + control.MAX_BATCH], replies, strict=True):
                answer.reply = reply
