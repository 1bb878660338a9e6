# To be sourced. free_ports FIRST COUNT: the first of so many ports in a row, from FIRST on, that nobody listens on here.
free_ports() {
  local first=$1 port
  for ((port = first; port < first + $2; port++)); do
    if (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
      first=$((port + 1))
    fi
  done
  echo "$first"
}
