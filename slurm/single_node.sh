#!/usr/bin/env bash
# A real SLURM on this one machine, for tests and for trying things: start | stop | status.
#
#   sudo slurm/single_node.sh start     install what is missing (Debian, Ubuntu), start munged, slurmctld, slurmd
#
# Not for a shared machine: it writes /etc/slurm/slurm.conf, and refuses to replace one that it did not write.
set -euo pipefail

CONF=/etc/slurm/slurm.conf
SPOOL=/var/spool/temper-slurm
LOGS=/var/log/temper-slurm
MARK="# Written by Temper's slurm/single_node.sh"
HOST=$(hostname -s)

fail() { echo "error: $*" >&2; exit 1; }

running() { pgrep -x "$1" >/dev/null; }

answers() { timeout 5 sinfo --noheader --format=%T 2>/dev/null | grep -qE '^(idle|mixed|allocated|completing)'; }

install_missing() {
    local program
    for program in munged slurmctld slurmd; do
        command -v "$program" >/dev/null && continue
        command -v apt-get >/dev/null || fail "$program is missing and there is no apt-get; install munge and SLURM, then try again"
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -qq
        apt-get install -y -qq slurm-wlm munge >/dev/null
        break
    done
}

# Settings that differ from SLURM's own, and why.
#   cred_expire      how long a requeued job is held before it may start again (SLURM: 120 s), and how long a step may take to start
#   KillWait         seconds between SIGTERM and SIGKILL
#   MinJobAge        seconds for which squeue knows finished jobs: it is all that there is to ask without accounting
#   task/none, linuxproc, jobacct none: no cgroups, which a container may not give
write_conf() {
    if [ -e "$CONF" ] && ! grep -qF "$MARK" "$CONF"; then
        fail "$CONF is somebody else's; use that SLURM, or move the file away"
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
    running munged && return
    mkdir -p /etc/munge /run/munge /var/lib/munge /var/log/munge
    [ -s /etc/munge/munge.key ] || (umask 077 && head -c 1024 /dev/urandom >/etc/munge/munge.key)
    chown -R munge: /etc/munge /run/munge /var/lib/munge /var/log/munge
    chmod 755 /run/munge
    runuser -u munge -- munged
}

start() {
    [ "$(id -u)" = 0 ] || fail "run this as root: SLURM starts jobs for any user"
    if answers; then
        status
        return
    fi
    install_missing
    write_conf
    start_munge
    running slurmctld || slurmctld
    running slurmd || slurmd
    local tries
    for tries in $(seq 60); do
        answers && break
        # A node that was down, or has less memory than it had, comes back only when told.
        [ "$tries" != 20 ] || scontrol update NodeName="$HOST" State=RESUME 2>/dev/null || true
        sleep 0.5
    done
    answers || { tail -n 20 "$LOGS"/*.log >&2; fail "SLURM does not answer; its logs are in $LOGS"; }
    status
}

stop() {
    [ "$(id -u)" = 0 ] || fail "run this as root"
    [ ! -e "$CONF" ] || grep -qF "$MARK" "$CONF" || fail "$CONF is somebody else's; this SLURM is left as it is"
    local program pid
    for program in slurmd slurmctld; do
        pid=$(cat "/run/$program.pid" 2>/dev/null) && kill "$pid" 2>/dev/null || true
    done
    echo "stopped; munge stays, and so do $CONF and the jobs in $SPOOL"
}

status() {
    answers || { echo "no SLURM answers on this machine; start one with: $0 start"; return 1; }
    sinfo --Node --format="SLURM answers: node %N, %c CPUs, %m MiB, %T"  --noheader
}

case "${1:-}" in
    start | stop | status) "$1" ;;
    *) echo "usage: $0 start|stop|status" >&2; exit 2 ;;
esac
