"""`softkvm pull IMAGE`: fetch and build an image, anew if it is there."""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str]) -> int:
    """0, or 1 with a message."""
    from qemu_user.cli.progress import Bar
    from qemu_user.images.errors import ImageError
    from qemu_user.images.store import CATALOGUE, Store

    parser = argparse.ArgumentParser(prog="softkvm pull", description="Fetch and build an image.")
    parser.add_argument("image", nargs="?", default="busybox", help=f"one of: {', '.join(CATALOGUE)}")
    options = parser.parse_args(arguments)
    try:
        with Bar() as progress:
            image = Store().ensure(options.image, progress, renew=True)
    except ImageError as error:
        sys.stderr.write(f"softkvm pull: {error}\n")
        return 1
    sys.stdout.write(f"{image.name}: {image.size / 1e6:.0f} MB, {image.meta.verified}\n")
    return 0
