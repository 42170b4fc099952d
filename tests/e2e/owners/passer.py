"""Opens a socket, passes it to anyportd itself, prints the answer, and serves one client after the other.

passer.py REGISTER-SOCKET SERVICE[:PID] [UID GROUP]: for that process, and as that user, without privileges, if there is one
"""
import json, os, socket, sys

if len(sys.argv) > 3:
    uid, group = map(int, sys.argv[3:])
    os.setgroups([group])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
service, _, pid = sys.argv[2].partition(":")
request = {"service": service} | ({"pid": int(pid)} if pid else {})
listener = socket.create_server(("127.0.0.1", 0))
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as control:
    control.connect(sys.argv[1])
    socket.send_fds(control, [json.dumps({"register": request}).encode()], [listener.fileno()])
    print(control.recv(65536).decode(), flush=True)
while True:
    client, _ = listener.accept()
    client.sendall(b"passer\n")
    client.close()
