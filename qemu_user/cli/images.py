"""`softkvm images`: what is in the cache, and what could be pulled."""

from __future__ import annotations

import argparse
import json
import sys
import time


def main(arguments: list[str]) -> int:
    from qemu_user.images.builtin import GUESTS
    from qemu_user.images.store import CATALOGUE, Store

    parser = argparse.ArgumentParser(prog="softkvm images", description="List images.")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    options = parser.parse_args(arguments)
    there = {image.name: image for image in Store().images()}
    rows = []
    for name, recipe in CATALOGUE.items():
        image = there.get(name)
        rows.append(
            {
                "name": name,
                "present": image is not None,
                "bytes": image.size if image else 0,
                "built": image.meta.built if image else None,
                "verified": image.meta.verified if image else None,
                "description": recipe.text,
            }
        )
    if options.format == "json":
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return 0
    for name, (text, _) in GUESTS.items():
        sys.stdout.write(f"{name:12}  {'built in':24}  {text}\n")
    for row in rows:
        state = "not pulled"
        if row["built"] is not None:
            state = f"{row['bytes'] / 1e6:.0f} MB, {time.strftime('%Y-%m-%d', time.localtime(row['built']))}"  # type: ignore[operator,arg-type]
        sys.stdout.write(f"{row['name']:12}  {state:24}  {row['description']}\n")
    return 0
