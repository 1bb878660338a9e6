#!/usr/bin/env bash
# End the Postgres of up.sh, by the pid that it wrote down, and remove its data.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
root=${M2M_SERVICES:-$here/.services}/postgres
[ -s "$root/data" ] || exit 0
data=$(cat "$root/data")
if [ -s "$data/db/postmaster.pid" ]; then
  pid=$(head -n 1 "$data/db/postmaster.pid")
  if [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = postgres ]; then
    kill -INT "$pid"
    for _ in $(seq 50); do [ -d "/proc/$pid" ] || break; sleep 0.1; done
  fi
fi
rm -rf "$data" "$root"
