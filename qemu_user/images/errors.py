"""What can go wrong with images; the messages are for people."""

from __future__ import annotations


class ImageError(Exception):
    """An image cannot be had. Nothing half-made is left behind."""
