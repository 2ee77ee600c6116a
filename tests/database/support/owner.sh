# Owns a PostgreSQL server for as long as its own standard input is open. When a test ends in whatever way, killed
# included, the kernel closes the other end; then the server is stopped and its directory removed. A server's parent
# keeps its process id from being anybody else's until it has waited for it.
#
# sh owner.sh BIN DIRECTORY SETTING...
# Says the server's process id, or "failed" and why. Reads: stop (says "stopped"), start (says the process id).

bin=$1 directory=$2
shift 2
trap 'rm -rf "$directory"' EXIT
# Whoever is to read what is said here may be gone. That is no reason to go without the server.
trap '' PIPE

start() {
    "$bin/postgres" -D "$directory/data" "$@" </dev/null >>"$directory/log" 2>&1 &
    server=$!
    echo "$server"
}

# TERM ends a server that has not yet got as far as handling signals (QUIT, like any background process of a shell, it
# ignores until then). For any other it asks for patience with the clients, and QUIT for none: immediate shutdown, in
# which the server kills all of its processes and waits for them.
stop() {
    if [ -n "$server" ]; then
        kill -TERM "$server" 2>/dev/null
        kill -QUIT "$server" 2>/dev/null
        wait "$server"
        server=
    fi
}

if ! "$bin/initdb" -D "$directory/data" --username=postgres --auth=trust --encoding=UTF8 --locale=C --no-sync \
    </dev/null >"$directory/log" 2>&1; then
    echo failed
    cat "$directory/log"
    exit 1
fi
start "$@"
while read -r command; do
    case $command in
    stop) stop && echo stopped ;;
    start) start "$@" ;;
    esac
done
stop
