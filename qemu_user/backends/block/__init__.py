"""Disk images. One file per format."""
