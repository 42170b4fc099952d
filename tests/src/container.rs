//! Containers without a container engine: the image unpacked, and started by `crun` in a namespace of a test.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    host::{Outcome, wait_for},
    netns::Netns,
    prerequisites::{program, scratch},
};

/// What Kubernetes keeps from containers that are not privileged.
const MASKED: [&str; 9] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
];
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// The container image of the programs under test.
#[derive(Debug)]
pub struct Image {
    /// The file, of the form that `cargo xtask dist` makes.
    pub file: PathBuf,
    /// Its one entry in the index.
    pub entry: Value,
    /// How containers of it start.
    pub config: Value,
    /// The layers, unpacked.
    pub root: PathBuf,
    _directory: TempDir,
}

impl Image {
    /// Has the program `xtask` that stands beside the tests make it, and unpacks it.
    pub fn new() -> Self {
        let directory = scratch();
        let file = directory.path().join("image.tar");
        make_image(&file);
        let layout = directory.path().join("layout");
        unpack(&file, &layout);
        let index = read(&layout.join("index.json"));
        let entry = index["manifests"][0].clone();
        let manifest = read(&blob(&layout, &entry));
        let config = read(&blob(&layout, &manifest["config"]));
        let root = directory.path().join("root");
        for layer in manifest["layers"].as_array().expect("layers") {
            unpack(&blob(&layout, layer), &root);
        }
        Self { file, entry, config, root, _directory: directory }
    }
}

impl Default for Image {
    fn default() -> Self {
        Self::new()
    }
}

/// Makes an image of the programs under test at `file`.
pub fn make_image(file: &Path) {
    let [daemon, xtask] = ["anyportd", "xtask"].map(|name| program(name).unwrap_or_else(|missing| panic!("{missing}")));
    let mut make = Command::new(xtask);
    make.args(["image", "--programs"]).arg(daemon.parent().expect("its directory")).arg(file);
    let outcome = Outcome::of(make.env("CARGO_MANIFEST_DIR", concat!(env!("CARGO_MANIFEST_DIR"), "/../xtask")));
    assert!(outcome.status == 0, "{make:?}: {outcome}");
}

fn unpack(file: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a directory");
    let mut tar = Command::new("tar");
    let outcome = Outcome::of(tar.arg("--extract").arg("--file").arg(file).arg("--directory").arg(to));
    assert!(outcome.status == 0, "{tar:?}: {outcome}");
}

fn read(file: &Path) -> Value {
    let text = fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

/// The file of what a descriptor describes: rightly, by its length and digest.
fn blob(layout: &Path, descriptor: &Value) -> PathBuf {
    let digest = descriptor["digest"].as_str().and_then(|it| it.strip_prefix("sha256:")).expect("a digest");
    let file = layout.join("blobs/sha256").join(digest);
    assert_eq!(fs::metadata(&file).map(|it| it.len()).ok(), descriptor["size"].as_u64(), "{descriptor}");
    let summed = Outcome::of(Command::new("sha256sum").arg(&file)).stdout;
    assert!(summed.starts_with(digest), "{descriptor}: {summed}");
    file
}

/// What of the host a container sees, and where.
#[derive(Clone, Debug)]
pub struct Mount {
    /// On the host.
    pub from: PathBuf,
    /// In the container.
    pub to: String,
    /// Whether it may be looked at only.
    pub is_read_only: bool,
}

/// A container that runs, with the network of a namespace. It ends when this is dropped.
#[derive(Debug)]
pub struct Container {
    namespace: Netns,
    directory: TempDir,
    process: Value,
    runtime: Child,
}

impl Container {
    /// Starts one. `process` is that of the OCI's runtime specification.
    pub fn start(namespace: &Netns, image: &Image, process: Value, mounts: &[Mount]) -> Self {
        let directory = scratch();
        let config = json!({
            "ociVersion": "1.0.0",
            "process": process,
            "root": {"path": image.root, "readonly": true},
            "mounts": all_mounts(mounts),
            "linux": {
                // That of the network is the host's.
                "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}],
                "maskedPaths": MASKED,
                "readonlyPaths": READ_ONLY,
            },
        });
        fs::write(directory.path().join("config.json"), config.to_string()).expect("a bundle");
        let log = File::create(directory.path().join("log")).expect("a log");
        let mut run = crun(&directory, &["run", "--bundle"]);
        run.arg(directory.path()).arg(NAME).stdin(Stdio::null());
        run.stdout(log.try_clone().expect("a second descriptor of the log")).stderr(log);
        let runtime = namespace.spawn(run);
        Self { namespace: namespace.clone(), directory, process, runtime }
    }

    /// Runs a command in it, as `kubectl exec` does.
    pub fn exec(&self, command: &[&str]) -> Outcome {
        let mut process = self.process.clone();
        process["args"] = json!(command);
        let file = tempfile::NamedTempFile::new_in(self.directory.path()).expect("a file");
        fs::write(file.path(), process.to_string()).expect("a process");
        let mut exec = crun(&self.directory, &["exec", "--process"]);
        self.namespace.output(exec.arg(file.path()).arg(NAME))
    }

    /// What it has written so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).expect("a log")
    }

    /// Its exit status, if it has ended.
    pub fn status(&mut self) -> Option<i32> {
        let status = self.runtime.try_wait().expect("the state of crun")?;
        Some(status.code().unwrap_or(-1))
    }

    /// Sends it a signal, upon which it must end within `limit`; its exit status.
    pub fn end(&mut self, signal: &str, limit: Duration) -> i32 {
        let mut kill = crun(&self.directory, &["kill", NAME, signal]);
        let outcome = Outcome::of(&mut kill);
        assert!(outcome.status == 0, "{kill:?}: {outcome}");
        wait_for("end of the container", limit, || self.status().ok_or_else(|| self.log()))
    }
}

/// `crun` keeps its containers apart by directory.
const NAME: &str = "anyport";

fn all_mounts(mounts: &[Mount]) -> Vec<Value> {
    let mut all = vec![
        json!({"destination": "/proc", "type": "proc", "source": "proc"}),
        json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]}),
        json!({"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro", "nosuid", "noexec", "nodev"]}),
    ];
    all.extend(mounts.iter().map(|Mount { from, to, is_read_only }| {
        let mode = if *is_read_only { "ro" } else { "rw" };
        json!({"destination": to, "type": "bind", "source": from, "options": ["rbind", mode]})
    }));
    all
}

/// `crun`, without control groups. It wants the newer hierarchy of them to be there, beside the older one or alone.
fn crun(directory: &TempDir, arguments: &[&str]) -> Command {
    const SCRIPT: &str = "mount -t cgroup2 cgroup2 /sys/fs/cgroup 2>/dev/null; exec crun \"$@\"";
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", "unshare", "--mount", "sh", "-c", SCRIPT, "crun"]);
    command.arg("--root").arg(directory.path().join("crun")).arg("--cgroup-manager=disabled").args(arguments);
    command
}

impl Drop for Container {
    fn drop(&mut self) {
        if std::thread::panicking() {
            complain(&self.log());
        }
        // It may have ended.
        let delete = crun(&self.directory, &["delete", "--force", NAME]).stderr(Stdio::null()).status();
        drop((delete, self.runtime.kill(), self.runtime.wait()));
    }
}

#[expect(clippy::print_stderr, reason = "the log explains the panic that is under way")]
fn complain(log: &str) {
    eprintln!("log of the container:\n{log}");
}
