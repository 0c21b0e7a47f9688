"""`softkvm image VERB`: disk images, without qemu-img. The verbs and options that matter are named as qemu-img's."""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import closing
from dataclasses import asdict
from typing import Any


def main(arguments: list[str]) -> int:
    """0; 1 when it cannot be done; `check`: 2 for damage, 3 for lost clusters only."""
    from qemu_user.backends.errors import BackendError
    from qemu_user.cli.vm import fail
    from qemu_user.config.errors import ConfigError

    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options) or 0)
    except (BackendError, ConfigError) as error:
        return fail("image", error)
    except OSError as error:
        return fail("image", OSError(f"{options.file}: {error.strerror}"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="softkvm image", description="Make, look at, check, convert disk images.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=help, description=help)
        made.set_defaults(run=run)
        return made

    formats: dict[str, Any] = {"choices": ("raw", "qcow2"), "default": ""}
    create = verb("create", _create, "make an empty image, or an overlay over another (-b)")
    create.add_argument("-f", "--format", choices=("raw", "qcow2"), default="qcow2")
    create.add_argument("-b", "--backing", default="", help="the image beneath, which must not change any more")
    create.add_argument("-F", "--backing-format", **formats)
    create.add_argument("--cluster-size", default="64K")
    create.add_argument("file")
    create.add_argument("size", nargs="?", default="", help="such as 10G; not needed with -b")
    info = verb("info", _info, "tell format, size, backing files")
    check = verb("check", _check, "look for damage and lost clusters in a qcow2 image")
    for made in (info, check):
        made.add_argument("--json", action="store_true")
    info.add_argument("-f", "--format", **formats)
    resize = verb("resize", _resize, "give a disk another size")
    resize.add_argument("-f", "--format", **formats)
    resize.add_argument("--shrink", action="store_true", help="what is cut off is lost")
    commit = verb("commit", _commit, "write what an overlay has into the image beneath")
    rebase = verb("rebase", _rebase, "put an overlay over another image, without changing what it shows")
    rebase.add_argument("-b", "--backing", required=True, help='the new image beneath; "": none')
    rebase.add_argument("-F", "--backing-format", **formats)
    rebase.add_argument("-u", "--unsafe", action="store_true", help="only change the name")
    convert = verb("convert", _convert, "copy into a new image, without backing file")
    convert.add_argument("-f", "--format", **formats)
    convert.add_argument("-O", "--output-format", choices=("raw", "qcow2"), default="qcow2")
    for made in (info, check, resize, commit, rebase, convert):
        made.add_argument("file")
    resize.add_argument("size", help="such as 20G, or +5G")
    convert.add_argument("output")
    return parser


def _create(options: argparse.Namespace) -> None:
    from qemu_user.backends.block.copying import make
    from qemu_user.backends.block.opening import create_overlay
    from qemu_user.backends.errors import BackendError
    from qemu_user.config.keyvals import parse_size

    size = parse_size("size", options.size, "B") if options.size else None
    cluster = parse_size("--cluster-size", options.cluster_size, "B")
    if options.backing:
        if options.format != "qcow2":
            raise BackendError("only qcow2 images have backing files")
        base = options.backing
        if not os.path.isabs(base):  # as it is seen from the new image
            base = os.path.join(os.path.dirname(os.path.abspath(options.file)), base)
        create_overlay(base, options.file, size, options.backing_format, stored=options.backing)
    elif size is None:
        raise BackendError("a size is needed, such as 10G")
    elif cluster & cluster - 1:
        raise BackendError("--cluster-size: a power of two")
    else:
        make(options.file, -(-size // 512) * 512, options.format, cluster.bit_length() - 1)


def _info(options: argparse.Namespace) -> None:
    from qemu_user.backends.block.opening import describe, shown

    chain = describe(options.file, options.format)
    if options.json:
        sys.stdout.write(json.dumps(chain) + "\n")
        return
    for index, layer in enumerate(chain):
        indent = "  " * index
        for name, value in layer.items():
            if name in ("size", "stored"):
                value = f"{value / (1 << 30):.3g} GiB ({value} bytes)"
            sys.stdout.write(f"{indent}{name.replace('_', ' ')}: {shown(str(value))}\n")


def _check(options: argparse.Namespace) -> int:
    from qemu_user.backends.block.qcow2.check import check
    from qemu_user.backends.block.qcow2.image import read_header
    from qemu_user.backends.block.raw import RawImage

    with closing(RawImage(options.file, readonly=True)) as image:
        assert image.descriptor is not None
        found = check(image.descriptor, read_header(image))
    if options.json:
        sys.stdout.write(json.dumps(asdict(found)) + "\n")
    else:
        for message in found.messages:
            sys.stderr.write(f"softkvm image: {message}\n")
        sys.stdout.write(
            f"{options.file}: {found.corruptions} errors, {found.leaks} lost clusters; {found.allocated} of {found.clusters} "
            f"clusters in use, {found.compressed} of them compressed\n"
        )
    return 2 if found.corruptions else 3 if found.leaks else 0


def _resize(options: argparse.Namespace) -> None:
    from qemu_user.backends.block.opening import open_disk
    from qemu_user.backends.errors import BackendError
    from qemu_user.config.keyvals import parse_size

    with closing(open_disk(options.file, options.format)) as disk:
        size = parse_size("size", options.size.removeprefix("+"), "B") + (disk.size if options.size[0] == "+" else 0)
        if size < disk.size and not options.shrink:
            raise BackendError(f"{options.file} has {disk.size} bytes; what is cut off is lost: say --shrink if that is wanted")
        if not 0 < size < 1 << 62:
            raise BackendError(f"a size of {size} bytes cannot be had")
        disk.resize(-(-size // 512) * 512)
        disk.flush()


def _commit(options: argparse.Namespace) -> None:
    from qemu_user.backends.block.copying import commit
    from qemu_user.cli.progress import Bar

    with Bar() as progress:
        base = commit(options.file, progress)
    sys.stderr.write(f"softkvm image: {base} has everything that {options.file} had\n")


def _rebase(options: argparse.Namespace) -> None:
    from qemu_user.backends.block.copying import rebase
    from qemu_user.cli.progress import Bar

    with Bar() as progress:
        rebase(options.file, options.backing, options.backing_format, progress, options.unsafe)


def _convert(options: argparse.Namespace) -> None:
    from qemu_user.backends.block.copying import convert
    from qemu_user.cli.progress import Bar

    with Bar() as progress:
        convert(options.file, options.format, options.output, options.output_format, progress)
