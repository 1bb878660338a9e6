#!/usr/bin/env bash
# A real Postgres on loopback for the tests marked `services`, in one folder (.services/postgres); run as root it becomes
# the user `postgres` (or nobody), since Postgres refuses to run as root.
#   services/postgres/up.sh      then: export M2M_PG_URL as it says
# Where it can't be had (no Debian packages), it says why and exits with 77.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
root=${M2M_SERVICES:-$here/.services}/postgres

cannot() { echo "no Postgres here: $1" >&2; exit 77; }
found() { ls -d /usr/lib/postgresql/*/bin 2>/dev/null | sort -V | tail -n 1; }
if [ -z "$(found)" ]; then
  [ "$(id -u)" = 0 ] || cannot "install Debian's package postgresql"
  command -v apt-get >/dev/null || cannot "it is taken from Debian's packages, and there is no apt-get"
  export DEBIAN_FRONTEND=noninteractive
  install() { apt-get install -y -qq --no-install-recommends postgresql >/dev/null 2>&1; }
  install || { apt-get update -qq >/dev/null 2>&1; install; } || cannot "apt-get can't install postgresql"
fi
PATH=$(found):$PATH
"$(dirname "${BASH_SOURCE[0]}")/down.sh"
. "$here/services/free_ports.sh"
port=$(free_ports "${M2M_PG_PORT:-15432}" 1)

as=()
if [ "$(id -u)" = 0 ]; then
  user=$(id -un postgres 2>/dev/null || echo nobody)
  as=(runuser -u "$user" --)
fi
mkdir -p "$root" && root=$(cd "$root" && pwd)
# the user may not look into the checkout: its data lie where it may
data=$(mktemp -d /tmp/m2m-postgres.XXXXXX)
echo "$data" >"$root/data"
[ ${#as[@]} = 0 ] || chown "$user" "$data"
printf 'm2m' >"$data/password" && chmod 644 "$data/password"
cd /
"${as[@]}" env PATH="$PATH" initdb -D "$data/db" -U m2m --auth=scram-sha-256 --pwfile="$data/password" >/dev/null
"${as[@]}" env PATH="$PATH" pg_ctl -D "$data/db" -w -t 60 -l "$data/log" \
  -o "-p $port -c listen_addresses=127.0.0.1 -c unix_socket_directories=$data -c fsync=off" start >/dev/null ||
  { tail -n 5 "$data/log" >&2; exit 1; }
"${as[@]}" env PATH="$PATH" PGPASSWORD=m2m createdb -h 127.0.0.1 -p "$port" -U m2m m2m
echo "postgresql+psycopg2://m2m:m2m@127.0.0.1:$port/m2m" >"$root/url"
echo "export M2M_PG_URL=$(cat "$root/url")"
