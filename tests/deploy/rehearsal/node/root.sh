# The root of a container: made of this machine's /usr and /etc, of the environment as /opt/graft, and of the volumes.
# Then its command, as its user, without capabilities. What this script is to do comes in variables RH_*.
set -euo pipefail
PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount --make-rprivate /
hostname "$RH_NAME"
root=$RH_ROOT
bind() { # bind WHAT WHERE [ro]
    if [ -d "$1" ]; then
        mkdir -p "$root$2"
    else
        mkdir -p "$(dirname "$root$2")"
        [ -e "$root$2" ] || touch "$root$2"
    fi
    mount --bind "$1" "$root$2"
    if [ "${3:-}" = ro ]; then mount -o remount,bind,ro "$root$2"; fi
}
mount -t tmpfs -o mode=755 tmpfs "$root"
for name in bin sbin lib lib64; do
    if [ -L "/$name" ]; then cp -d "/$name" "$root/"; elif [ -d "/$name" ]; then bind "/$name" "/$name" ro; fi
done
bind /usr /usr ro
mount --bind "$RH_FILES/bin" "$root/usr/local/bin"
bind /etc /etc ro
for name in passwd group hosts resolv.conf; do mount --bind "$RH_FILES/$name" "$root/etc/$name"; done
bind "$RH_ENVIRONMENT" /opt/graft ro
bind "$RH_PYTHON" "$RH_PYTHON" ro
for name in convert serve tests; do bind "$RH_SOURCE/$name" "/opt/graft-source/$name" ro; done
mkdir -p "$root"/{proc,dev,sys,tmp,run,var/tmp,root,old} "$root$RH_DIRECTORY"
chmod 1777 "$root/tmp" "$root/var/tmp"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for name in null zero full random urandom tty; do bind "/dev/$name" "/dev/$name"; done
for pair in fd:fd stdin:fd/0 stdout:fd/1 stderr:fd/2; do ln -s "/proc/self/${pair#*:}" "$root/dev/${pair%:*}"; done
mkdir "$root/dev/shm"
mount -t tmpfs -o mode=1777,size=64m tmpfs "$root/dev/shm"
while IFS='|' read -r source target options; do
    [ -n "$source" ] || continue # none
    if [ "$source" = memory ]; then
        mkdir -p "$root$target"
        mount -t tmpfs -o "mode=777,size=$options" tmpfs "$root$target"
    else
        bind "$source" "$target" "$options"
    fi
done <<<"$RH_MOUNTS"
if [ "$RH_READ_ONLY" = yes ]; then mount -o remount,ro "$root"; fi
cd "$root"
pivot_root . old
umount -l /old
cd "$RH_DIRECTORY"
mapfile -d '' variables <"/proc/self/fd/$RH_VARIABLES"
eval "exec $RH_VARIABLES<&-"
eval "echo >&$RH_STARTED; exec $RH_STARTED>&-"
# Should whoever runs this be killed, nothing of it goes on.
exec setpriv --pdeathsig KILL --reuid "$RH_USER" --regid "$RH_GROUP" --groups "$RH_GROUPS" --no-new-privs --inh-caps=-all \
    --ambient-caps=-all --bounding-set=-all -- env --ignore-environment "${variables[@]}" "$@"
