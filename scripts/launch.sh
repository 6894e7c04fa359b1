#!/usr/bin/env bash
# Train (or evaluate) on several ranks with mpirun, on this machine or on several over ssh; see --help.
#
# mpirun forwards SIGUSR1 to the ranks, but on SIGINT or SIGTERM it kills them within a second. So it runs in a
# session of its own, where Ctrl-C does not reach it, and this script turns the first signal into SIGUSR1: the
# ranks finish their step, save and exit, and this script exits with their code.
set -uo pipefail

usage() {
    cat <<'END'
scripts/launch.sh [-n RANKS] [--hosts HOST[:RANKS],... | --hostfile FILE] [--watch tensorboard|wandb]
                  train CONFIG [section.key=value ...]

  -n RANKS         number of processes; default: one per GPU of this machine, without GPUs one per NUMA node,
                   with --hosts or --hostfile the sum of their slots
  --hosts LIST     machines reachable by ssh without a password; HOST:4 gets 4 ranks, HOST its share of -n, or 1
  --hostfile FILE  the same as a file for mpirun, one machine per line: HOST slots=4
  --watch TARGET   run scripts/watch.py beside the training, which sends its metrics there

  scripts/launch.sh -n 2 train configs/quickstart.ini
  scripts/launch.sh --hosts node1:2,node2:2 train configs/gpt2_124m.ini run.dir=/shared/runs/gpt2

With GPUs each rank uses one, and they communicate over NCCL; NCCL_DEBUG=INFO shows the network it uses,
NCCL_SOCKET_IFNAME=eth1 and NCCL_IB_HCA=mlx5 select it (variables that begin with NCCL_ are passed to all hosts).

All hosts need this program, the data and run.dir under the same paths. `eval` works the same way.
Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 or SIGUSR2: finish the step, save, exit 0; the same command resumes. A second
signal ends the run at once. Open MPI is configured by environment variables: OMPI_MCA_btl_tcp_if_include=eth1 and
OMPI_MCA_oob_tcp_if_include=eth1 select the network. TRAIN_IHA sets the binary, MPIRUN the mpirun to use.
END
}

refuse() {
    echo "launch: $1" >&2
    exit 2
}

ranks='' hosts='' hostfile='' target=''
while [ $# -gt 0 ]; do
    case $1 in
    --help | -h)
        usage
        exit 0
        ;;
    -n | --hosts | --hostfile | --watch)
        [ $# -ge 2 ] || refuse "$1 needs a value; see scripts/launch.sh --help"
        case $1 in
        -n) ranks=$2 ;;
        --hosts) hosts=$2 ;;
        --hostfile) hostfile=$2 ;;
        --watch) target=$2 ;;
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
*) refuse "'$1' cannot run on several ranks; only train and eval can" ;;
esac
[ -z "$ranks" ] || [[ $ranks =~ ^[1-9][0-9]{0,5}$ ]] || refuse "-n $ranks: not a number of ranks"
[ -z "$hosts" ] || [ -z "$hostfile" ] || refuse "--hosts and --hostfile cannot be combined; give one"
[ -z "$hostfile" ] || [ -r "$hostfile" ] || refuse "--hostfile $hostfile: cannot read it"

mpirun=${MPIRUN:-mpirun}
command -v "$mpirun" >/dev/null ||
    refuse "$mpirun is not installed; run make deps and build again, or load your cluster's Open MPI"
binary=${TRAIN_IHA:-$(dirname "$(readlink -f "$0")")/../train_iha}
binary=$(realpath -m -- "$binary")
[ -x "$binary" ] || refuse "$binary is not there; run make"

# Watching is a process of its own that only reads; it ends once this script has.
if [ -n "$target" ]; then
    [ "$1" = train ] || refuse "--watch follows a run: it goes with train, not with $1"
    scripts=$(dirname "$(readlink -f "$0")")
    python=$scripts/../.venv/bin/python
    [ -x "$python" ] || python=python3
    run_dir=$(sed -n '/^[[:space:]]*\[run\]/,/^[[:space:]]*\[/s/^[[:space:]]*dir[[:space:]]*=[[:space:]]*\(.*[^[:space:]]\)[[:space:]]*$/\1/p' "${2:-}" 2>/dev/null |
        tail -1 | sed -E "s/^\"([^\"]*)\".*|^'([^']*)'.*/\1\2/; t; s/[[:space:]]+[#;].*//")
    for argument in "$@"; do
        [[ $argument != run.dir=* ]] || run_dir=${argument#run.dir=}
    done
    run_dir=${run_dir/#\~\//$HOME/}
    [ -n "$run_dir" ] || refuse "--watch: neither ${2:-the configuration} nor an override says run.dir"
    message=$("$python" "$scripts/watch.py" "$run_dir" --to "$target" --check 2>&1) || refuse "--watch: ${message#watch.py: }"
    setsid "$python" "$scripts/watch.py" "$run_dir" --to "$target" --pid $$ </dev/null >/dev/null &
    disown
fi

# The ranks of a machine divide its cores among themselves.
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
    # Keepalive probes find an unreachable machine: after 10 s without data, and 15 s later the run ends. Open
    # MPI's defaults take eight minutes.
    export OMPI_MCA_oob_tcp_keepalive_time=${OMPI_MCA_oob_tcp_keepalive_time:-10}
    export OMPI_MCA_oob_tcp_keepalive_intvl=${OMPI_MCA_oob_tcp_keepalive_intvl:-5}
    export OMPI_MCA_oob_tcp_keepalive_probes=${OMPI_MCA_oob_tcp_keepalive_probes:-3}
    for name in $(compgen -e | grep -E '^(G?OMP|NCCL)_'); do
        options+=(-x "$name")
    done
fi
# The mpirun of Open MPI 5 reads the settings of its daemons under other names.
for name in $(compgen -e | grep -E '^OMPI_MCA_(oob_tcp|plm_rsh)_'); do
    setting=${name#OMPI_MCA_} setting=${setting/#plm_rsh_/plm_ssh_}
    setting=PRTE_MCA_${setting/#oob_tcp_if_/prte_if_}
    export "$setting=${!setting:-${!name}}"
done
[ -z "$ranks" ] || options+=(-n "$ranks")
if [ "$(id -u)" = 0 ]; then # in a container
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi

# A repeated signal within this time, in microseconds, is the same one: timeout(1) sends it to the process and to
# its group.
readonly REPEAT_US=1000000

signals=0 signalled='' first=0
stop() {
    local time=${EPOCHREALTIME/[.,]/}
    signalled=1
    [ "$signals" = 0 ] || [ $((time - first)) -ge $REPEAT_US ] || return
    signals=$((signals + 1))
    if [ "$signals" = 1 ]; then
        first=$time
        echo "launch: stopping: the ranks finish their step and save (a second signal ends them at once)" >&4
        kill -USR1 "$job" 2>/dev/null
    else
        echo "launch: second signal: ending at once" >&4
        kill -TERM "$job" 2>/dev/null
    fi
}

# Whether mpirun has ranks among its children. Sets had_ranks for those that have ended, too.
has_ranks() {
    local pid name=${binary##*/} comm
    for pid in $(cat "/proc/$job/task/"*/children 2>/dev/null); do
        read -r comm 2>/dev/null <"/proc/$pid/comm" && [ "$comm" = "${name:0:15}" ] || continue
        had_ranks=1
        # One that has ended, and that mpirun has not waited for, has no program.
        [ ! -e "/proc/$pid/exe" ] || return 0
    done
    return 1
}

# When other machines do not answer, mpirun waits for them for 15 minutes after its own ranks have ended. On one machine it
# seldom does not end at all after a rank was killed.
readonly GRACE=10
watch() {
    local had_ranks='' idle=0 silent='mpirun does not'
    [ -z "$hosts$hostfile" ] || silent='other machines do not answer'
    trap '' INT TERM USR1 USR2 HUP
    exec 3<> <(:) # a read from this times out: a sleep without a process
    while read -rt 1 -u 3 || kill -0 "$job" 2>/dev/null; do
        if has_ranks; then
            idle=0
        elif [ -n "$had_ranks" ] && [ $((idle += 1)) = $GRACE ]; then
            echo "launch: the ranks on this machine have ended and $silent: killing mpirun" >&2
            kill -KILL "$job" # on SIGTERM it would go on waiting
        fi
    done
}

# The mpirun of Open MPI 5 exits with 0 when it loses a machine. So its messages pass through this, whose status tells;
# the last line is from this script, because processes on the lost machine may keep the pipe open.
readonly LAST_LINE=$'\4'
relay_stderr() {
    local line lost=0
    trap '' INT TERM USR1 USR2 HUP
    while IFS= read -r line; do
        [ "$line" != "$LAST_LINE" ] || break
        printf '%s\n' "${line%"$LAST_LINE"}"
        [[ $line != *'lost communication with a remote daemon'* ]] || lost=1
        [[ $line != *"$LAST_LINE" ]] || break # what mpirun wrote last had no end of line
    done
    exit "$lost"
}

echo "launch: $(printf '%q ' "$mpirun" "${options[@]}" "$binary" "$@")" >&2
exec 4>&2 # for the trap: `wait` below redirects stderr
relay=''
if [ -n "$hosts$hostfile" ]; then
    exec 5> >(relay_stderr >&4)
    relay=$!
else
    exec 5>&2
fi
setsid "$mpirun" "${options[@]}" "$binary" "$@" </dev/null 2>&5 4>&- 5>&- &
job=$!
trap stop INT TERM USR1 USR2 HUP
watch &
watcher=$!
disown "$watcher"
while :; do # a trap ends `wait` early, with the signal's number
    signalled=''
    wait "$job" 2>/dev/null # without the shell's report of a killed job
    code=$?
    [ -n "$signalled" ] || break
done
kill -KILL "$watcher" 2>/dev/null
lost=0
if [ -n "$relay" ]; then
    trap '' INT TERM USR1 USR2 HUP
    echo "$LAST_LINE" >&5
    wait "$relay" || lost=1
fi
if [ "$signals" -gt 1 ] && [ "$code" != 0 ]; then
    exit 143
elif [ "$code" -gt 2 ]; then # killed by a signal, or an error of mpirun
    echo "launch: the run failed (exit code of mpirun: $code); the same command resumes from the last checkpoint" >&2
    code=1
elif [ "$code" = 0 ] && [ "$lost" = 1 ]; then
    echo "launch: mpirun lost a machine; the same command resumes from the last checkpoint" >&2
    code=1
fi
exit "$code"
