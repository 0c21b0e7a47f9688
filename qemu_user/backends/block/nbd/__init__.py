"""Disks that an NBD server has (https://github.com/NetworkBlockDevice/nbd, doc/proto.md): the client's side."""
