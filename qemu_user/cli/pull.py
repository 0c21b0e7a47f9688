"""`softkvm pull IMAGE`: fetch and build an image, anew if it is there; boot it once.

What a boot executes is then translated while the host has nothing else to do, so that the user's first boot is no first one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from contextlib import suppress

_SECONDS = 300.0


def main(arguments: list[str]) -> int:
    """0, or 1 with a message."""
    from qemu_user.cli.progress import Bar
    from qemu_user.images.errors import ImageError
    from qemu_user.images.store import CATALOGUE, Store

    parser = argparse.ArgumentParser(prog="softkvm pull", description="Fetch and build an image.")
    parser.add_argument("image", nargs="?", default="busybox", help=f"one of: {', '.join(CATALOGUE)}")
    parser.add_argument("--no-boot", action="store_true", help="do not boot it once, so that its code can be translated")
    options = parser.parse_args(arguments)
    try:
        with Bar() as progress:
            image = Store().ensure(options.image, progress, renew=True)
            if not options.no_boot and not CATALOGUE[options.image].firmware:
                progress("booting it once", 0, 0)
                _boot(options.image)
    except ImageError as error:
        sys.stderr.write(f"softkvm pull: {error}\n")
        return 1
    sys.stdout.write(f"{image.name}: {image.size / 1e6:.0f} MB, {image.meta.verified}\n")
    return 0


def _boot(image: str) -> None:
    """Where that is not possible the image is as good, only its first boot slower."""
    command = [sys.executable, "-P", "-m", "qemu_user.cli.main", "run", "--ephemeral", image, "--", "true"]
    with suppress(subprocess.TimeoutExpired):
        subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=_SECONDS)
