"""Listens, says who it is to each client, and stops on SIGTERM when nobody has come for a while.

greeter.py NAME ADDRESS [PORT]
"""
import os, signal, socket, sys

name, address, port = sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 0
family = socket.AF_INET6 if ":" in address else socket.AF_INET
listener = socket.create_server((address, port), family=family, backlog=1024, dualstack_ipv6=address == "::")
listener.settimeout(0.5)
is_ending = is_last_wait = False


def drain(*_):
    global is_ending
    is_ending = True


signal.signal(signal.SIGTERM, drain)
print(listener.getsockname()[1], listener.fileno(), flush=True)
while True:
    try:
        client, _ = listener.accept()
    except TimeoutError:
        # Whoever was in the middle of the handshake has been served too, if the whole wait came after the signal.
        if is_last_wait:
            sys.exit()
        is_last_wait = is_ending
        continue
    client.setblocking(True)
    client.sendall(f"{name} at {client.getsockname()[1]}\n".encode())
    client.close()
