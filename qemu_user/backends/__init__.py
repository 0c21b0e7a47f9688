"""The host side of devices: disks, networks, terminals. A back end never imports a device."""
