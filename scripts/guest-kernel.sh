#!/bin/sh
# Fetches what the guests of tests/guests boot: Debian's kernel for virtual machines, a static busybox, and the functions that
# hooks of initramfs-tools call. They are taken out of their packages, not installed. Leaves DIRECTORY/vmlinuz, DIRECTORY/modules,
# DIRECTORY/busybox and DIRECTORY/hook-functions.
#
# Usage: scripts/guest-kernel.sh DIRECTORY
#
# Exit codes: 0 ready, or there already; 1 they cannot be had; 2 wrong usage.
set -eu
[ $# -eq 1 ] || {
    echo "usage: scripts/guest-kernel.sh DIRECTORY" >&2
    exit 2
}
target=$1
[ ! -e "$target/ready" ] || exit 0

rm -rf -- "$target"
mkdir -p -- "$target/packages"
cd -- "$target"
# The package that is always the newest depends on the one with the kernel.
kernel=$(apt-cache depends --important linux-image-cloud-amd64 2>/dev/null |
    sed -n 's/^ *Depends: \(linux-image-[0-9].*\)$/\1/p' | head -n 1)
[ "$kernel" ] || {
    echo "no package linux-image-cloud-amd64 is known here" >&2
    exit 1
}
(cd packages && apt-get download -q "$kernel" busybox-static initramfs-tools-core >&2)
for package in packages/*.deb; do
    dpkg-deb --extract "$package" content
done
mv content/boot/vmlinuz-* vmlinuz
modules=$(find content -type d -path '*/lib/modules/*/kernel' -prune) # Debian 13 has it below /usr
mv -- "$modules" modules
find content -type f -path '*bin/busybox' -exec mv -- {} busybox \;
mv content/usr/share/initramfs-tools/hook-functions hook-functions
rm -rf -- packages content
test -x busybox
touch ready
