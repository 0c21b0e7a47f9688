"""`softkvm VERB ...`: finds the verb's file and calls its main(arguments) -> exit status.

Adding a verb: a file in this folder with `main`, and a line in VERBS. Must import nothing heavy itself.
"""

from __future__ import annotations

import importlib
import sys

#: Verb -> (module, what it does). The order is that of the help.
VERBS: dict[str, tuple[str, str]] = {
    "run": ("run", "boot an image, a kernel or U-Boot; with -- COMMAND run just that command"),
    "ps": ("ps", "list running VMs"),
    "top": ("top", "watch what VMs do: MIPS, exits, TLB misses, translated code"),
    "console": ("console", "attach the terminal to a VM's console"),
    "attach": ("attach", "give a VM a new device process when its own was killed"),
    "ssh": ("ssh", "log in to a VM, or run a command in it"),
    "cp": ("cp", "copy files between host and VM"),
    "stop": ("stop", "ask a VM to shut down, then end it"),
    "kill": ("kill", "end a VM at once"),
    "pause": ("pause", "stop a VM where it is"),
    "resume": ("resume", "let a paused VM go on"),
    "snapshot": ("snapshot", "keep a VM as it is now, while it runs on"),
    "snapshots": ("snapshots", "list snapshots"),
    "restore": ("restore", "bring a VM back to a snapshot"),
    "delete": ("delete", "remove snapshots"),
    "clone": ("clone", "make VMs like a running one"),
    "template": ("template", "golden VMs, of which others are made"),
    "migrate": ("migrate", "hand a VM over to another host, while it runs"),
    "switch": ("switch", "a virtual switch for VMs, taps, other hosts: run, show, set, capture"),
    "upgrade": ("upgrade", "hand a VM over to new processes of this host"),
    "host": ("host", "take VMs in that others hand over; keys for that"),
    "doctor": ("doctor", "look what this host offers and what is missing"),
    "bench": ("bench", "measure what softkvm promises"),
    "fuzz": ("fuzz", "fuzz the ioctl protocol"),
    "image": ("image", "make, look at, check, convert disk images"),
    "disks": ("disks", "list or delete VMs whose disk is kept"),
    "images": ("images", "list images in the cache"),
    "pull": ("pull", "fetch and build an image"),
}
ALIASES = {"list": "ps"}
WARM = frozenset(("run", "restore", "clone", "template", "snapshot", "migrate", "upgrade", "attach"))
"""Verbs that a warm process does, if there is one (warm/front.py)."""


def usage() -> str:
    """The help of the command itself."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:{width}}  {text}" for verb, (_, text) in VERBS.items())
    what = "Runs real Linux guests where there is no /dev/kvm."
    return f"usage: softkvm VERB ...\n\n{what}\n\n{verbs}\n\nsoftkvm help VERB says more.\n"


def main(arguments: list[str] | None = None) -> int:
    """Run a verb; 2 for a wrong command line."""
    argv = sys.argv[1:] if arguments is None else arguments
    if argv[:1] == ["help"] and len(argv) == 2:
        argv = [argv[1], "--help"]
    if not argv or argv[0] in ("-h", "--help", "help"):
        sys.stdout.write(usage())
        return 0 if argv else 2
    verb = ALIASES.get(argv[0], argv[0])
    if verb not in VERBS:
        sys.stderr.write(f"softkvm: no verb {argv[0]!r}; there are: {', '.join(VERBS)}\n")
        return 2
    if arguments is None and verb in WARM:
        from qemu_user.warm.front import stand_in

        if (status := stand_in(argv, "--" in argv)) is not None:
            return status
    module = importlib.import_module(f"qemu_user.cli.{VERBS[verb][0]}")
    try:
        return int(module.main(argv[1:]))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 141


if __name__ == "__main__":
    sys.exit(main())
