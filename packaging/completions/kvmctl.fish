# fish completion for kvmctl(1)

function __kvmctl_guests
    for file in /etc/kvmd/*.toml
        string replace -r '.*/(.*)\.toml$' '$1' $file
    end
end

function __kvmctl_images
    __fish_complete_path (commandline -ct)
    for file in /var/lib/kvmd/images/*
        string replace -r '.*/' '' $file
    end
end

complete -c kvmctl -f
complete -c kvmctl -s h -l help -d 'show this help message and exit'
complete -c kvmctl -l version -d 'show program\'s version number and exit'
complete -c kvmctl -l json -d 'for programs'
complete -c kvmctl -s H -l host -r -d 'on another host, by ssh'
complete -c kvmctl -n __fish_use_subcommand -a list -d 'List guests, those that are off, too'
complete -c kvmctl -n __fish_use_subcommand -a status -d 'Show guests with their last serial lines'
complete -c kvmctl -n __fish_use_subcommand -a top -d 'Show what running guests use, again and again'
complete -c kvmctl -n __fish_use_subcommand -a start -d 'Start guests, and wait until they are ready'
complete -c kvmctl -n __fish_use_subcommand -a stop -d 'Shut guests down'
complete -c kvmctl -n __fish_use_subcommand -a restart -d 'Shut guests down and start them again'
complete -c kvmctl -n __fish_use_subcommand -a reset -d 'Press the reset button'
complete -c kvmctl -n __fish_use_subcommand -a pause -d 'Freeze guests'
complete -c kvmctl -n __fish_use_subcommand -a resume -d 'Let frozen guests go on, and wake sleeping ones'
complete -c kvmctl -n __fish_use_subcommand -a console -d 'Attach to a guest\'s serial console'
complete -c kvmctl -n __fish_use_subcommand -a log -d 'Show what a guest has printed'
complete -c kvmctl -n __fish_use_subcommand -a install -d 'Install a system from a CD image onto a new guest, or one that there is'
complete -c kvmctl -n __fish_use_subcommand -a media -d 'Show what is in a guest\'s CD drives, put something in, or take it out'
complete -c kvmctl -n __fish_use_subcommand -a screenshot -d 'Save a picture of a guest\'s screen'
complete -c kvmctl -n __fish_use_subcommand -a view -d 'Show a guest\'s screen in a viewer that is installed'
complete -c kvmctl -n __fish_use_subcommand -a new -d 'Write the file of a new guest'
complete -c kvmctl -n __fish_use_subcommand -a edit -d 'Edit a guest\'s file, and check it before it counts'
complete -c kvmctl -n __fish_use_subcommand -a import -d 'Write a guest file from what another tool has'
complete -c kvmctl -n __fish_use_subcommand -a check -d 'Check guest files'
complete -c kvmctl -n __fish_use_subcommand -a doctor -d 'Say what this host has for guests, and what it lacks'
complete -c kvmctl -n '__fish_seen_subcommand_from list status top start stop restart reset pause resume console log media screenshot view edit' -a '(__kvmctl_guests)'
complete -c kvmctl -n '__fish_seen_subcommand_from check import screenshot' -F
complete -c kvmctl -n '__fish_seen_subcommand_from media' -a 'cdrom0 cdrom1 (__kvmctl_images)'
complete -c kvmctl -n '__fish_seen_subcommand_from list' -s w -l watch -d 'go on as they change'
complete -c kvmctl -n '__fish_seen_subcommand_from list' -l no-legend -d 'without the names of columns'
complete -c kvmctl -n '__fish_seen_subcommand_from status' -s n -l lines -r -d 'how many of these (default 5)'
complete -c kvmctl -n '__fish_seen_subcommand_from top' -s d -l delay -r -d 'from look to look (default 2)'
complete -c kvmctl -n '__fish_seen_subcommand_from top' -l once -d 'look once only'
complete -c kvmctl -n '__fish_seen_subcommand_from start' -l no-wait -d 'return once it is under way'
complete -c kvmctl -n '__fish_seen_subcommand_from start' -l timeout -r -d 'how long to wait'
complete -c kvmctl -n '__fish_seen_subcommand_from start' -l boot -r -a 'disk cdrom network' -d 'boot from it, this once'
complete -c kvmctl -n '__fish_seen_subcommand_from start' -l cdrom -r -a '(__kvmctl_images)' -d 'with this in the CD drive, this once'
complete -c kvmctl -n '__fish_seen_subcommand_from start' -l console -d 'attach to the console of the one guest'
complete -c kvmctl -n '__fish_seen_subcommand_from stop' -l no-wait -d 'return once it is under way'
complete -c kvmctl -n '__fish_seen_subcommand_from stop' -l timeout -r -d 'how long to wait'
complete -c kvmctl -n '__fish_seen_subcommand_from stop' -l now -d 'cut the power'
complete -c kvmctl -n '__fish_seen_subcommand_from restart' -l no-wait -d 'return once it is under way'
complete -c kvmctl -n '__fish_seen_subcommand_from restart' -l timeout -r -d 'how long to wait'
complete -c kvmctl -n '__fish_seen_subcommand_from console' -l escape -r -d 'leave by this control character instead of ^]'
complete -c kvmctl -n '__fish_seen_subcommand_from console' -l resize -d 'tell the guest\'s shell the size of this terminal'
complete -c kvmctl -n '__fish_seen_subcommand_from console' -l lines -r -d 'of the log to show first (default 20)'
complete -c kvmctl -n '__fish_seen_subcommand_from log' -s f -l follow -d 'go on as it prints'
complete -c kvmctl -n '__fish_seen_subcommand_from log' -s n -l lines -r -d 'only the last ones'
complete -c kvmctl -n '__fish_seen_subcommand_from log' -s b -l boot -d 'only since its last start'
complete -c kvmctl -n '__fish_seen_subcommand_from install' -l cdrom -r -a '(__kvmctl_images)' -d 'the installer'
complete -c kvmctl -n '__fish_seen_subcommand_from install' -l size -r -d 'of a new disk (default 20G)'
complete -c kvmctl -n '__fish_seen_subcommand_from install' -l no-console -d 'do not attach to the console'
complete -c kvmctl -n '__fish_seen_subcommand_from install' -l memory -r -d 'default 1G, for Windows 4G'
complete -c kvmctl -n '__fish_seen_subcommand_from install' -l cpus -r -d 'default 1'
complete -c kvmctl -n '__fish_seen_subcommand_from install' -l profile -r -a 'linux bsd windows legacy' -d 'kind of system'
complete -c kvmctl -n '__fish_seen_subcommand_from install' -l firmware -r -a 'bios uefi' -d 'default bios'
complete -c kvmctl -n '__fish_seen_subcommand_from install' -l address -r -d 'of the LAN'
complete -c kvmctl -n '__fish_seen_subcommand_from install' -l configure -d 'tell the guest its addresses by DHCP'
complete -c kvmctl -n '__fish_seen_subcommand_from media' -l eject -d 'take out what is in it'
complete -c kvmctl -n '__fish_seen_subcommand_from media' -l force -d 'with --eject: also where the guest has locked the drive'
complete -c kvmctl -n '__fish_seen_subcommand_from view' -l viewer -r -d 'by this one: remote-viewer, vncviewer, gvncviewer …'
complete -c kvmctl -n '__fish_seen_subcommand_from new' -l size -r -d 'of its disk, made at the first start (default 20G)'
complete -c kvmctl -n '__fish_seen_subcommand_from new' -l disk -r -a '(__kvmctl_images)' -d 'an image that there is, instead'
complete -c kvmctl -n '__fish_seen_subcommand_from new' -l base -r -a '(__kvmctl_images)' -d 'a ready-made image that its disk is laid over'
complete -c kvmctl -n '__fish_seen_subcommand_from new' -l cdrom -r -a '(__kvmctl_images)' -d 'an image for its CD drive'
complete -c kvmctl -n '__fish_seen_subcommand_from new' -l memory -r -d 'default 1G, for Windows 4G'
complete -c kvmctl -n '__fish_seen_subcommand_from new' -l cpus -r -d 'default 1'
complete -c kvmctl -n '__fish_seen_subcommand_from new' -l profile -r -a 'linux bsd windows legacy' -d 'kind of system'
complete -c kvmctl -n '__fish_seen_subcommand_from new' -l firmware -r -a 'bios uefi' -d 'default bios'
complete -c kvmctl -n '__fish_seen_subcommand_from new' -l address -r -d 'of the LAN'
complete -c kvmctl -n '__fish_seen_subcommand_from new' -l configure -d 'tell the guest its addresses by DHCP'
complete -c kvmctl -n '__fish_seen_subcommand_from import' -l command -d 'FILE holds a kvm or qemu-system command line'
complete -c kvmctl -n '__fish_seen_subcommand_from import' -l name -r -d 'of the guest (default: as it was called)'
complete -c kvmctl -n '__fish_seen_subcommand_from import' -l print -d 'show the file instead of writing it'
