//! A program that is a service: it greets clients over TCP and UDP and names their original destination. It needs no privileges.
//!
//! ```console
//! $ anyportctl add-service greeter --handler registered --owner user:nobody
//! $ anyportctl add-prefix 192.0.2.0/24 2001:db8::/64 --protocol both --service greeter
//! $ cargo build --package anyport-userspace --no-default-features --example service
//! $ setpriv --reuid nobody --regid nogroup --clear-groups target/debug/examples/service greeter
//! ```
//!
//! Start another one and send SIGTERM to the first: no client is refused.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "this is a program for terminals")]

use std::{
    env,
    error::Error,
    io::{self, Write as _},
    process, thread,
};

use anyport::{Accepted, Datagram, Listener, Registration, UdpSocket};
use nix::sys::signal::{SigSet, Signal};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = env::args().skip(1);
    let mut registration = Registration::new(&arguments.next().ok_or("usage: service NAME [REGISTER-SOCKET]")?)?;
    if let Some(path) = arguments.next() {
        registration = registration.at(path);
    }
    let mut end = SigSet::empty();
    end.add(Signal::SIGTERM);
    // Before there are other threads, which inherit it.
    end.thread_block()?;

    let (listener, socket) = (registration.listener()?, registration.udp_socket()?);
    println!("ready, pid {}", process::id());
    thread::scope(|scope| {
        scope.spawn(|| report(greet_connections(&listener)));
        scope.spawn(|| report(greet_datagrams(&socket)));
        // By then another process has registered, so this one serves only the clients that it has.
        end.wait()?;
        listener.drain();
        socket.drain();
        Ok(())
    })
}

fn greet_connections(listener: &Listener) -> io::Result<()> {
    while let Some(Accepted { mut stream, client, dialled }) = listener.accept()? {
        let pid = process::id();
        // One client's trouble is not ours. A real server would serve them side by side.
        writeln!(stream, "hello {client}, you reached {dialled} over tcp at process {pid}").ok();
    }
    Ok(())
}

fn greet_datagrams(socket: &UdpSocket) -> io::Result<()> {
    let mut buffer = vec![0; UdpSocket::LARGEST];
    while let Some(Datagram { ends, .. }) = socket.recv(&mut buffer)? {
        let greeting =
            format!("hello {}, you reached {} over udp at process {}\n", ends.client, ends.dialled, process::id());
        // Answers get lost, as datagrams do.
        report(socket.reply(ends, greeting.as_bytes()));
    }
    Ok(())
}

fn report(outcome: io::Result<()>) {
    if let Err(error) = outcome {
        eprintln!("{error}");
    }
}
