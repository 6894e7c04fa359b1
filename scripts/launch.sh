#!/usr/bin/env bash
# Train (or evaluate) on several ranks with mpirun: on this machine, or on several over ssh. `--help` explains.
#
# mpirun passes on SIGUSR1 in time, but on SIGINT or SIGTERM it kills the ranks within a second. So it runs in
# a session of its own, where Ctrl-C does not reach it, and this script turns the first signal it gets into one
# SIGUSR1: the ranks finish their step, save and end, and their exit code becomes ours.
set -uo pipefail

usage() {
    cat <<'END'
scripts/launch.sh [-n RANKS] [--hosts HOST[:RANKS],... | --hostfile FILE] train CONFIG [section.key=value ...]

  -n RANKS         how many processes; default: one per GPU here, without GPUs one per NUMA node, or as many as
                   the hosts take
  --hosts LIST     machines reached by ssh without a password; HOST:4 takes 4 ranks, HOST its share of -n, or 1
  --hostfile FILE  the same, a machine a line, as mpirun reads it: HOST slots=4

  scripts/launch.sh -n 2 train configs/quickstart.ini
  scripts/launch.sh --hosts node1:2,node2:2 train configs/gpt2_124m.ini run.dir=/shared/runs/gpt2

With GPUs each rank takes one, and NCCL carries what they say; NCCL_DEBUG=INFO shows over which way,
NCCL_SOCKET_IFNAME=eth1 and NCCL_IB_HCA=mlx5 choose it (variables that begin with NCCL_ reach all hosts).

All hosts need this program, the data and run.dir under the same paths. `eval` works the same way.
Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP: finish the step, save, exit 0; the same command continues. A second one
ends at once. Settings of MPI itself come from the environment: OMPI_MCA_btl_tcp_if_include=eth1 and
OMPI_MCA_oob_tcp_if_include=eth1 name the network. TRAIN_IHA names another binary, MPIRUN another mpirun.
END
}

refuse() {
    echo "launch: $1" >&2
    exit 2
}

ranks='' hosts='' hostfile=''
while [ $# -gt 0 ]; do
    case $1 in
    --help | -h)
        usage
        exit 0
        ;;
    -n | --hosts | --hostfile)
        [ $# -ge 2 ] || refuse "$1 needs a value; see scripts/launch.sh --help"
        case $1 in
        -n) ranks=$2 ;;
        --hosts) hosts=$2 ;;
        --hostfile) hostfile=$2 ;;
        esac
        shift 2
        ;;
    -*) refuse "unknown option $1; see scripts/launch.sh --help" ;;
    *) break ;;
    esac
done

case ${1:-} in
train | eval) ;;
'') refuse "no command given; try: scripts/launch.sh -n 2 train configs/quickstart.ini" ;;
*) refuse "'$1' does not run on several ranks; train and eval do" ;;
esac
[ -z "$ranks" ] || [[ $ranks =~ ^[1-9][0-9]{0,5}$ ]] || refuse "-n $ranks: not a number of ranks"
[ -z "$hosts" ] || [ -z "$hostfile" ] || refuse "--hosts and --hostfile exclude each other; give one"
[ -z "$hostfile" ] || [ -r "$hostfile" ] || refuse "--hostfile $hostfile: cannot read it"

mpirun=${MPIRUN:-mpirun}
command -v "$mpirun" >/dev/null ||
    refuse "$mpirun is not installed; run make deps and build again, or load your cluster's Open MPI"
binary=${TRAIN_IHA:-$(dirname "$(readlink -f "$0")")/../train_iha}
binary=$(realpath -m -- "$binary")
[ -x "$binary" ] || refuse "$binary is not there; run make"

# Each machine's ranks divide its processors themselves.
options=(--bind-to none)
if [ -n "$hosts" ]; then
    IFS=, read -ra list <<<"$hosts"
    if [ -n "$ranks" ] && [[ $hosts != *:* ]]; then
        share=$(((ranks + ${#list[@]} - 1) / ${#list[@]}))
        list=("${list[@]/%/:$share}")
    fi
    options+=(--host "$(IFS=, && echo "${list[*]}")")
elif [ -n "$hostfile" ]; then
    options+=(--hostfile "$hostfile")
else
    units=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')
    [ "$units" -gt 0 ] || units=$(printf '%s\n' /sys/devices/system/node/node[0-9]* | wc -l)
    ranks=${ranks:-$units}
    options+=(--oversubscribe)
fi
if [ -n "$hosts$hostfile" ]; then
    # A machine that is cut off says nothing: ask after 10 s of silence, and end the run 15 s later. Open MPI's
    # own values take eight minutes.
    export OMPI_MCA_oob_tcp_keepalive_time=${OMPI_MCA_oob_tcp_keepalive_time:-10}
    export OMPI_MCA_oob_tcp_keepalive_intvl=${OMPI_MCA_oob_tcp_keepalive_intvl:-5}
    export OMPI_MCA_oob_tcp_keepalive_probes=${OMPI_MCA_oob_tcp_keepalive_probes:-3}
    for name in $(compgen -e | grep -E '^(G?OMP|NCCL)_'); do
        options+=(-x "$name")
    done
fi
[ -z "$ranks" ] || options+=(-n "$ranks")
if [ "$(id -u)" = 0 ]; then # in a container
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi

# Between the first signal and the second, in microseconds: timeout(1) sends each twice, to us and to our group.
readonly TWICE=1000000

signals=0 signalled='' first=0
stop() {
    local time=${EPOCHREALTIME/[.,]/}
    signalled=1
    [ "$signals" = 0 ] || [ $((time - first)) -ge $TWICE ] || return
    signals=$((signals + 1))
    if [ "$signals" = 1 ]; then
        first=$time
        echo "launch: asked to stop: the ranks finish their step and save (once more: end at once)" >&4
        kill -USR1 "$job" 2>/dev/null
    else
        echo "launch: asked again: ending at once" >&4
        kill -TERM "$job" 2>/dev/null
    fi
}

# Does mpirun have ranks among its children?
has_ranks() {
    local pid name=${binary##*/} comm
    for pid in $(cat "/proc/$job/task/"*/children 2>/dev/null); do
        read -r comm 2>/dev/null <"/proc/$pid/comm" && [ "$comm" = "${name:0:15}" ] && return 0
    done
    return 1
}

# mpirun whose machines no longer answer waits for them for a quarter of an hour after the ranks have ended.
readonly GRACE=10
watch() {
    local had='' quiet=0
    trap '' INT TERM USR1 HUP
    exec 3<> <(:) # a read that never gets anything: a sleep without a process
    while read -rt 1 -u 3 || kill -0 "$job" 2>/dev/null; do
        if has_ranks; then
            had=1 quiet=0
        elif [ -n "$had" ] && [ $((quiet += 1)) = $GRACE ]; then
            echo "launch: the ranks here have ended, and other machines do not answer: mpirun ends too" >&2
            kill -KILL "$job" # what it would do on SIGTERM is what it is doing already
        fi
    done
}

echo "launch: $(printf '%q ' "$mpirun" "${options[@]}" "$binary" "$@")" >&2
setsid "$mpirun" "${options[@]}" "$binary" "$@" </dev/null &
job=$!
exec 4>&2 # for the trap, which runs within `wait`
trap stop INT TERM USR1 HUP
watch &
watcher=$!
disown "$watcher"
while :; do # a trap ends `wait` early, with the signal's number
    signalled=''
    wait "$job" 2>/dev/null # where the shell reports a job that was killed
    code=$?
    [ -n "$signalled" ] || break
done
kill -KILL "$watcher" 2>/dev/null
if [ "$signals" -gt 1 ] && [ "$code" != 0 ]; then
    exit 143
elif [ "$code" -gt 2 ]; then # a signal's, or one of mpirun's own
    echo "launch: the run failed (mpirun: $code); the last checkpoint is good: the same command goes on from it" >&2
    code=1
fi
exit "$code"
