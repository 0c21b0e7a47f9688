"""An eventfd of a client that vCPUs' threads signal, and that the I/O thread may take away meanwhile.

A descriptor that is closed under a write is somebody else's by then: the eight bytes would go into another eventfd, or a
file. Used by eventfd.py (ioeventfds) and irqfd.py (resampling). What native code writes to, Machine.set_bus looks after.
"""

from __future__ import annotations

import os
import threading


class EventSignal:
    """Owns `fd`. Any thread may send() and close(); a write may block where the client has filled a blocking eventfd."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._lock = threading.Lock()
        self._writers = 0
        self._closed = False

    def send(self) -> bool:
        """Add 1 to the count. False: it has been taken away."""
        with self._lock:
            if self._closed:
                return False
            self._writers += 1
        try:
            os.eventfd_write(self.fd, 1)
        except BlockingIOError:
            pass  # the counter is at its maximum: the waiter has enough reason to wake as it is
        finally:
            with self._lock:
                self._writers -= 1
                last = self._closed and not self._writers
            if last:
                os.close(self.fd)
        return True

    def close(self) -> None:
        """No signal begins from now on; the descriptor goes when none is under way. Idempotent."""
        with self._lock:
            idle = not self._closed and not self._writers
            self._closed = True
        if idle:
            os.close(self.fd)
