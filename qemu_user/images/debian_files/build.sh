# Runs in the VM that builds the image `debian`: /dev/vda becomes the root file system, /dev/vdb is the tar to put there.
set -e
echo "phase making the file system"
mkdir -p /tools/dev
mount --bind /dev /tools/dev
# The disk is a fresh sparse file: it reads as zeroes already.
chroot /tools /usr/sbin/mke2fs -q -t ext4 -L softkvm-root -O ^metadata_csum_seed -E assume_storage_prezeroed=1 /dev/vda
mkdir -p /target
mount -t ext4 -o noatime,noinit_itable,nobarrier,commit=600 /dev/vda /target
echo "phase unpacking packages"
tar -x -f /dev/vdb -C /target
mount -t proc proc /target/proc
mount -t sysfs sys /target/sys
mount --bind /dev /target/dev
mount -t tmpfs run /target/run
chroot /target /bin/sh /second-stage
rm /target/second-stage
umount /target/run /target/dev /target/sys /target/proc
echo "phase finishing"
fstrim /target
umount /target
sync
