#!/usr/bin/env bash
# A real Ray cluster for the tests marked `services`: its head, and `nodes` - 1 more nodes on this machine, each with
# eight pretended GPUs. Its dashboard, which takes jobs, is on loopback; what Ray's processes say to each other goes by
# ports that it opens on all addresses and can't be told otherwise.
#   services/ray/up.sh [nodes]      2 by default; then: export RAY_ADDRESS as it says
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
root=${M2M_SERVICES:-$here/.services}/ray
python=${PYTHON:-$here/.venv/bin/python}
nodes=${1:-2}
ray() { "$python" -c 'import sys; from ray.scripts.scripts import main; sys.exit(main())' "$@"; }
answers() { "$python" -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=5)' "$url/api/jobs/"; }

"$python" -c 'import ray' 2>/dev/null || { echo "Ray is not installed: pip install 'm2m[ray]'" >&2; exit 77; }
"$(dirname "${BASH_SOURCE[0]}")/down.sh"
. "$here/services/free_ports.sh"
port=$(free_ports "${M2M_RAY_PORT:-6380}" 4)
gcs=127.0.0.1:$port url=http://127.0.0.1:$((port + 1))
mkdir -p "$root"
# a short path: Ray's sockets lie below it, and a socket's path has 107 characters at most
tmp=$(mktemp -d /tmp/m2m-ray.XXXXXX)
echo "$tmp" >"$root/tmp"
export RAY_DISABLE_IMPORT_WARNING=1 RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=1
# a lost node is noticed in seconds, not in half a minute
export RAY_health_check_initial_delay_ms=1000 RAY_health_check_period_ms=1000 RAY_health_check_failure_threshold=5
# or what else the machine does comes before every stage: Ray starts its workers with 15
export RAY_worker_niceness=0
# whatever token an earlier ray.init has left in the home folder
export RAY_AUTH_MODE=disabled
# workers get any free port: their own range is one that others use too
common=(--num-cpus=8 --num-gpus=8 --min-worker-port=0 --max-worker-port=0 --memory=8000000000
  --object-store-memory=100000000 --disable-usage-stats)
ray start --head --node-ip-address=127.0.0.1 --port="$port" --dashboard-host=127.0.0.1 --dashboard-port=$((port + 1)) \
  --ray-client-server-port=$((port + 2)) --dashboard-agent-listen-port=$((port + 3)) --temp-dir="$tmp" "${common[@]}" \
  >"$root/up.log" 2>&1 || { tail -n 20 "$root/up.log" >&2; exit 1; }
for _ in $(seq 2 "$nodes"); do
  ray start --address="$gcs" --node-ip-address=127.0.0.1 --dashboard-agent-listen-port=0 "${common[@]}" \
    >>"$root/up.log" 2>&1 || { tail -n 20 "$root/up.log" >&2; exit 1; }
done
for _ in $(seq 120); do
  answers 2>/dev/null && break
  sleep 0.5
done
answers ||
  { echo "Ray does not answer; see $root/up.log and $tmp" >&2; exit 1; }
echo "$gcs" >"$root/gcs"
echo "$url" >"$root/url"
echo "export RAY_ADDRESS=$url"
