#!/usr/bin/env bash
# End the Ray of up.sh: the processes whose command line names its folder, or that have files open in it (its agents
# and workers overwrite their command lines), no others.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
root=${M2M_SERVICES:-$here/.services}/ray
[ -s "$root/tmp" ] || exit 0
tmp=$(cat "$root/tmp")
mine() {
  for process in /proc/[0-9]*; do
    { tr '\0' ' ' <"$process/cmdline" | grep -qF "$tmp" || find "$process/fd" -lname "$tmp/*" | grep -q .; } \
      2>/dev/null && echo "${process#/proc/}"
  done
  return 0
}
kill $(mine) 2>/dev/null || true
for _ in $(seq 50); do [ -z "$(mine)" ] && break; sleep 0.1; done
kill -9 $(mine) 2>/dev/null || true
rm -rf "$tmp" "$root"
