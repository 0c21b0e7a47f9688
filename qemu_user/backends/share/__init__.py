"""Shared folders: a directory of the host, confined, behind a 9P2000.L server."""
