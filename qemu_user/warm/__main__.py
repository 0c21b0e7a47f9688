"""`python -m qemu_user.warm LOCK ...`: the warm parent (parent.py). It waits a moment before it imports anything: whoever had
it started needs the cores more.
"""

import sys
import time

_CALM_SECONDS = 2.0

if __name__ == "__main__":
    time.sleep(_CALM_SECONDS)
    from qemu_user.warm.parent import main

    sys.exit(main())
