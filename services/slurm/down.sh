#!/usr/bin/env bash
# End the Slurm of up.sh: its jobs, then its daemons, each by the pid that it wrote down. What it logged is kept.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
root=${M2M_SERVICES:-$here/.services}/slurm
[ -d "$root" ] || exit 0

export SLURM_CONF=$root/slurm.conf
if [ -s "$root/run/slurmctld.pid" ] && timeout 3 scontrol ping >/dev/null 2>&1; then
  scancel --me 2>/dev/null || true
  for _ in $(seq 50); do [ -z "$(timeout 3 squeue -h)" ] && break; sleep 0.2; done
fi
end() { # FILE NAME: a pid may have been given to another process since
  [ -s "$1" ] || return 0
  local pid; pid=$(cat "$1")
  if [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$2" ]; then
    kill "$pid"
    for _ in $(seq 50); do [ -d "/proc/$pid" ] || break; sleep 0.1; done
    [ ! -d "/proc/$pid" ] || kill -9 "$pid"
  fi
  rm -f "$1"
}
end "$root/run/slurmctld.pid" slurmctld
for pid in "$root"/run/slurmd.*.pid; do end "$pid" slurmd; done
end "$root/munge/pid" munged
rm -rf "$root"/{state,spool.*,full}
