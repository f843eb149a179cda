#!/usr/bin/env bash
# with_slurm.sh COMMAND...: run a command beside a SLURM of its own, one node of 2 CPUs on this machine, and stop it.
#
# Installs Debian's slurm-wlm and munge where they are missing (as root). All that the daemons write goes to a
# temporary folder, their ports and keys are their own, and an installed SLURM's configuration is neither read nor
# changed. Where SLURM cannot start the last line says "skipped:", which part could not and what it said; exit code 77.
set -euo pipefail

dir=$(mktemp -d)
daemons=() command=()
stop() {
    kill "${command[@]}" 2>/dev/null || true
    if [ ${#daemons[@]} = 3 ]; then  # jobs outlive the daemons
        scancel --user="$me" || true
        for _ in $(seq 150); do [ -n "$(squeue --noheader)" ] || break; sleep 0.1; done
    fi >/dev/null 2>&1
    for pid in "${daemons[@]}"; do kill "$pid" 2>/dev/null || true; done
    for pid in "${daemons[@]}"; do
        for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
        kill -KILL "$pid" 2>/dev/null || true
    done
    rm -rf "$dir"
}
trap stop EXIT
trap 'exit 130' INT TERM

skip() {  # what could not, and a file with what it said
    [ -s "${2:-}" ] && tail -n 5 "$2"
    echo "skipped: SLURM cannot run here: $1"
    exit 77
}

export PATH=$PATH:/usr/sbin:/sbin
parts=(munged slurmctld slurmd sbatch srun squeue scancel scontrol sinfo)
if ! command -v "${parts[@]}" >"$dir/found" || [ "$(wc -l <"$dir/found")" -lt ${#parts[@]} ]; then
    command -v apt-get >/dev/null || skip "slurm-wlm and munge are not installed, and there is no apt-get"
    [ "$(id -u)" = 0 ] || skip "slurm-wlm and munge are not installed, and only root can install them"
    export DEBIAN_FRONTEND=noninteractive
    install=(apt-get install -y -q --no-install-recommends slurm-wlm munge)
    "${install[@]}" >"$dir/apt.log" 2>&1 || { apt-get update -q && "${install[@]}"; } >"$dir/apt.log" 2>&1 ||
        skip "slurm-wlm and munge could not be installed" "$dir/apt.log"
fi

chmod 755 "$dir"
mkdir -p "$dir"/{state,spool,logs}
host=$(hostname -s) me=$(id -un)
(umask 077 && head -c 1024 /dev/urandom >"$dir/munge.key")
cat >"$dir/slurm.conf" <<CONF
ClusterName=untuned
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${SLURMCTLD_PORT:-26817}
SlurmdPort=${SLURMD_PORT:-26818}
SlurmUser=$me
SlurmdUser=$me
AuthType=auth/munge
# A requeued job waits for its credential to expire: seconds, not two minutes.
AuthInfo=socket=$dir/munge.socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldLogFile=$dir/logs/slurmctld
SlurmdLogFile=$dir/logs/slurmd
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=5,batch_sched_delay=1
ReturnToService=2
MpiDefault=none
KillWait=10
NodeName=$host NodeAddr=127.0.0.1 CPUs=2
PartitionName=here Nodes=$host Default=YES MaxTime=60
CONF
export SLURM_CONF=$dir/slurm.conf

start() {  # name, arguments: in the foreground of a process of ours, so that it can be stopped by its id
    "$@" >"$dir/logs/$1.out" 2>&1 &
    daemons+=($!)
}
check() {  # name, a command that succeeds once it is up
    local name=$1
    for _ in $(seq 120); do
        if "${@:2}" >/dev/null 2>&1; then return; fi
        kill -0 "${daemons[-1]}" 2>/dev/null || break
        sleep 0.25
    done
    cat "$dir/logs/$name.out" "$dir/logs/$name" >"$dir/said" 2>/dev/null || true
    skip "$name did not start" "$dir/said"
}
idle() { sinfo --noheader --format=%T | grep -qx idle; }

start munged --foreground --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" \
    --pid-file="$dir/munged.pid" --log-file="$dir/logs/munged" --seed-file="$dir/munged.seed"
check munged test -S "$dir/munge.socket"
start slurmctld -D -c
check slurmctld scontrol ping
start slurmd -D
check slurmd idle

set -m  # the command keeps its Ctrl-C, and this shell does not wait to hear of its own end
"$@" &
command=($!)
wait "${command[0]}"
