//! The container image, started by `crun` with what the manifests for Kubernetes give it, and no more.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::LazyLock,
    time::Duration,
};

use anyport_tests::{
    container::{Container, Image, Mount, make_image},
    dial::{expect_tcp_hello, tcp_server, tcp_text, udp},
    host::{Outcome, wait_for},
    netns::Netns,
    prerequisites::{BPFFS, scratch},
    topology::Topology,
};
use k8s_openapi::api::core::v1::{Probe, Volume};
use libtest_mimic::Trial;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    cases::{at, trial},
    kubernetes::Manifests,
};

/// How long a daemon may take to start.
const LIMIT: Duration = Duration::from_secs(20);
const ADD: [&str; 5] = ["anyportctl", "add-prefix", "198.51.100.64/26", "--protocol", "both"];

static IMAGE: LazyLock<Image> = LazyLock::new(Image::new);

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("container::the image is what the manifests name", image),
        trial("container::the same programs make the same image", reproducible),
        trial("container::what the manifests give suffices", suffices),
        trial("container::each capability taken away is named", taken_away),
    ]
}

fn image() {
    let manifests = Manifests::read();
    let container = manifests.container();
    let annotations = &IMAGE.entry["annotations"];
    for name in ["org.opencontainers.image.ref.name", "io.containerd.image.name"] {
        assert_eq!(annotations[name].as_str(), container.image.as_deref());
    }
    let config = &IMAGE.config["config"];
    assert_eq!(config["Entrypoint"], json!(container.command));
    let context = container.security_context.as_ref().expect("a security context");
    let user = format!("{}:{}", context.run_as_user.expect("a user"), context.run_as_group.expect("a group"));
    assert_eq!(config["User"], user);
    assert_eq!(config["ExposedPorts"], Value::Null);
    for directory in container.volume_mounts.iter().flatten().map(|it| it.mount_path.trim_start_matches('/')) {
        assert!(IMAGE.root.join(directory).is_dir(), "{directory} can be mounted in a root that is read-only");
    }
    for directory in config["Volumes"].as_object().expect("volumes").keys() {
        assert!(container.volume_mounts.iter().flatten().any(|it| &it.mount_path == directory), "{directory}");
    }
}

fn reproducible() {
    let again = scratch();
    let file = again.path().join("image.tar");
    make_image(&file);
    let outcome = Outcome::of(Command::new("cmp").arg(&file).arg(&IMAGE.file));
    assert!(outcome.status == 0, "{outcome}");
    let mut list = Command::new("tar");
    let listed = Outcome::of(list.args(["--list", "--verbose", "--numeric-owner", "--file"]).arg(&file)).stdout;
    assert!(listed.lines().all(|line| line.contains(" 0/0 ")), "{listed}");
}

/// A node: its network, and its directories that the manifests mount.
struct Node {
    topology: Topology,
    manifests: Manifests,
    directory: TempDir,
    pins: PathBuf,
}

impl Node {
    fn new() -> Self {
        let directory = scratch();
        let pins = Path::new(BPFFS).join(directory.path().file_name().expect("a name"));
        Self { topology: Topology::new(), manifests: Manifests::read(), directory, pins }
    }

    /// Starts the container of the pod with these of its capabilities.
    fn start(&self, capabilities: &[String]) -> Container {
        let container = self.manifests.container();
        let context = container.security_context.as_ref().expect("a security context");
        let own = container.env.iter().flatten().map(|it| format!("{}={}", it.name, it.value.as_deref().unwrap_or("")));
        let environment: Vec<String> = strings(&IMAGE.config["config"]["Env"]).into_iter().chain(own).collect();
        let arguments = [&container.command, &container.args].map(|it| it.clone().expect("arguments")).concat();
        let names: Vec<String> = capabilities.iter().map(|name| format!("CAP_{name}")).collect();
        let process = json!({
            "terminal": false,
            "user": {"uid": context.run_as_user, "gid": context.run_as_group},
            "args": arguments,
            "env": environment,
            "cwd": "/",
            "capabilities": {"bounding": names, "effective": names, "permitted": names},
            "noNewPrivileges": context.allow_privilege_escalation == Some(false),
        });
        Container::start(&self.topology.host, &IMAGE, process, &self.mounts())
    }

    fn mounts(&self) -> Vec<Mount> {
        let pod = self.manifests.pod();
        let mount = |mount: &k8s_openapi::api::core::v1::VolumeMount| {
            let volume = pod.volumes.iter().flatten().find(|it| it.name == mount.name).expect("its volume");
            let is_read_only = mount.read_only == Some(true);
            Mount { from: self.make(volume), to: mount.mount_path.clone(), is_read_only }
        };
        self.manifests.container().volume_mounts.iter().flatten().map(mount).collect()
    }

    /// The directory of a volume, which is made if need be.
    fn make(&self, volume: &Volume) -> PathBuf {
        let directory = match &volume.host_path {
            Some(host) if host.path.starts_with(BPFFS) => self.pins.clone(),
            Some(host) => self.directory.path().join(host.path.trim_start_matches('/')),
            None => self.directory.path().join("config"),
        };
        fs::create_dir_all(&directory).expect("a directory");
        if volume.config_map.is_some() {
            for (name, text) in self.manifests.config.data.iter().flatten() {
                fs::write(directory.join(name), text).expect("a configuration");
            }
        }
        directory
    }

    /// Whether a probe of the manifests succeeds, as the node's kubelet asks.
    fn passes(&self, probe: &Probe) -> bool {
        let http = probe.http_get.as_ref().expect("a probe by HTTP");
        let (host, path) = (http.host.as_deref().expect("a host"), http.path.as_deref().expect("a path"));
        let port = serde_json::to_value(&http.port).expect("a port");
        let url = format!("http://{host}:{port}{path}");
        self.topology.host.output(Command::new("curl").args(["--silent", "--fail", &url])).status == 0
    }

    /// Waits until both probes succeed.
    fn wait_until_ready(&self, container: &mut Container) {
        let spec = self.manifests.container();
        for probe in [&spec.liveness_probe, &spec.readiness_probe].map(|it| it.as_ref().expect("a probe")) {
            wait_for("probe that succeeds", LIMIT, || {
                if self.passes(probe) {
                    return Ok(());
                }
                assert!(container.status().is_none(), "it has ended:\n{}", container.log());
                Err(container.log())
            });
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Pins would keep maps and programs.
        drop(fs::remove_dir_all(&self.pins));
    }
}

fn strings(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
}

/// With what is configured, what is added by `kubectl exec`, and a pod that takes over from one that was killed.
fn suffices() {
    let node = Node::new();
    node.topology.host.enter(|| tcp_server(at("127.0.0.1", 8080), "upstream"));
    let capabilities = node.manifests.capabilities();
    let mut container = node.start(&capabilities);
    node.wait_until_ready(&mut container);
    let outcome = container.exec(&ADD);
    assert!(outcome.status == 0, "{outcome}");
    dial(&node.topology.client);
    container.end("KILL", LIMIT);
    let pins = fs::read_dir(&node.pins).expect("the directory of pins").count();
    assert!(pins > 0, "what is steered outlives the container");
    drop(container);
    let mut container = node.start(&capabilities);
    node.wait_until_ready(&mut container);
    dial(&node.topology.client);
    let outcome = container.exec(&["anyportctl", "status", "--exit-code"]);
    assert!(outcome.status == 0, "{outcome}");
    let grace = node.manifests.pod().termination_grace_period_seconds.expect("a time").unsigned_abs();
    assert_eq!(container.end("TERM", Duration::from_secs(grace)), 0, "{}", container.log());
    assert_eq!(fs::read_dir(&node.pins).map_or(0, Iterator::count), 0, "pins are left");
    let routes = node.topology.host.ip("route show table local proto 165");
    assert!(routes.is_empty(), "{routes}");
}

fn dial(client: &Netns) {
    client.enter(|| {
        assert_eq!(tcp_text(at("192.0.2.7", 31_337)).ok().as_deref(), Some("upstream"));
        expect_tcp_hello(at("198.51.100.77", 31_337));
        assert!(udp(at("198.51.100.77", 53), b"who?").is_ok());
    });
}

/// What can't start says what it lacks, and what serves says it when it is in need of it.
fn taken_away() {
    let all = Manifests::read().capabilities();
    for missing in &all {
        let node = Node::new();
        let rest: Vec<String> = all.iter().filter(|it| *it != missing).cloned().collect();
        let mut container = node.start(&rest);
        if ["NET_RAW", "NET_BIND_SERVICE"].contains(&missing.as_str()) {
            node.wait_until_ready(&mut container);
            assert_eq!(container.exec(&ADD).status, 0, "{}", container.log());
            node.topology.client.enter(|| udp(at("198.51.100.77", 53), b"who?").expect_err("an answer"));
        } else {
            let status = wait_for("end", LIMIT, || container.status().ok_or_else(|| container.log()));
            assert_ne!(status, 0, "without {missing}: {}", container.log());
        }
        let named = format!("CAP_{missing}");
        wait_for("complaint", LIMIT, || container.log().contains(&named).then_some(()).ok_or_else(|| container.log()));
    }
}
