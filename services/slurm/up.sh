#!/usr/bin/env bash
# A real Slurm on one machine, on loopback: `nodes` nodes with eight pretended A100s each, for the tests marked `services`.
# Everything lies in one folder (.services/slurm); nothing of the machine's own Slurm or munge is read or changed.
#   services/slurm/up.sh [nodes]      then: export SLURM_CONF=.services/slurm/slurm.conf
# Where it can't be had (not root, no Debian packages), it says why and exits with 77.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
root=${M2M_SERVICES:-$here/.services}/slurm
nodes=${1:-1}
cpus=${SLURM_CPUS:-16} # of each node, pretended as well: nothing is pinned
user=$(id -un)
host=$(hostname -s)

cannot() { echo "no Slurm here: $1" >&2; exit 77; }
[ "$(id -u)" = 0 ] || cannot "its daemons start jobs and make device files; run this as root"
there() { local name; for name in slurmctld slurmd sbatch munged; do command -v "$name" >/dev/null || return 1; done; }
if ! there; then
  command -v apt-get >/dev/null || cannot "it is taken from Debian's packages, and there is no apt-get"
  export DEBIAN_FRONTEND=noninteractive
  install() { apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null 2>&1; }
  install || { apt-get update -qq >/dev/null 2>&1; install; } || cannot "apt-get can't install slurm-wlm and munge"
fi
"$(dirname "${BASH_SOURCE[0]}")/down.sh"
. "$here/services/free_ports.sh"
port=$(free_ports "${M2M_SLURM_PORT:-16817}" $((nodes + 1))) # and one more for each node

mkdir -p "$root"/{state,log,run,dev,munge}
chmod 755 "$root" "$root/munge"
for i in {0..7}; do # a plain file leaves CUDA_VISIBLE_DEVICES empty; this is another /dev/null
  [ -c "$root/dev/gpu$i" ] || mknod "$root/dev/gpu$i" c 1 3 || cannot "this machine lets nobody make device files"
done
[ -s "$root/munge/key" ] || (umask 077 && head -c 128 /dev/urandom >"$root/munge/key")
munged --force --key-file="$root/munge/key" --socket="$root/munge/socket" --pid-file="$root/munge/pid" \
  --log-file="$root/log/munged.log" --seed-file="$root/munge/seed" --num-threads=2

cat >"$root/slurm.conf" <<CONF
ClusterName=m2mtest
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$root/munge/socket
CredType=cred/munge
StateSaveLocation=$root/state
SlurmdSpoolDir=$root/spool.%n
SlurmctldPidFile=$root/run/slurmctld.pid
SlurmdPidFile=$root/run/slurmd.%n.pid
SlurmctldLogFile=$root/log/slurmctld.log
SlurmdLogFile=$root/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0,bf_interval=1
GresTypes=gpu
ReturnToService=2
KillWait=3
MinJobAge=300
SlurmdTimeout=30
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
JobSubmitPlugins=lua
CONF
# without a database of accounts: vision is one, and none need be named; the file `full` stands for a user's most jobs
cat >"$root/job_submit.lua" <<LUA
function slurm_job_submit(job, partitions, user)
  if job.account ~= nil and job.account ~= "vision" then return 2045 end -- ESLURM_INVALID_ACCOUNT
  local full = io.open("$root/full")
  if full then full:close() return 2050 end -- ESLURM_ACCOUNTING_POLICY
  return slurm.SUCCESS
end
function slurm_job_modify(job, record, partitions, user) return slurm.SUCCESS end
LUA
: >"$root/gres.conf"
echo "AutoDetect=off" >>"$root/gres.conf"
names=
for n in $(seq "$nodes"); do
  names+=${names:+,}n$n
  echo "NodeName=n$n NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + n)) CPUs=$cpus RealMemory=64000" \
    "Gres=gpu:a100:8 State=UNKNOWN" >>"$root/slurm.conf"
  echo "NodeName=n$n Name=gpu Type=a100 File=$root/dev/gpu[0-7]" >>"$root/gres.conf"
done
cat >>"$root/slurm.conf" <<CONF
PartitionName=gpu Nodes=$names Default=YES MaxTime=7-0 State=UP PriorityTier=1 PreemptMode=REQUEUE
PartitionName=urgent Nodes=$names MaxTime=7-0 State=UP PriorityTier=10 PreemptMode=OFF
CONF

export SLURM_CONF=$root/slurm.conf
# what a shell starts in the background ignores interrupts, and so would all jobs
daemon() { env --default-signal=INT,QUIT "$@"; }
daemon slurmctld
for n in $(seq "$nodes"); do daemon slurmd -N "n$n"; done
for _ in $(seq 100); do
  [ "$(timeout 2 sinfo -h -N -p gpu -t idle -o %N 2>/dev/null | wc -l)" = "$nodes" ] && break
  sleep 0.2
done
[ "$(sinfo -h -N -p gpu -t idle -o %N | wc -l)" = "$nodes" ] ||
  { echo "Slurm does not answer; the ends of its logs:" >&2; tail -n 3 "$root"/log/*.log >&2; exit 1; }
sinfo -N -p gpu -o "%N %T %c %m %G"
echo "export SLURM_CONF=$SLURM_CONF"
