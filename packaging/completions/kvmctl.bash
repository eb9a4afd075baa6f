# bash completion for kvmctl(1)

_kvmctl() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]} verb='' word
    local verbs='list status top start stop restart reset pause resume console log install media screenshot view new edit
        import check doctor'
    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
        case $word in
        -*) ;;
        *) case " $verbs " in *[[:space:]]"$word"[[:space:]]*) verb=$word && break ;; esac ;;
        esac
    done
    local options='--json --host --help'
    case $verb in
    '') options+=' --version' ;;
    list) options+=' --watch --no-legend' ;;
    status) options+=' --lines' ;;
    top) options+=' --delay --once' ;;
    start) options+=' --no-wait --timeout --boot --cdrom --console' ;;
    stop) options+=' --no-wait --timeout --now' ;;
    restart) options+=' --no-wait --timeout' ;;
    console) options+=' --escape --resize --lines' ;;
    log) options+=' --follow --lines --boot' ;;
    install) options+=' --cdrom --size --no-console --memory --cpus --profile --firmware --address --configure' ;;
    media) options+=' --eject --force' ;;
    view) options+=' --viewer' ;;
    new) options+=' --size --disk --base --cdrom --memory --cpus --profile --firmware --address --configure' ;;
    import) options+=' --command --name --print' ;;
    esac
    local IFS=$' \t\n'
    case $prev in
    --cdrom | --disk | --base)
        mapfile -t COMPREPLY < <(compgen -f -- "$cur"; cd /var/lib/kvmd/images 2>/dev/null && compgen -f -- "$cur")
        return ;;
    --profile) mapfile -t COMPREPLY < <(compgen -W 'linux bsd windows legacy' -- "$cur") && return ;;
    --firmware) mapfile -t COMPREPLY < <(compgen -W 'bios uefi' -- "$cur") && return ;;
    --boot) mapfile -t COMPREPLY < <(compgen -W 'disk cdrom network' -- "$cur") && return ;;
    --viewer) mapfile -t COMPREPLY < <(compgen -c -- "$cur") && return ;;
    -H | --host) mapfile -t COMPREPLY < <(compgen -A hostname -- "$cur") && return ;;
    esac
    case $cur in -*) mapfile -t COMPREPLY < <(compgen -W "$options" -- "$cur") && return ;; esac
    case $verb in
    '') mapfile -t COMPREPLY < <(compgen -W "$verbs" -- "$cur") ;;
    check | import) mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
    install | new | doctor) ;;
    *)
        local names='' file
        for file in /etc/kvmd/*.toml; do
            [ -e "$file" ] && file=${file##*/} && names+=" ${file%.toml}"
        done
        mapfile -t COMPREPLY < <(compgen -W "$names" -- "$cur")
        ;;
    esac
}
complete -F _kvmctl kvmctl
