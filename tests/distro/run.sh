#!/usr/bin/env bash
# Run `make test` in another Debian release: in a folder made by debootstrap, entered by chroot. Needs root.
#
#   tests/distro/run.sh SUITE [COMMAND ...]    SUITE: trixie, sid, ...; COMMAND: instead of `make test`
#   ROOT_DIR=DIR                               the folder; default: build/distro/SUITE. It is kept, and used again.
#   MIRROR=URL                                 default: the archive that apt of this machine uses
#
# Prints what the command prints, closes with its line of counts, and exits with its exit code; 3: not started. apt and
# pip in the folder use the proxies, certificates and options of this machine.
set -uo pipefail
cd "$(dirname "$0")/../.."

refuse() {
    echo "test-distro: $1" >&2
    exit 3
}

suite=${1:-}
command=("${@:2}")
[ ${#command[@]} -gt 0 ] || command=(make --no-print-directory CUDA=0 WERROR=1 test)
[[ $suite =~ ^[a-z]+$ ]] || refuse "which release? make test-distro SUITE=trixie"
[ "$(id -u)" = 0 ] || refuse "needs root, to install Debian in a folder and to enter it: sudo make test-distro SUITE=$suite"
command -v debootstrap >/dev/null || refuse "debootstrap is not installed: apt-get install debootstrap"
[ -e "/usr/share/debootstrap/scripts/$suite" ] || refuse "debootstrap does not know a release named $suite"
root=${ROOT_DIR:-build/distro/$suite}
mkdir -p "$root" || exit 3
root=$(realpath "$root")

exec 9>"$root.lock"
flock -n 9 || refuse "$root is in use by another run"

# The archive that apt takes this machine's own release from.
if [ -z "${MIRROR:-}" ]; then
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    MIRROR=$(apt-get update --print-uris 2>/dev/null | sed -n "s|^'\(.*\)/dists/$codename/InRelease'.*|\1|p" | head -n 1)
    [ -n "$MIRROR" ] || refuse "apt's sources name no archive of this machine's release; set MIRROR=URL"
fi

# ---- the installation ----

if [ ! -e "$root/etc/debootstrapped" ]; then
    [ -z "$(ls -A "$root")" ] || refuse "$root is not empty, and not a whole installation: name another folder, or remove what is left of one"
    echo "test-distro: installing $suite in $root"
    debootstrap --variant=minbase --include=ca-certificates,make "$suite" "$root" "$MIRROR" >"$root.log" 2>&1 9>&- || {
        tail -n 5 "$root.log" >&2
        refuse "debootstrap failed: see $root.log; remove $root and begin again"
    }
    touch "$root/etc/debootstrapped"
fi
find "$root/tmp" -mindepth 1 -delete # Open MPI names folders there by process ids, which come again

# Network settings of this machine: names, certificates, apt's proxies and options, pip's files.
copy() { # files or folders, to the same path
    local path
    for path; do
        [ ! -e "$path" ] || { mkdir -p "$root${path%/*}" && cp -rL "$path" "$root${path%/*}/"; }
    done
}
copy /etc/resolv.conf /etc/hosts /usr/local/share/ca-certificates /etc/apt/auth.conf.d /etc/pip.conf /etc/xdg/pip \
    /root/.pip /root/.config/pip ${PIP_FIND_LINKS:-}
apt-config dump | grep -E '^Acquire::(http|https|ForceIP|Retries|Check-|Languages)' >"$root/etc/apt/apt.conf.d/99host"
chroot "$root" update-ca-certificates >/dev/null 2>&1

environment=(HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 "TERM=${TERM:-dumb}")
while IFS= read -r name; do
    environment+=("$name=${!name}")
done < <(compgen -e | grep -iE '^((https?|ftp|all|no)_proxy|PIP_.*|SSL_CERT_(FILE|DIR)|(CURL|REQUESTS)_CA_BUNDLE|FAULTS|SEED|KILLS|CI)$')

# The tree as it is here, committed or not; what was built there before is kept.
tree=$root/iha.c
mkdir -p "$tree"
find "$tree" -mindepth 1 -maxdepth 1 ! -name build ! -name .venv ! -name train_iha ! -name local.mk -exec rm -rf {} +
git ls-files -z --cached --others --exclude-standard --deduplicate |
    while IFS= read -rd '' file; do [ ! -e "$file" ] || printf '%s\0' "$file"; done |
    tar -c --no-recursion --null -T - | tar -x -C "$tree" --no-same-owner || refuse "cannot copy the tree to $tree"

# ---- the command ----

# In namespaces of mounts and processes of its own, whose first process dies with this script: then, however it ends,
# the kernel ends the other processes and unmounts everything.
inside() {
    local root=$1
    shift
    # The root is a mount point, as `ip netns` expects of /.
    mount --bind "$root" "$root" && mount -t proc proc "$root/proc" && mount --rbind /sys "$root/sys" &&
        mount --rbind /dev "$root/dev" || { echo "test-distro: cannot mount in $root" >&2; exit 3; }
    env -i "${@:2:$1}" chroot "$root" env -C /iha.c "${@:$1+2}"
    exit
}
log=$root.log
: >"$log"
setpriv --pdeathsig KILL unshare --mount --pid --fork --kill-child --propagation private \
    bash -c "$(declare -f inside)"'; inside "$@"' inside "$root" "${#environment[@]}" "${environment[@]}" \
    "${command[@]}" </dev/null >"$log" 2>&1 9>&- &
job=$!
trap 'exit 143' INT TERM HUP
trap 'kill -KILL "$job" 2>/dev/null' EXIT
tail -n +1 --follow --pid="$job" "$log" 9>&- &
wait "$job"
code=$?
trap - EXIT
wait # for tail
counts=$(grep -E '^[0-9]+ passed, [0-9]+ failed' "$log" | tail -n 1)
[ -z "$counts" ] || echo "$suite: $counts"
exit "$code"
