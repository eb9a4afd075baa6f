qemu-system-x86_64 -enable-kvm -M q35 -m 6144 -smp 4 -cpu host,hv_relaxed,hv_spinlocks=0x1fff,hv_vapic,hv_time \
  -bios /usr/share/ovmf/OVMF.fd -drive file=/srv/win.vhdx -nic tap,model=virtio-net-pci,script=/etc/qemu-ifup \
  -rtc base=localtime -vnc 127.0.0.1:3 -snapshot -usbdevice tablet -hdb second.qcow2 -hdd 'fat:rw:share'
