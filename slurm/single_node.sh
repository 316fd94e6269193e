#!/usr/bin/env bash
# Run SLURM on a single machine, for tests and experiments: start | stop | status.
#
#   sudo slurm/single_node.sh start     install missing packages (Debian, Ubuntu); start munged,
#                                       slurmctld and slurmd
#
# Not for a shared machine: it writes /etc/slurm/slurm.conf. It does not replace a file of that name
# that it did not write.
set -euo pipefail

CONF=/etc/slurm/slurm.conf
SPOOL=/var/spool/temper-slurm
LOGS=/var/log/temper-slurm
MARK="# Written by Temper's slurm/single_node.sh"
HOST=$(hostname -s)

fail() { echo "error: $*" >&2; exit 1; }

is_running() { pgrep -x "$1" >/dev/null; }

# Whether SLURM answers and has a node that takes jobs.
is_ready() {
    timeout 5 sinfo --noheader --format=%T 2>/dev/null \
        | grep -qE '^(idle|mixed|allocated|completing)'
}

install_missing() {
    local program
    for program in munged slurmctld slurmd; do
        command -v "$program" >/dev/null && continue
        command -v apt-get >/dev/null \
            || fail "$program is missing, and apt-get too; install munge and SLURM, then retry"
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -qq
        apt-get install -y -qq slurm-wlm munge >/dev/null
        break
    done
}

# Settings that differ from SLURM's defaults:
#   cred_expire  seconds that a requeued job is held before it starts again (default: 120), and that
#                a step may take to start
#   KillWait     seconds between SIGTERM and SIGKILL
#   MinJobAge    seconds that squeue lists finished jobs; there is no accounting to query instead
#   task/none, linuxproc, jobacct none: no cgroups, which containers may not have
write_conf() {
    if [ -e "$CONF" ] && ! grep -qF "$MARK" "$CONF"; then
        fail "$CONF was not written by this script; use that SLURM, or move the file away"
    fi
    local cpus memory_mib
    cpus=$(( $(nproc) > 2 ? $(nproc) : 2 )) # two tasks must fit
    memory_mib=$(awk '/^MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
    mkdir -p "$(dirname "$CONF")" "$SPOOL/ctld" "$SPOOL/d" "$LOGS"
    cat >"$CONF.new" <<END
$MARK
ClusterName=temper
SlurmctldHost=$HOST(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=${SLURM_HOLD_SECONDS:-15}
StateSaveLocation=$SPOOL/ctld
SlurmdSpoolDir=$SPOOL/d
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=$LOGS/slurmctld.log
SlurmdLogFile=$LOGS/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
KillWait=10
MinJobAge=300
JobRequeue=1
ReturnToService=2
PropagateResourceLimits=NONE
NodeName=$HOST NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=$memory_mib State=UNKNOWN
PartitionName=main Nodes=$HOST Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
END
    mv "$CONF.new" "$CONF"
}

start_munge() {
    is_running munged && return
    mkdir -p /etc/munge /run/munge /var/lib/munge /var/log/munge
    [ -s /etc/munge/munge.key ] || (umask 077 && head -c 1024 /dev/urandom >/etc/munge/munge.key)
    chown -R munge: /etc/munge /run/munge /var/lib/munge /var/log/munge
    chmod 755 /run/munge
    runuser -u munge -- munged
}

start() {
    [ "$(id -u)" = 0 ] || fail "run this as root: SLURM starts jobs for any user"
    if is_ready; then
        status
        return
    fi
    install_missing
    write_conf
    start_munge
    is_running slurmctld || slurmctld
    is_running slurmd || slurmd
    local tries
    for tries in $(seq 60); do
        is_ready && break
        # A node that was down, or has less memory than before, must be resumed explicitly.
        [ "$tries" != 20 ] || scontrol update NodeName="$HOST" State=RESUME 2>/dev/null || true
        sleep 0.5
    done
    if ! is_ready; then
        tail -n 20 "$LOGS"/*.log >&2
        fail "SLURM does not answer; its logs are in $LOGS"
    fi
    status
}

stop() {
    [ "$(id -u)" = 0 ] || fail "run this as root"
    if [ -e "$CONF" ] && ! grep -qF "$MARK" "$CONF"; then
        fail "$CONF was not written by this script; this SLURM is not stopped"
    fi
    local program pid
    for program in slurmd slurmctld; do
        pid=$(cat "/run/$program.pid" 2>/dev/null) && kill "$pid" 2>/dev/null || true
    done
    echo "stopped; munge keeps running, and $CONF and the jobs in $SPOOL are kept"
}

status() {
    is_ready || { echo "no SLURM is running on this machine; start one with: $0 start"; return 1; }
    sinfo --Node --format="SLURM is running: node %N, %c CPUs, %m MiB, %T" --noheader
}

case "${1:-}" in
    start | stop | status) "$1" ;;
    *) echo "usage: $0 start|stop|status" >&2; exit 2 ;;
esac
