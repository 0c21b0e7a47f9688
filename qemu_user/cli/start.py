"""What scripts/softkvm starts, by its path and with -S: without the interpreter's site (two thirds of the time that it takes to
start), which a command that a warm process carries out (warm/front.py) has no use for. Others get it here.
"""

import os
import sys


def main(arguments: list[str]) -> int:
    """Run a verb; its exit status."""
    from qemu_user.cli.main import WARM

    if arguments and arguments[0] in WARM:
        from qemu_user.warm.front import stand_in

        if (status := stand_in(arguments, "--" in arguments)) is not None:
            return status
    import site

    site.main()
    from qemu_user.cli import main as softkvm

    return softkvm.main(arguments)


if __name__ == "__main__":
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    sys.exit(main(sys.argv[1:]))
