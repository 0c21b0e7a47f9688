"""`python -m qemu_user.warm LOCK DAEMON SECONDS ...`: the warm parent (parent.py), which waits so long before it imports
anything. LOCK: a descriptor that keeps others from being made; DAEMON: a pidfd of the daemon, with which it ends.
"""

import select
import sys

if __name__ == "__main__":
    lock, daemon = int(sys.argv[1]), int(sys.argv[2])
    if not select.select([daemon], [], [], float(sys.argv[3]))[0]:
        from qemu_user.warm.parent import main

        sys.exit(main(lock, daemon))
