"""The conformance guests: assembling tests/guests/NAME.S behind lib.S, and reading what a run printed.

Runners: run_in_qemu here, with OpenSBI, which shows that the guests themselves are right; full_stack.py,
through the protocol and kvmcore.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.framework.asm import assemble_files

GUESTS = Path(__file__).resolve().parent.parent / "guests"
BASE = 0x80200000
_RESULT = re.compile(r"^RESULT pass=(\d+) fail=(\d+)$", re.MULTILINE)

KVM = {"STRICT": 1, "SUSPEND_RESERVED": -3, "SRST_RESERVED": -2, "SEPC_BIT_0": 0}
"""Constants for a run on kvmcore: answers that Linux's KVM chose."""
OPENSBI = {"STRICT": 0, "SUSPEND_RESERVED": -2, "SRST_RESERVED": -3, "SEPC_BIT_0": 1}
"""Constants for a run on OpenSBI 1.1."""


@dataclass
class GuestResult:
    """What a guest said of itself."""

    passed: int
    failed: int
    output: str

    @property
    def ok(self) -> bool:
        return self.passed > 0 and self.failed == 0


def build(name: str, **defines: int) -> bytes:
    """The flat image of a guest, to be loaded and entered at BASE."""
    return assemble_files(GUESTS / "lib.S", GUESTS / f"{name}.S", base=BASE, **defines).image


def read_result(output: str) -> GuestResult:
    """From the console's text; a guest that never finished has failed."""
    output = output.replace("\r", "")
    output = output[output.find("BEGIN\n") :] if "BEGIN\n" in output else output
    match = _RESULT.search(output)
    if match is None:
        return GuestResult(0, 1, output + "\n(no RESULT line)")
    return GuestResult(int(match.group(1)), int(match.group(2)), output)


def run_in_qemu(image: bytes, harts: int = 1, seconds: float = 60, cpu: str = "rv64") -> GuestResult:
    """Runs a guest under Debian's QEMU and its OpenSBI."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "guest.bin"
        path.write_bytes(image)
        command = ["qemu-system-riscv64", "-M", "virt", "-cpu", cpu, "-m", "128", "-smp", str(harts)]
        command += ["-kernel", str(path), "-nographic", "-monitor", "none", "-no-reboot"]
        try:
            done = subprocess.run(command, capture_output=True, timeout=seconds, check=False, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired as error:
            return read_result((error.stdout or b"").decode(errors="replace") + "\n(timeout)")
        return read_result(done.stdout.decode(errors="replace"))
