"""What a VM of our images boots with that is always this version's, whichever has built the image: kernel options, /init."""

from __future__ import annotations

from importlib.resources import files

from qemu_user.images import cpio

#: A panic resets the machine at once, which ends the VM (machine.py): it does not hang for ever.
KERNEL_OPTIONS = "console=hvc0 quiet random.trust_bootloader=on panic=-1"
SYSTEMD_OPTIONS = (
    "systemd.show_status=true systemd.ssh_auto=no systemd.ssh_listen=vsock::22 "
    # On a busy host the console may take longer to appear than 90 s, and would stay without a login then.
    "systemd.default_device_timeout_sec=600"
)


def add_scripts(initrd: cpio.Archive) -> None:
    """/init and what it uses. Added again at every start."""
    folder = files("qemu_user.images")
    initrd.file("init", folder.joinpath("init.sh").read_bytes(), 0o755)
    initrd.file("root.sh", folder.joinpath("root.sh").read_bytes())
    initrd.file("etc/udhcpc.script", folder.joinpath("udhcpc.sh").read_bytes(), 0o755)
