#!/bin/sh

cd $HOME/machines

sudo modprobe kvm
sudo modprobe kvm-intel

# the first time
kvm -m 512 -hda snape-freebsd.qemu-cow \
    -cdrom $HOME/tmp/7.0-RELEASE-i386-bootonly.iso -boot d -serial file:tmp/snape.log -net nic -net tap
