"""`softkvm bench WHAT`: measure here, beside QEMU and the host's own processor where they are; `--json FILE` keeps it."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

_PROCESSOR = ("cpu", "fp", "mmu")


def main(arguments: list[str]) -> int:
    """0; 1 when something could not be measured."""
    from qemu_user.bench.processor import BenchError
    from qemu_user.images.errors import ImageError

    parser = argparse.ArgumentParser(prog="softkvm bench", description="Measure what softkvm promises.")
    groups = ("boot", "debian", "programs", "smp", "io", "switch", "migration", "ioctl")
    parser.add_argument("what", choices=(*_PROCESSOR, *groups))
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side, alternated (default: 5)")
    parser.add_argument("--seconds", type=float, default=1.0, help="all but migration: for each kernel in a run (default: 1)")
    parser.add_argument("--only", default="", metavar="KERNEL", help="just this one; io: rows; migration: idle, busy, ...")
    parser.add_argument("-m", "--memory", type=int, default=512, metavar="MIB", help="migration: of the guest (default: 512)")
    options = parser.parse_args(arguments)
    try:
        measures = {
            "boot": _boot, "debian": _debian, "programs": _programs, "smp": _smp, "io": _io, "switch": _switch,
            "migration": _migration, "ioctl": _ioctl,
        }  # fmt: skip
        measure = measures.get(options.what, _processor)
        figures = measure(options)
    except (BenchError, RuntimeError, ImageError, OSError) as error:
        sys.stderr.write(f"softkvm bench: {error}\n")
        return 1
    if options.json:
        about = {"machine": platform.machine(), "kernel": platform.release(), "rounds": options.rounds}
        Path(options.json).write_text(json.dumps({"about": about, **figures}, indent=2) + "\n")
    return 0


def _processor(options: argparse.Namespace) -> dict[str, Any]:
    from qemu_user.bench import processor

    kernels = processor.run(options.what, options.rounds, options.seconds, options.only, _progress)
    _progress("")
    print(processor.table(kernels))
    return {options.what: processor.figures(kernels)}


def _ioctl(options: argparse.Namespace) -> dict[str, Any]:
    """kvmcore's answers, and sequences on fresh VMs."""
    from qemu_user.bench import ioctls

    figures = ioctls.measure(options.rounds, options.seconds, _progress)
    _progress("")
    print(ioctls.table(figures))
    return {"ioctl": figures}


def _boot(options: argparse.Namespace) -> dict[str, Any]:
    """Boots, and work for the kernel in the guest."""
    from qemu_user.bench import linux, processor

    linux.the_image()
    kernels = linux.in_linux(linux.IN_LINUX, options.rounds, options.seconds, _progress)
    kernels |= linux.boots(options.rounds, _progress)
    _progress("")
    print(processor.table(kernels))
    return {"boot": processor.figures(kernels)}


def _debian(options: argparse.Namespace) -> dict[str, Any]:
    from qemu_user.bench import debian_boot, processor

    kernels = debian_boot.boots(options.rounds, _progress)
    _progress("")
    print(processor.table(kernels))
    return {"debian": processor.figures(kernels)}


def _smp(options: argparse.Namespace) -> dict[str, Any]:
    from qemu_user.bench import linux, processor

    linux.the_image()
    measured = linux.smp(options.rounds, options.seconds, _progress)
    figures = measured["figures"]
    _progress("")
    print(processor.table(measured["kernels"]))
    for side, times in figures["two_vcpus_vs_one"].items():
        print(f"two vCPUs against one, {side}: {times:.2f} times as fast")
    print(f"an idle VM: {100 * figures['idle_core']:.1f} % of a core")
    return {"smp": figures}


def _programs(options: argparse.Namespace) -> dict[str, Any]:
    from qemu_user.bench import processor, programs

    kernels = programs.run(options.rounds, max(2, round(4 * options.seconds)), options.only, _progress)
    _progress("")
    print(processor.table(kernels))
    return {"programs": processor.figures(kernels)}


def _progress(line: str) -> None:
    """On a terminal one line that changes, elsewhere nothing."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()


def _io(options: argparse.Namespace) -> dict[str, Any]:
    from qemu_user.bench import io

    rows = io.figures(io.run(options.rounds, options.seconds, options.only, _progress))
    _progress("")
    print(io.table(rows))
    return {"io": rows}


def _switch(options: argparse.Namespace) -> dict[str, Any]:
    """The network through `softkvm switch` and a tap."""
    from qemu_user.bench import io, switch

    rows = io.figures(switch.run(options.rounds, options.seconds, options.only, _progress))
    _progress("")
    print(io.table(rows))
    return {"switch": rows}


def _migration(options: argparse.Namespace) -> dict[str, Any]:
    from qemu_user.bench import migration

    figures = migration.run(options.rounds, options.memory << 20, options.only, lambda line: print(line, flush=True))
    return {"memory_mib": options.memory, "milliseconds": figures}
