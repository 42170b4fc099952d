"""Passes sockets whose last close lasts SECONDS, as a user without privileges, through one of the daemon's doors: DOOR PATH SECONDS TIMES."""
import encodings.idna, json, os, socket, struct, sys

door, path, seconds, times = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
os.setgroups([])
os.setresgid(65533, 65533, 65533)
os.setresuid(65533, 65533, 65533)
kept = []


def slow():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        kept.append(listener.accept()[0])
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, seconds))
    client.setblocking(False)
    try:
        while True:
            client.send(bytes(65536))
    except BlockingIOError:
        return client


def nested():
    """A Unix socket in whose queue such a socket is."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with slow() as inner:
        socket.send_fds(near, [b"x"], [inner.fileno()])
    near.close()
    return far


def connect(kind, address):
    connection = socket.socket(socket.AF_UNIX, kind)
    connection.settimeout(5)
    connection.connect(address)
    return connection


def send(connection, text, passed):
    try:
        socket.send_fds(connection, [text], [passed.fileno()])
    except OSError as error:
        # From Linux 6.16 on. Nobody but this process would wait for the close then.
        print("refused", error, file=sys.stderr)
        passed.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
    passed.close()


for _ in range(times):
    if door == "control":
        connection = connect(socket.SOCK_STREAM, path)
        send(connection, b"GET /v1/status HTTP/1.1\r\nHost: anyport\r\n\r\n", slow())
    elif door == "register":
        connection = connect(socket.SOCK_SEQPACKET, path)
        send(connection, b'{"register":{"service":"web"}}', slow())
    elif door == "nested":
        connection = connect(socket.SOCK_SEQPACKET, path)
        send(connection, b"{}", nested())
    elif door == "unread":
        # What stays in the queue of a connection that is over after its first message.
        connection = connect(socket.SOCK_SEQPACKET, path)
        connection.send(b"nonsense")
        send(connection, b"more", slow())
    elif door == "lock":
        connection = connect(socket.SOCK_STREAM, "\0anyportd")
        send(connection, b"x", slow())
    elif door == "answers":
        connection = connect(socket.SOCK_SEQPACKET, path)
        connection.send(json.dumps({"answer": {"service": "names"}}).encode())
        assert json.loads(connection.recv(16384))["status"] == 200
        send(connection, b"192.0.2.1:53 198.51.100.1:9\n", slow())
        kept.append(connection)
print("passed", flush=True)
sys.stdin.read()
