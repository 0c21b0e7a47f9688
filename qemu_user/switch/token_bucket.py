"""A token bucket (RFC 2697's, single rate): bytes per second with a burst. May go into debt by one frame, so that frames longer
than the burst pass as well. Pure; the caller brings the time.
"""

from __future__ import annotations


class TokenBucket:
    """`rate`: bytes per second; `burst`: bytes that may go at once."""

    def __init__(self, rate: int, burst: int, now: float) -> None:
        self.rate, self.burst = rate, burst
        self._tokens, self._filled = float(burst), now

    def take(self, length: int, now: float) -> float:
        """`length` bytes go; the seconds until the next may."""
        self._tokens = min(float(self.burst), self._tokens + (now - self._filled) * self.rate) - length
        self._filled = now
        return max(0.0, -self._tokens / self.rate)

    def wait(self, now: float) -> float:
        """Seconds until bytes may go."""
        return self.take(0, now)
