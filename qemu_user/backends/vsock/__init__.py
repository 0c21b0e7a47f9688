"""The host's side of virtio-vsock: Unix sockets."""
