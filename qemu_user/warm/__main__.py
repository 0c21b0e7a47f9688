"""`python -m qemu_user.warm LOCK SECONDS ...`: the warm parent (parent.py), which waits so long before it imports anything."""

import sys
import time

if __name__ == "__main__":
    time.sleep(float(sys.argv[2]))
    from qemu_user.warm.parent import main

    sys.exit(main())
