"""Where Ethernet frames go. One file per kind of -netdev."""
