"""One thread per vCPU: run, look at the exit, handle it, run again. And the gate by which they are stopped.

Started by machine/machine.py. Pausing: close the gate, kick every vCPU, wait until all are parked. Whatever
goes wrong becomes one sentence for the machine; a thread never dies of an exception.
"""

from __future__ import annotations

import errno
import threading
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

from protocol.abi.errors import KvmError
from protocol.abi.exits import Exit
from protocol.abi.run_page import EXIT_REASON, IMMEDIATE_EXIT, MEMORY_FAULT, U32, UNION
from protocol.abi.structs import MEMORY_EXIT_FLAG_USERFAULT
from protocol.channel.latency import woken_soon
from qemu_user.devices.absent import PageLost
from qemu_user.exits import handlers
from qemu_user.exits.context import ExitContext
from qemu_user.exits.internal_error import describe, unknown_exit

if TYPE_CHECKING:
    from protocol.client import Vcpu, Vm

RUN, PAUSE, QUIT = "run", "pause", "quit"
_REPEAT_KICK_SECONDS = 0.5
_AGAIN = (errno.EINTR, errno.EAGAIN)


class Gate:
    """Who may run. vCPU threads pass() before each entry; the machine sets what they find."""

    def __init__(self) -> None:
        self.order = PAUSE
        self._condition = threading.Condition()
        self._parked = 0
        self._threads = 0

    def join(self) -> None:
        """A thread that runs a vCPU begins."""
        with self._condition:
            self._threads += 1

    def leave(self) -> None:
        """It ends."""
        with self._condition:
            self._threads -= 1
            self._condition.notify_all()

    def wait(self) -> bool:
        """Called when the order is not RUN: park until it is; False when it is QUIT."""
        with self._condition:
            self._parked += 1
            self._condition.notify_all()
            while self.order == PAUSE:
                self._condition.wait()
            self._parked -= 1
            return self.order == RUN

    def open(self) -> None:
        """Let the vCPUs run."""
        with self._condition:
            self.order = RUN
            self._condition.notify_all()

    def close(self, vm: Vm, vcpus: list[Vcpu], order: str, seconds: float) -> bool:
        """Stop all vCPUs (`order`: PAUSE or QUIT); False if one is still running after `seconds`."""
        with self._condition:
            if self.order != QUIT:
                self.order = order
            self._condition.notify_all()
        until = time.monotonic() + seconds
        while True:
            for vcpu in vcpus:
                try:
                    vm.kick(vcpu)
                except (KvmError, OSError):
                    pass  # it is gone: its RUN fails as well, which is all that we want
            with self._condition:
                if self._condition.wait_for(self._all_stopped, min(_REPEAT_KICK_SECONDS, until - time.monotonic())):
                    return True
            if time.monotonic() >= until:
                return False

    def _all_stopped(self) -> bool:
        return self._threads == 0 if self.order == QUIT else self._parked == self._threads


class VcpuThread(threading.Thread):
    """Runs one vCPU until the gate says QUIT or the VM fails."""

    def __init__(self, vm: Vm, vcpu: Vcpu, context: ExitContext, gate: Gate, was_done: Callable[[int], bool] | None) -> None:
        """`was_done`: another process has run the vCPU, and may have dealt with its latest exit (machine/keeper.py)."""
        super().__init__(name=f"vcpu-{context.cpu}", daemon=True)
        self._was_done = was_done
        self._vm, self._vcpu, self._context, self._gate = vm, vcpu, context, gate
        self.thread_id = 0

    def run(self) -> None:
        self.thread_id = threading.get_native_id()
        woken_soon()
        self._gate.join()
        try:
            self._loop()
        except PageLost as error:
            self._context.fail(str(error))
        except Exception as error:
            self._context.fail(f"internal error on CPU {self._context.cpu}: {error!r}\n{traceback.format_exc()}")
        finally:
            self._gate.leave()

    def _loop(self) -> None:
        gate, run, table, context = self._gate, self._vcpu.run, handlers(self._context), self._context
        entered = False
        while True:
            if gate.order != RUN:
                if entered:  # a vCPU that has never run has nothing to complete, and may still be configured
                    self._settle()
                if not gate.wait():
                    return
            entered = True
            try:
                if self._was_done is None:
                    reason = run()
                else:
                    done, self._was_done = self._was_done(context.cpu), None
                    reason = self._vcpu.rejoin()
                    if done:
                        continue
            except KvmError as error:
                if error.errno in _AGAIN or (error.errno == errno.EFAULT and self._page_has_come()):
                    continue
                if gate.order != QUIT:
                    context.fail(describe(error, self._still_alive(error), self._where()))
                return
            handler = table.get(reason)
            if handler is None:
                unknown_exit(context, reason)
                return
            handler()
            if context.done is not None and reason != Exit.MMIO:
                context.done(context.cpu, None)

    def _page_has_come(self) -> bool:
        """KVM_EXIT_MEMORY_FAULT: the vCPU has touched a page that was not there. Whether it is now."""
        page = self._context.page
        if U32.unpack_from(page, EXIT_REASON)[0] != Exit.MEMORY_FAULT:
            return False
        flags, gpa, _ = MEMORY_FAULT.unpack_from(page, UNION)
        return bool(flags & MEMORY_EXIT_FLAG_USERFAULT) and self._context.memory.arrive(gpa)

    def _still_alive(self, error: KvmError) -> bool:
        """Whether the VM's process goes on. EIO is also the last word of one that is about to end: look
        twice.
        """
        for _ in range(10 if error.errno == errno.EIO else 1):
            if not self._vm.alive:
                return False
            time.sleep(0.05)
        return True

    def _settle(self) -> None:
        """Complete the exit that was just handled: whoever reads or changes a parked vCPU must not find half
        an instruction (KVM_ABI 1.5: the completion would move a pc that was set meanwhile).
        """
        page = self._context.page
        page[IMMEDIATE_EXIT] = 1
        try:
            self._vcpu.run()
        except KvmError:
            pass  # EINTR, as was asked for; anything else comes again with the next RUN
        finally:
            page[IMMEDIATE_EXIT] = 0

    def _where(self) -> str:
        try:
            from protocol.abi.structs_riscv import PC

            pc = self._vcpu.get_one_reg(PC)
        except (KvmError, OSError):
            return ""
        return f" (CPU {self._context.cpu}, pc {pc:#x})" if isinstance(pc, int) else ""
