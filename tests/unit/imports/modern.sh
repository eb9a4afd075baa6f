NAME=build
OPTS="-nodefaults -no-user-config"
IMAGES=/srv/vm
exec qemu-system-x86_64 $OPTS -name guest=$NAME,debug-threads=on \
  -machine pc-q35-8.2,accel=kvm,smm=on,kernel_irqchip=on -cpu host -m size=4G,slots=2,maxmem=8G \
  -smp sockets=1,cores=2,threads=2 -uuid 6bd0b6a4-35ad-4a5e-8f71-47b5d0a7ce21 \
  -drive if=pflash,format=raw,unit=0,readonly=on,file=/usr/share/OVMF/OVMF_CODE_4M.secboot.fd \
  -drive if=pflash,format=raw,unit=1,file=${IMAGES}/vars.fd \
  -blockdev driver=file,node-name=f0,filename=${IMAGES}/root.qcow2 -blockdev driver=qcow2,node-name=d0,file=f0 \
  -device virtio-blk-pci,drive=d0,bootindex=1 \
  -blockdev '{"driver":"raw","node-name":"d1","read-only":true,"file":{"driver":"file","filename":"/srv/vm/data.raw"}}' \
  -device virtio-scsi-pci,id=scsi0 -device scsi-hd,drive=d1,bus=scsi0.0 \
  -drive file=relative.img,if=none,id=nv,format=raw,cache=none -device nvme,drive=nv,serial=abc \
  -drive file=nbd://192.0.2.9/export,if=virtio \
  -drive media=cdrom,if=ide,file=/srv/iso/debian,,12.iso,readonly=on \
  -netdev user,id=n0,hostfwd=tcp::2222-:22 -device virtio-net-pci,netdev=n0,mac=52:54:00:01:02:03 \
  -netdev bridge,id=n1,br=br0 -device e1000e,netdev=n1 \
  -chardev socket,id=ga,path=/run/ga.sock,server=on,wait=off -device virtio-serial \
  -device virtserialport,chardev=ga,name=org.qemu.guest_agent.0 \
  -chardev socket,id=tpm,path=/run/swtpm.sock -tpmdev emulator,id=tpm0,chardev=tpm -device tpm-crb,tpmdev=tpm0 \
  -object rng-random,id=rng0,filename=/dev/urandom -device virtio-rng-pci,rng=rng0 \
  -device qemu-xhci -device usb-tablet -device usb-host,vendorid=0x0529,productid=0x0001 -device vfio-pci,host=06:00.0 \
  -virtfs local,path=/srv/share,mount_tag=share,security_model=none -vnc :7 -monitor unix:/run/mon,server,nowait \
  -smbios type=1,serial=ds=nocloud -rtc base=utc -boot order=nc,once=d -global kvm-pit.lost_tick_policy=discard -k de
