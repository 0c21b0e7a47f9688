#!/bin/sh
# Runs once, as root of the new system inside the VM that builds it: packages that are unpacked become installed ones.
set -e
export PATH=/usr/sbin:/usr/bin LC_ALL=C.UTF-8 HOME=/root
export DEBIAN_FRONTEND=noninteractive DEBCONF_NONINTERACTIVE_SEEN=true
umask 022
log=/run/second-stage.log
failed() { grep -B 8 -m 3 "error processing" $log || tail -n 20 $log; exit 1; }

echo "phase configuring packages"
ldconfig
[ -e /usr/bin/awk ] || ln -s mawk /usr/bin/awk
# No service starts here.
printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
chmod 755 /usr/sbin/policy-rc.d
for script in /var/lib/dpkg/info/*.preinst; do
    package=${script##*/}
    package=${package%.preinst}
    DPKG_MAINTSCRIPT_PACKAGE=${package%:*} DPKG_MAINTSCRIPT_NAME=preinst DPKG_MAINTSCRIPT_ARCH=riscv64 \
        DPKG_MAINTSCRIPT_PACKAGE_REFCOUNT=1 "$script" install >>$log 2>&1 </dev/null || { echo "$script failed"; failed; }
done
# Status lines of dpkg(1): "status: package: state". The host counts those that are installed.
dpkg --force-depends --status-fd 3 --configure base-passwd base-files 3>&1 >>$log 2>&1 </dev/null || failed
dpkg --status-fd 3 --configure -a 3>&1 >>$log 2>&1 </dev/null || failed
dpkg --audit >>$log
[ -z "$(dpkg --audit)" ] || failed

echo "phase setting up the system"
rm -f /usr/sbin/policy-rc.d
for version in /usr/lib/modules/*; do depmod "${version##*/}"; done
systemctl set-default multi-user.target >>$log 2>&1
systemctl enable systemd-networkd.service >>$log 2>&1
systemctl disable e2scrub_reap.service e2scrub_all.timer >>$log 2>&1
# No screen, no EFI variables in such a VM: what only looks for them need not run at each boot.
systemctl mask modprobe@drm.service modprobe@efi_pstore.service getty@tty1.service >>$log 2>&1
# What makes a VM that VM is made at its first boot (root.sh).
mkdir -p /var/lib/softkvm
: >/var/lib/softkvm/first-boot
rm -f /etc/ssh/ssh_host_* /var/lib/dbus/machine-id /var/lib/systemd/random-seed
: >/etc/machine-id
echo debian >/etc/hostname
printf '127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n' >/etc/hosts
rm -rf /var/cache/debconf/*-old /var/lib/dpkg/*-old /var/cache/ldconfig/* /var/log/*.log /var/log/apt/* /tmp/*
# The caches that a changed /usr calls for are fresh (systemd-update-done.service(8)): the first boot need not make them.
/usr/lib/systemd/systemd-update-done
