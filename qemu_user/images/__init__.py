"""Bootable guests: fetched from Debian's archive, checked, built without root, kept in the user's cache."""
