"""`softkvm fuzz`: random sequences of the ioctl protocol against a kvmcore; replay, minimize, report."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qemu_user.fuzz.campaign import Figures
    from qemu_user.fuzz.daemon import Daemon
    from qemu_user.fuzz.sequence import Op

_HELP = """\
Sends random sequences of ioctls, made from the table of the KVM ABI, to a private kvmcore daemon (or to --target), and
looks after each whether anything went wrong: crash, hang, leak, an errno that the ABI does not have, a rule of KVM
broken, a VM beside it disturbed. Each finding is a file that can be replayed.

  softkvm fuzz replay FILE       perform a finding (or any sequence) again; exit status 1 if it shows a fault
  softkvm fuzz minimize FILE     the smallest sequence with the same fault, and a pytest case of it
  softkvm fuzz report DIR        make DIR/report.html again"""


def main(arguments: list[str]) -> int:
    """Exit status: 0 nothing found, 1 findings, 2 wrong command line."""
    if arguments and arguments[0] in ("replay", "minimize", "report"):
        try:
            return {"replay": _replay, "minimize": _minimize, "report": _report}[arguments[0]](arguments[1:])
        except (OSError, ValueError, RuntimeError) as error:
            print(f"softkvm fuzz {arguments[0]}: {error}", file=sys.stderr)
            return 2
    return _fuzz(arguments)


def duration(text: str) -> float:
    """'90', '90s', '10m', '2h' -> seconds."""
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:], 0)
    try:
        seconds = float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: 90s, 10m, 2h")
    return seconds


def _fuzz(arguments: list[str]) -> int:
    from qemu_user.fuzz.campaign import Campaign
    from qemu_user.fuzz.corpus import Corpus
    from qemu_user.fuzz.daemon import Daemon
    from qemu_user.fuzz.live import Live
    from qemu_user.fuzz.report import write

    parser = argparse.ArgumentParser(
        prog="softkvm fuzz", description=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--target", metavar="ENDPOINT", help="ipc:///path of a daemon that runs, or /dev/kvm (default: a private daemon)"
    )
    parser.add_argument(
        "--differential", action="store_true", help="the same generic ioctls on kvmcore and on /dev/kvm; they must agree"
    )
    parser.add_argument("--time", type=duration, default=600.0, metavar="TIME", help="90s, 10m, 2h (default: 10m)")
    parser.add_argument(
        "--coverage", action="store_true", help="watch which of the server's lines run, and build on what is new (slower)"
    )
    parser.add_argument(
        "--devices", nargs="?", const="", metavar="TARGETS",
        help="the virtio devices and formats instead, in this process: all, or those whose names begin so (blk,qcow2,...)",
    )  # fmt: skip
    parser.add_argument("--sequences", type=int, default=0, metavar="N", help="stop after so many")
    parser.add_argument("--seed", type=int, help="same seed, same sequences (default: a random one, which is said)")
    parser.add_argument(
        "--corpus", type=Path, metavar="DIR", help="keep sequences that reach something new; start from those kept"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("fuzz"), metavar="DIR", help="findings, figures, report (default: ./fuzz)"
    )
    parser.add_argument("--no-attacks", action="store_true", help="well-formed requests of one honest client only")
    options = parser.parse_args(arguments)
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 32)
    real = options.differential or (options.target or "").startswith("/")
    print(f"softkvm fuzz: seed {seed}, findings go to {options.output}", file=sys.stderr)
    daemon = None
    left: list[str] = []
    try:
        if options.devices is not None:
            from qemu_user.fuzz import devices

            targets = devices.chosen(options.devices)
            with Live() as live:
                figures = devices.run(seed, options.time, options.output, live.show, options.sequences, targets)
            print(f"{figures.sequences} cases, {figures.findings} findings; {write(options.output)}")
            return 1 if figures.findings else 0
        if real:
            from qemu_user.fuzz.real import run_real

            device = options.target if (options.target or "").startswith("/") else "/dev/kvm"
            with Live() as live:
                figures = run_real(device, seed, options, live.show)
            print(_summary(figures, write(options.output)))
            return 1 if figures.findings else 0
        daemon = None if options.target else Daemon(coverage=options.coverage)
        corpus = Corpus(options.corpus, daemon.covered if daemon else lambda: 0)
        campaign = Campaign(
            options.output, seed, daemon, daemon.endpoint if daemon else options.target,
            attacks=not options.no_attacks, corpus=corpus,
        )  # fmt: skip
        try:
            with Live() as live:
                figures = campaign.run(options.time, live.show, options.sequences)
            if options.corpus and not options.coverage:
                campaign.minimise_corpus()
        except KeyboardInterrupt:
            figures = campaign.figures
        finally:
            campaign.close()
    except (OSError, RuntimeError, ValueError) as error:
        print(f"softkvm fuzz: {error}", file=sys.stderr)
        return 2
    finally:
        if daemon is not None:
            _tell_branches(daemon, options.output)
        left = daemon.close() if daemon is not None else []
    for line in left:
        print(f"softkvm fuzz: after the end, {line}", file=sys.stderr)
    print(_summary(figures, write(options.output)))
    return 1 if figures.findings or left else 0


def _summary(figures: Figures, report: Path) -> str:
    return f"{figures.sequences} sequences, {figures.operations} operations, {figures.findings} findings; {report}"


def _tell_branches(daemon: Daemon, output: Path) -> None:
    """With --coverage: the per cent of branches taken, and in a file which were not."""
    every, taken = daemon.branches()
    if not every:
        return
    missing = sorted(set(every) - set(taken))
    output.mkdir(parents=True, exist_ok=True)
    (output / "branches.txt").write_text("".join(f"{name[1:]}:{line} never to {to}\n" for name, line, to in missing))
    share = 100 * len(taken) / len(every)
    print(f"{len(taken)} of {len(every)} branches ({share:.1f} %), the others in {output / 'branches.txt'}")


def _replay(arguments: list[str]) -> int:
    from qemu_user.fuzz.campaign import perform
    from qemu_user.fuzz.daemon import Daemon
    from qemu_user.fuzz.executor import Executor, Kind
    from qemu_user.fuzz.sequence import load

    parser = argparse.ArgumentParser(prog="softkvm fuzz replay", description="Perform a sequence again.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--target", metavar="ENDPOINT", help="ipc:///path of a daemon that runs (default: a private one)")
    options = parser.parse_args(arguments)
    head, ops = load(options.file)
    for number, op in enumerate(ops):
        print(f"{number:4} {op}")
    if ops and ops[0].do == "device":
        return _replay_device(ops[0])
    daemon = None if options.target else Daemon()
    try:
        endpoint = daemon.endpoint if daemon else options.target
        executor = Executor(endpoint, kinds=(Kind.of(head),))
        finding = perform(executor, ops, None, daemon.complaints if daemon else lambda: "")
        executor.close()
    finally:
        if daemon is not None:
            daemon.close()
    print(f"{finding.oracle} at operation {finding.step}: {finding.text}" if finding else "no finding")
    return 1 if finding else 0


def _replay_device(op: Op) -> int:
    from qemu_user.fuzz.devices import perform_device

    with tempfile.TemporaryDirectory() as scratch:
        finding = perform_device(op, Path(scratch))
    print(f"{finding.oracle}: {finding.text}" if finding else "no finding")
    return 1 if finding else 0


def _minimize(arguments: list[str]) -> int:
    from qemu_user.fuzz.campaign import perform
    from qemu_user.fuzz.daemon import Daemon
    from qemu_user.fuzz.executor import Executor, Kind
    from qemu_user.fuzz.minimize import as_test, minimize, same_fault
    from qemu_user.fuzz.sequence import Finding, load, save

    parser = argparse.ArgumentParser(
        prog="softkvm fuzz minimize", description="Make the smallest sequence with the same fault."
    )
    parser.add_argument("file", type=Path)
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default: FILE with .min before its suffix, and a test_....py beside it"
    )
    options = parser.parse_args(arguments)
    head, ops = load(options.file)
    seen = [Finding(str(head.get("oracle", "")), str(head.get("text", "")))]
    kind = Kind.of(head)

    def shows(candidate: list[Op]) -> bool:
        with Daemon() as daemon:
            executor = Executor(daemon.endpoint, kinds=(kind,))
            finding = perform(executor, candidate, None, daemon.complaints)
            executor.close()
        if finding is None or not same_fault(finding, seen[0]):
            return False
        seen[0] = finding
        print(f"\r{len(candidate)} operations ", end="", file=sys.stderr, flush=True)
        return True

    smallest = minimize(ops, shows)
    print(file=sys.stderr)
    target = options.output or options.file.with_suffix(".min.jsonl")
    save(target, smallest, seen[0], seed=head.get("seed"), sequence=head.get("sequence"), **kind.header)
    name = "".join(c if c.isalnum() else "_" for c in options.file.stem).strip("_").lower()
    test = target.with_name(f"test_{name}.py")
    test.write_text(as_test(smallest, seen[0], name, kind.header))
    print(f"{len(ops)} -> {len(smallest)} operations: {target}, {test}")
    return 0


def _report(arguments: list[str]) -> int:
    from qemu_user.fuzz.report import write

    parser = argparse.ArgumentParser(prog="softkvm fuzz report", description="Make the report of a run again.")
    parser.add_argument("directory", type=Path)
    print(write(parser.parse_args(arguments).directory))
    return 0
