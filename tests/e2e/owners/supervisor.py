"""Opens a socket and passes it to a command as systemd does, then serves one client after the other.

supervisor.py COMMAND…
"""
import os, socket, subprocess, sys

FIRST = 3
listener = socket.create_server(("127.0.0.1", 0))


def settle():
    os.dup2(listener.fileno(), FIRST)
    os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))


done = subprocess.run(sys.argv[1:], preexec_fn=settle, pass_fds=[FIRST], capture_output=True, text=True)
print(done.returncode, done.stderr, flush=True)
while True:
    client, _ = listener.accept()
    client.sendall(b"supervisor\n")
    client.close()
