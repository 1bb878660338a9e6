#!/usr/bin/env bash
# A real Ray cluster on loopback for the tests marked `services`: its head, and `nodes` - 1 more nodes on this machine,
# each with eight pretended GPUs.
#   services/ray/up.sh [nodes]      2 by default; then: export RAY_ADDRESS=http://127.0.0.1:8266
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
root=${M2M_SERVICES:-$here/.services}/ray
python=${PYTHON:-$here/.venv/bin/python}
nodes=${1:-2}
ray() { "$python" -c 'import sys; from ray.scripts.scripts import main; sys.exit(main())' "$@"; }

"$python" -c 'import ray' 2>/dev/null || { echo "Ray is not installed: pip install 'm2m[ray]'" >&2; exit 77; }
"$(dirname "${BASH_SOURCE[0]}")/down.sh"
mkdir -p "$root"
# a short path: Ray's sockets lie below it, and a socket's path has 107 characters at most
tmp=$(mktemp -d /tmp/m2m-ray.XXXXXX)
echo "$tmp" >"$root/tmp"
export RAY_DISABLE_IMPORT_WARNING=1 RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=1
# a lost node is noticed in seconds, not in half a minute
export RAY_health_check_initial_delay_ms=1000 RAY_health_check_period_ms=1000 RAY_health_check_failure_threshold=5
# or what else the machine does comes before every stage: Ray starts its workers with 15
export RAY_worker_niceness=0
common=(--num-cpus=8 --num-gpus=8 --memory=8000000000 --object-store-memory=100000000 --disable-usage-stats)
ray start --head --node-ip-address=127.0.0.1 --port=6380 --dashboard-host=127.0.0.1 --dashboard-port=8266 \
  --temp-dir="$tmp" "${common[@]}" >"$root/up.log" 2>&1 || { tail -n 20 "$root/up.log" >&2; exit 1; }
for _ in $(seq 2 "$nodes"); do
  ray start --address=127.0.0.1:6380 --node-ip-address=127.0.0.1 "${common[@]}" >>"$root/up.log" 2>&1 ||
    { tail -n 20 "$root/up.log" >&2; exit 1; }
done
for _ in $(seq 120); do
  "$python" -c 'import urllib.request as u; u.urlopen("http://127.0.0.1:8266/api/jobs/", timeout=2)' 2>/dev/null && break
  sleep 0.5
done
"$python" -c 'import urllib.request as u; u.urlopen("http://127.0.0.1:8266/api/jobs/", timeout=5)' ||
  { echo "Ray does not answer; see $root/up.log and $tmp" >&2; exit 1; }
echo "export RAY_ADDRESS=http://127.0.0.1:8266"
