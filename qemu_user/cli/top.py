"""`softkvm top`: what the running VMs do, as rates; and what the host's translator does. Ends with q or Ctrl-C.

Counters come from KVM_GET_STATS_FD by way of each VM's QMP (query-stats); CPU time and memory from /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qemu_user.management.registry import VmEntry

_TICK = os.sysconf("SC_CLK_TCK")
_MIB = 1 << 20
#: Rate in the JSON -> the counters that it is the sum of.
RATES = {
    "exits": ("exits", "wfi_exit_stat"),
    "exits_mmio": ("mmio_exit_user", "mmio_exit_kernel"),
    "exits_sbi": ("ecall_exit_stat",),
    "exits_csr": ("csr_exit_user",),
    "exits_wfi": ("wfi_exit_stat",),
    "tlb_misses": ("tlb_misses", "fetch_tlb_misses"),
    "guest_traps": ("guest_traps",),
}
_COLUMNS = (
    f"{'NAME':20}{'PID':>8}{'CPU %':>7}{'MEM MiB':>9}{'MIPS':>8}{'EXITS/s':>9}{'MMIO':>7}{'SBI':>7}{'CSR':>6}{'WFI':>7}"
    f"{'TLB/s':>9}{'REGIONS':>9}{'READY':>7}{'MADE':>6}{'SECONDS':>9}{'DECODED':>10}{'CODE MiB':>10}"
)


@dataclass(frozen=True)
class Sample:
    """A VM's counters at one moment."""

    time: float
    cpu: float
    counters: dict[str, int]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="softkvm top", description="Watch what running VMs do.")
    parser.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="between two looks (default: 1)")
    parser.add_argument("--once", action="store_true", help="look twice, print one table and end")
    parser.add_argument("--json", action="store_true", help="a JSON object a line instead of a table")
    options = parser.parse_args(arguments)
    if not 0.05 <= options.interval <= 3600:
        parser.error("--interval: 0.05 to 3600 seconds")
    live = not options.once and not options.json and sys.stdout.isatty()
    before = look()
    while True:
        if _wait(options.interval, live):
            return 0
        after = look()
        report = rates(before, after)
        before = after
        if options.json:
            sys.stdout.write(json.dumps(report) + "\n")
        else:
            sys.stdout.write(("\x1b[H\x1b[J" if live else "") + table(report))
        sys.stdout.flush()
        if options.once:
            return 0


def _wait(seconds: float, live: bool) -> bool:
    """True: q was typed."""
    if not (live and sys.stdin.isatty()):
        time.sleep(seconds)
        return False
    readable, _, _ = select.select([sys.stdin], [], [], seconds)
    return bool(readable) and sys.stdin.readline().strip().lower() == "q"


def look() -> dict[int, tuple[VmEntry, Sample]]:
    """The running VMs by process id. One that is ending, or of an earlier softkvm, is left out."""
    from qemu_user.cli.vm import VerbError, execute
    from qemu_user.management.registry import list_vms

    found = {}
    for entry in list_vms():
        try:
            (answer,) = execute(entry.name, "query-stats", target="vm")
            cpu = _cpu(entry.pid) + _cpu(entry.vm_pid)
        except (VerbError, OSError, ValueError):
            continue
        counters = {stat["name"]: stat["value"] for stat in answer["stats"]}
        found[entry.pid] = entry, Sample(time.monotonic(), cpu, counters)
    return found


def rates(before: dict[int, tuple[VmEntry, Sample]], after: dict[int, tuple[VmEntry, Sample]]) -> dict[str, Any]:
    """What --json prints: rates per second, sizes in bytes, and counts since the VM's start."""
    vms, host, host_time = [], {}, -1.0
    for pid, (entry, now) in after.items():
        earlier = before[pid][1] if pid in before else now
        seconds = now.time - earlier.time or 1.0

        def per_second(*names: str, now: Sample = now, earlier: Sample = earlier, seconds: float = seconds) -> float:
            return sum(now.counters.get(name, 0) - earlier.counters.get(name, 0) for name in names) / seconds

        counters = now.counters
        vms.append({
            "name": entry.name, "pid": pid, "vm_pid": entry.vm_pid, "cpus": entry.cpus,
            "cpu_percent": 100 * (now.cpu - earlier.cpu) / seconds, "memory": _memory(entry.pid) + _memory(entry.vm_pid),
            "mips": per_second("guest_instructions") / 1e6,
            **{name: per_second(*parts) for name, parts in RATES.items()},
            "guest_instructions": counters.get("guest_instructions", 0),
            "assembled_pages": counters.get("assembled_pages", 0),
            "regions": counters.get("regions", 0), "regions_ready_made": counters.get("regions_ready_made", 0),
            "regions_translated": counters.get("regions_translated", 0),
            "translation_seconds": counters.get("translation_ns", 0) / 1e9,
            "decoded_bytes": counters.get("decoded_bytes", 0), "code_bytes": counters.get("code_bytes", 0),
        })  # fmt: skip
        said = {name: value for name, value in counters.items() if name.startswith("host_")}
        if said.get("host_translation_ns", 0) > host_time:  # who heard of it last
            host, host_time = said, said["host_translation_ns"]
    return {"time": time.time(), "vms": vms, "translator": {
        "regions": host.get("host_regions_translated", 0), "seconds": host.get("host_translation_ns", 0) / 1e9,
        "waiting": host.get("host_regions_waiting", 0), "arena_bytes": host.get("host_arena_bytes", 0),
        "template_bytes": host.get("host_template_bytes", 0),
    }}  # fmt: skip


def table(report: dict[str, Any]) -> str:
    """For people."""
    translator = report["translator"]
    lines = [
        f"{time.strftime('%H:%M:%S', time.localtime(report['time']))}  {len(report['vms'])} VMs;  translator: "
        f"{translator['regions']} regions in {translator['seconds']:.1f} s, {translator['waiting']} waiting, "
        f"{translator['arena_bytes'] / _MIB:.1f} MiB of code; {translator['template_bytes'] / _MIB:.1f} MiB of template code",
        _COLUMNS,
    ]
    for vm in sorted(report["vms"], key=lambda vm: -vm["cpu_percent"]):
        lines.append(
            f"{vm['name'][:19]:20}{vm['pid']:>8}{vm['cpu_percent']:>7.1f}{vm['memory'] / _MIB:>9.1f}{vm['mips']:>8.1f}"
            f"{vm['exits']:>9.0f}{vm['exits_mmio']:>7.0f}{vm['exits_sbi']:>7.0f}{vm['exits_csr']:>6.0f}{vm['exits_wfi']:>7.0f}"
            f"{vm['tlb_misses']:>9.0f}{vm['regions']:>9}{vm['regions_ready_made']:>7}{vm['regions_translated']:>6}"
            f"{vm['translation_seconds']:>9.2f}{vm['decoded_bytes'] / _MIB:>10.1f}{vm['code_bytes'] / _MIB:>10.1f}"
        )
    return "\n".join(lines) + "\n"


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def _memory(pid: int) -> int:
    """Bytes that a process has in memory, shared pages in proportion; 0 if it has just ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        return int(text.split("\nPss:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return 0
