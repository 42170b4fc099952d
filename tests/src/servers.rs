//! `HAProxy` and nginx, each with a configuration of its own.

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{netns::Netns, prerequisites::scratch};

/// A running server. Ended when dropped.
#[derive(Debug)]
pub struct Server {
    process: Child,
    _directory: tempfile::TempDir,
}

impl Server {
    /// `HAProxy` with these sections behind the usual time limits.
    pub fn haproxy(namespace: &Netns, sections: &str) -> Self {
        let config =
            format!("defaults\n  timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n{sections}\n");
        Self::start(namespace, &config, |file, command| {
            command.args(["haproxy", "-db", "-q", "-f"]).arg(file);
        })
    }

    /// nginx with these lines in its `stream` block.
    pub fn nginx(namespace: &Netns, stream: &str) -> Self {
        // Debian has the module apart, elsewhere it is built in.
        const MODULE: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";
        let module = if Path::new(MODULE).exists() { format!("load_module {MODULE};") } else { String::new() };
        let config = format!(
            "{module}\ndaemon off;\nmaster_process off;\npid nginx.pid;\nerror_log stderr;\nevents {{}}\n\
             stream {{\n{stream}\n}}\n"
        );
        Self::start(namespace, &config, |file, command| {
            command.args(["nginx", "-e", "stderr", "-p"]).arg(file.parent().expect("a directory")).arg("-c").arg(file);
        })
    }

    /// nginx as a web server with these lines in its `http` block, its workers beside it.
    pub fn nginx_http(namespace: &Netns, http: &str) -> Self {
        let config = format!(
            "daemon off;\nuser root;\nworker_processes 2;\npid nginx.pid;\nerror_log stderr;\nevents {{}}\n\
             http {{\naccess_log off;\n{http}\n}}\n"
        );
        Self::start(namespace, &config, |file, command| {
            command.args(["nginx", "-e", "stderr", "-p"]).arg(file.parent().expect("a directory")).arg("-c").arg(file);
        })
    }

    /// Its process; of nginx the master.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.process.id().try_into().expect("a process id"))
    }

    fn start(namespace: &Netns, config: &str, arguments: impl FnOnce(&Path, &mut Command)) -> Self {
        let directory = scratch();
        let file = directory.path().join("config");
        fs::write(&file, config).expect("a configuration");
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]);
        arguments(&file, &mut command);
        command.stdin(Stdio::null());
        Self { process: namespace.spawn(command), _directory: directory }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Killed, nginx would leave its workers behind.
        kill(self.pid(), Signal::SIGTERM).ok();
        drop(self.process.wait());
    }
}
