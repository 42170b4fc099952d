//! etcd: one member, or several that can be killed, frozen, compacted and restored.

use std::{
    ffi::OsStr,
    fs::{self, File},
    net::IpAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::{
    daemon::stop_threads,
    etcdctl::Etcdctl,
    host::{Outcome, wait_for},
    netns::Netns,
    prerequisites::scratch,
};

const CLIENTS: u16 = 2379;
const PEERS: u16 = 2380;
/// Milliseconds; an election soon follows the death of a leader, and a busy machine does not cause one.
const HEARTBEAT: &str = "100";
const ELECTION: &str = "1000";

/// A cluster with its data in a directory of its own. Killed when dropped.
#[derive(Debug)]
pub struct Etcd {
    members: Vec<Member>,
    directory: tempfile::TempDir,
    /// Options for every member.
    options: Vec<String>,
    /// Options of `etcdctl`.
    client_options: Vec<String>,
    scheme: &'static str,
}

#[derive(Debug)]
struct Member {
    namespace: Netns,
    address: IpAddr,
    process: Option<Child>,
}

impl Etcd {
    /// One member on the loopback address of a namespace.
    pub fn alone(namespace: &Netns) -> Self {
        Self::start(&[(namespace.clone(), IpAddr::from([127, 0, 0, 1]))])
    }

    /// The same with further options of the server.
    pub fn with_options(namespace: &Netns, options: &[&str]) -> Self {
        Self::launch(&[(namespace.clone(), IpAddr::from([127, 0, 0, 1]))], "http", options, &[])
    }

    /// Three members on loopback addresses of a namespace.
    pub fn three(namespace: &Netns) -> Self {
        let members = [1, 2, 3].map(|last| (namespace.clone(), IpAddr::from([127, 0, 0, last])));
        Self::start(&members)
    }

    /// The same with their files in a directory of their own in this one.
    pub fn three_in(namespace: &Netns, directory: &Path) -> Self {
        let members = [1, 2, 3].map(|last| (namespace.clone(), IpAddr::from([127, 0, 0, last])));
        let own = tempfile::Builder::new().prefix("anyport-etcd-").tempdir_in(directory).expect("a directory for etcd");
        Self::launch_in(own, &members, "http", &[], &[])
    }

    /// Members at addresses by which they and their clients reach each other.
    pub fn start(members: &[(Netns, IpAddr)]) -> Self {
        Self::launch(members, "http", &[], &[])
    }

    /// One member that uses TLS only, with options of the server and of `etcdctl` that say with which certificates.
    pub fn secured(namespace: &Netns, options: &[&str], client_options: &[&str]) -> Self {
        let member = (namespace.clone(), IpAddr::from([127, 0, 0, 1]));
        Self::launch(&[member], "https", options, client_options)
    }

    fn launch(members: &[(Netns, IpAddr)], scheme: &'static str, options: &[&str], client_options: &[&str]) -> Self {
        Self::launch_in(scratch(), members, scheme, options, client_options)
    }

    fn launch_in(
        directory: tempfile::TempDir,
        members: &[(Netns, IpAddr)],
        scheme: &'static str,
        options: &[&str],
        client_options: &[&str],
    ) -> Self {
        let member = |(namespace, address): &(Netns, IpAddr)| Member {
            namespace: namespace.clone(),
            address: *address,
            process: None,
        };
        let owned = |options: &[&str]| options.iter().map(|it| (*it).to_owned()).collect();
        let mut cluster = Self {
            members: members.iter().map(member).collect(),
            directory,
            options: owned(options),
            client_options: owned(client_options),
            scheme,
        };
        cluster.start_all();
        cluster
    }

    /// The members' URLs for clients, as `--etcd` takes them.
    pub fn urls(&self) -> String {
        let urls: Vec<String> = (0..self.members.len()).map(|member| self.url(member)).collect();
        urls.join(",")
    }

    /// How many members there are.
    pub fn size(&self) -> usize {
        self.members.len()
    }

    /// The process of a member that runs.
    pub fn process(&self, member: usize) -> Pid {
        let id = self.members[member].process.as_ref().expect("a member that runs").id();
        Pid::from_raw(id.try_into().expect("a process id"))
    }

    /// The URL of one member.
    pub fn url(&self, member: usize) -> String {
        format!("{}://{}", self.scheme, self.at(member, CLIENTS))
    }

    /// Runs `etcdctl`, which must succeed, with arguments split at blanks.
    pub fn ctl(&self, arguments: &str) -> String {
        let outcome = self.client().run(arguments.split_whitespace());
        assert!(outcome.status == 0, "etcdctl {arguments} failed: {outcome}");
        outcome.stdout
    }

    /// `etcdctl` that asks any of the members, to be used without the cluster.
    pub fn client(&self) -> Etcdctl {
        self.client_in(0, self.urls())
    }

    fn client_of(&self, member: usize) -> Etcdctl {
        self.client_in(member, self.url(member))
    }

    fn client_in(&self, member: usize, endpoints: String) -> Etcdctl {
        let (namespace, options) = (self.members[member].namespace.clone(), self.client_options.clone());
        Etcdctl { namespace, endpoints, options }
    }

    /// Writes a key.
    pub fn put(&self, key: &str, value: &str) {
        let outcome = self.client().run(["put", "--", key, value]);
        assert!(outcome.status == 0, "etcdctl put {key} failed: {outcome}");
    }

    /// The JSON under a key; null if there is none.
    pub fn record(&self, key: &str) -> Value {
        let text = self.ctl(&format!("get --print-value-only {key}"));
        if text.trim().is_empty() {
            return Value::Null;
        }
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{key} has {text:?}: {error}"))
    }

    /// The keys that begin so.
    pub fn keys(&self, prefix: &str) -> Vec<String> {
        let text = self.ctl(&format!("get --prefix --keys-only {prefix}"));
        text.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect()
    }

    /// The revision that the cluster is at.
    pub fn revision(&self) -> u64 {
        let text = self.ctl("get --write-out=json no-such-key");
        let answer: Value = serde_json::from_str(&text).expect("JSON of etcdctl");
        answer["header"]["revision"].as_u64().expect("a revision")
    }

    /// Forgets everything up to now but what each key has.
    pub fn compact(&self) {
        self.ctl(&format!("compact {}", self.revision()));
    }

    /// The member that leads, once there is one.
    pub fn leader(&self) -> usize {
        wait_for("leader", Duration::from_secs(20), || {
            (0..self.members.len()).find(|member| self.leads(*member)).ok_or_else(|| "nobody leads".to_owned())
        })
    }

    /// Whether a member takes itself for the leader, which it may for a while after the others have another one.
    pub fn leads(&self, member: usize) -> bool {
        if self.members[member].process.is_none() {
            return false;
        }
        let outcome = self.client_of(member).run(["--command-timeout=2s", "endpoint", "status", "--write-out=json"]);
        let status: Value = serde_json::from_str(&outcome.stdout).unwrap_or_default();
        let status = &status[0]["Status"];
        status["leader"].is_u64() && status["leader"] == status["header"]["member_id"]
    }

    /// Ends a member at once.
    pub fn kill(&mut self, member: usize) {
        if let Some(mut process) = self.members[member].process.take() {
            process.kill().expect("a member to kill");
            process.wait().expect("its end");
        }
    }

    /// Ends all members at once.
    pub fn kill_all(&mut self) {
        (0..self.members.len()).for_each(|member| self.kill(member));
    }

    /// Starts a member again that was killed, with what it has on disk.
    pub fn restart(&mut self, member: usize) {
        self.spawn(member);
        self.wait_for_health(member);
    }

    /// Starts a member again that was killed, and waits for nothing: it can't serve before there is a majority.
    pub fn start_again(&mut self, member: usize) {
        self.spawn(member);
    }

    /// Starts all members that were killed, and waits until they serve.
    pub fn start_all(&mut self) {
        let dead: Vec<usize> = (0..self.members.len()).filter(|it| self.members[*it].process.is_none()).collect();
        for member in &dead {
            self.spawn(*member);
        }
        for member in dead {
            self.wait_for_health(member);
        }
    }

    /// Has a member do nothing, though its connections stay.
    pub fn freeze(&self, member: usize) {
        stop_threads(self.process(member));
    }

    /// Has it go on.
    pub fn thaw(&self, member: usize) {
        kill(self.process(member), Signal::SIGCONT).expect("a member to thaw");
    }

    /// Has a member and the others hear nothing of each other any more, while all of them hear their clients. Each has to be in
    /// a namespace of its own.
    pub fn part(&self, member: usize) {
        let Member { namespace, address, .. } = &self.members[member];
        assert!(!address.is_loopback(), "a member that is parted from the others has a namespace of its own");
        let chains = ["input", "output"].map(|hook| {
            let chain = format!("chain {hook} {{ type filter hook {hook} priority 0;");
            format!("{chain} tcp dport {PEERS} drop; tcp sport {PEERS} drop; }};")
        });
        namespace.run("nft", [format!("table inet parted {{ {} }}", chains.concat())]);
    }

    /// Has it hear the others again, and they it.
    pub fn rejoin(&self, member: usize) {
        self.members[member].namespace.run("nft", ["delete table inet parted"]);
    }

    /// Writes all that there is to a file, which lives as long as the cluster.
    pub fn backup(&self, name: &str) -> PathBuf {
        let file = self.directory.path().join(name);
        let outcome = self.client_of(0).run([OsStr::new("snapshot"), "save".as_ref(), file.as_os_str()]);
        assert!(outcome.status == 0, "etcdctl snapshot save failed: {outcome}");
        file
    }

    /// Puts a new cluster with what a backup has in the place of this one.
    pub fn restore(&mut self, backup: &Path) {
        self.kill_all();
        for member in 0..self.members.len() {
            self.remove_data(member);
            let mut command = Command::new("etcdctl");
            command.env("ETCDCTL_API", "3").args(["snapshot", "restore"]).arg(backup);
            command.args(["--name", &name(member), "--initial-cluster", &self.initial()]);
            command.args(["--initial-advertise-peer-urls", &self.peer(member), "--data-dir"]).arg(self.data(member));
            let outcome = Outcome::of(&mut command);
            assert!(outcome.status == 0, "etcdctl snapshot restore failed: {outcome}");
        }
        self.start_all();
    }

    /// Puts an empty cluster in the place of this one.
    pub fn wipe(&mut self) {
        self.kill_all();
        (0..self.members.len()).for_each(|member| self.remove_data(member));
        self.start_all();
    }

    fn spawn(&mut self, member: usize) {
        let data = self.data(member);
        let log = File::options().create(true).append(true).open(data.with_extension("log")).expect("a log file");
        let clients = self.url(member);
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "etcd", "--name", &name(member), "--data-dir"]).arg(data);
        command.args(["--listen-client-urls", &clients, "--advertise-client-urls", &clients]);
        command.args(["--listen-peer-urls", &self.peer(member), "--initial-advertise-peer-urls", &self.peer(member)]);
        command.args(["--initial-cluster", &self.initial(), "--heartbeat-interval", HEARTBEAT]);
        command.args(["--election-timeout", ELECTION, "--log-outputs", "stderr"]).args(&self.options);
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a second descriptor")).stderr(log);
        let process = self.members[member].namespace.spawn(command);
        self.members[member].process = Some(process);
    }

    /// Waits until every member serves.
    pub fn wait_until_well(&self) {
        (0..self.members.len()).for_each(|member| self.wait_for_health(member));
    }

    fn wait_for_health(&self, member: usize) {
        wait_for("health of etcd", Duration::from_secs(30), || {
            let outcome = self.client_of(member).run(["--command-timeout=2s", "endpoint", "health"]);
            // A client that may not look at a key has been answered, too.
            if outcome.status == 0 {
                return Ok(());
            }
            sleep(Duration::from_millis(50));
            Err(format!("{outcome}\n{}", self.log(member)))
        });
    }

    fn log(&self, member: usize) -> String {
        let log = fs::read(self.data(member).with_extension("log")).unwrap_or_default();
        let text = String::from_utf8_lossy(&log);
        let end: Vec<&str> = text.lines().rev().take(5).collect();
        end.join("\n")
    }

    fn remove_data(&self, member: usize) {
        fs::remove_dir_all(self.data(member)).expect("data of etcd");
    }

    fn data(&self, member: usize) -> PathBuf {
        self.directory.path().join(name(member))
    }

    fn at(&self, member: usize, port: u16) -> String {
        std::net::SocketAddr::new(self.members[member].address, port).to_string()
    }

    fn peer(&self, member: usize) -> String {
        format!("http://{}", self.at(member, PEERS))
    }

    fn initial(&self) -> String {
        let all = (0..self.members.len()).map(|member| format!("{}={}", name(member), self.peer(member)));
        all.collect::<Vec<_>>().join(",")
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill_all();
    }
}

fn name(member: usize) -> String {
    format!("m{member}")
}
