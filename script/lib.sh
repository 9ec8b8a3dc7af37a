# Shared by the scripts: packages, and the servers that tests and benches use. Sourced, not run.

# Installs Debian packages that are missing. As root, or through sudo.
install_packages() {
    local missing=() package
    for package in "$@"; do
        dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing+=("$package")
    done
    [ ${#missing[@]} -eq 0 ] && return 0
    if ! command -v apt-get >/dev/null 2>&1; then
        echo "missing: ${missing[*]}; install them with your system's package manager" >&2
        return 69
    fi
    local as_root=()
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null 2>&1 || { echo "missing: ${missing[*]}; run as root: apt-get install ${missing[*]}" >&2; return 69; }
        as_root=(sudo)
    fi
    echo "installing ${missing[*]}"
    # Debian's Postgres package would create and start a cluster of its own; nothing here uses it.
    "${as_root[@]}" mkdir -p /etc/postgresql-common
    [ -e /etc/postgresql-common/createcluster.conf ] ||
        printf 'create_main_cluster = false\n' | "${as_root[@]}" tee /etc/postgresql-common/createcluster.conf >/dev/null
    "${as_root[@]}" apt-get update -qq
    DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

# The directory of the newest installed Postgres server.
postgres_bin() {
    local newest
    newest=$(find /usr/lib/postgresql -mindepth 1 -maxdepth 1 -type d 2>/dev/null | sort -V | tail -n 1)
    if [ -n "$newest" ] && [ -x "$newest/bin/postgres" ]; then
        echo "$newest/bin"
    elif command -v initdb >/dev/null 2>&1; then
        dirname "$(command -v initdb)"
    else
        echo "no Postgres server found" >&2
        return 69
    fi
}

# Starts one Postgres and one nats-server below the directory $1 and exports their addresses for the tests.
start_test_servers() {
    local directory=$1 bin user=()
    bin=$(postgres_bin)
    chmod 755 "$directory"
    mkdir -p "$directory/postgres" "$directory/socket" "$directory/nats"
    if [ "$(id -u)" -eq 0 ]; then
        # Postgres refuses to run as root.
        chown 65534:65534 "$directory/postgres" "$directory/socket"
        user=(setpriv --reuid 65534 --regid 65534 --clear-groups)
    fi
    (cd / && "${user[@]}" "$bin/initdb" -D "$directory/postgres/data" -U tabularium -A trust -N -E UTF8 --locale=C >"$directory/initdb.log")
    (cd / && exec "${user[@]}" "$bin/postgres" -D "$directory/postgres/data" -k "$directory/socket" \
        -c listen_addresses= -c fsync=off -c max_connections=400 >"$directory/postgres.log" 2>&1) &
    echo $! >"$directory/postgres.pid"
    nats-server --addr 127.0.0.1 --port -1 --jetstream --store_dir "$directory/nats" --ports_file_dir "$directory/nats" \
        >"$directory/nats.log" 2>&1 &
    echo $! >"$directory/nats.pid"
    local try nats=
    for try in $(seq 1 100); do
        if [ -z "$nats" ]; then
            nats=$(cat "$directory"/nats/*.ports 2>/dev/null | tr -d '"[] ' | tr ',{}' '\n\n\n' | grep -o 'nats://.*' | head -n 1 || true)
        fi
        if [ -n "$nats" ] && "$bin/pg_isready" -q -h "$directory/socket" -U tabularium; then
            export TABULARIUM_TEST_POSTGRES_URL="postgres://tabularium@localhost/postgres?host=$directory/socket"
            export TABULARIUM_TEST_NATS_URL="$nats"
            return 0
        fi
        sleep 0.1
    done
    echo "the test servers did not start (try $try):" >&2
    cat "$directory"/*.log >&2
    return 70
}

# Stops what start_test_servers started.
stop_test_servers() {
    local directory=$1 name
    for name in postgres nats; do
        [ -f "$directory/$name.pid" ] && kill -INT "$(cat "$directory/$name.pid")" 2>/dev/null
    done
    wait 2>/dev/null || true
}
