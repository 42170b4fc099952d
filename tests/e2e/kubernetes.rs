//! The manifests for Kubernetes: every key is one that the API knows, and the daemon works with what they give it.

use std::{
    collections::BTreeSet,
    fs,
    process::Command,
    thread::sleep,
    time::{Duration, Instant},
};

use anyport_tests::{
    daemon::Setup,
    dial::{tcp_text, udp},
    host::Outcome,
    prerequisites::{program, scratch},
    topology::Topology,
};
use k8s_openapi::{
    Resource,
    api::{
        apps::v1::DaemonSet,
        core::v1::{ConfigMap, Container, Namespace},
    },
};
use libtest_mimic::Trial;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::cases::{at, trial};

/// How long a daemon may take to start.
const LIMIT: Duration = Duration::from_secs(20);
const MANIFESTS: &str = include_str!("../../docs/kubernetes/anyport.yaml");

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("kubernetes::the manifests are what the API knows", schema),
        trial("kubernetes::mistakes are found", mistakes),
        trial("kubernetes::the configuration is right", configuration),
        trial("kubernetes::the capabilities suffice, and none is too many", capabilities),
    ]
}

fn documents(text: &str) -> Vec<Value> {
    serde_saphyr::from_multiple(text).expect("YAML")
}

/// The document of this kind, by the types of the API: unknown keys are errors, as are values of other types.
fn read<T: Resource + DeserializeOwned>(document: &Value) -> Result<T, String> {
    let head = [("apiVersion", T::API_VERSION), ("kind", T::KIND)];
    if let Some((key, expected)) = head.into_iter().find(|(key, expected)| document[key] != **expected) {
        return Err(format!("{key} is {}, and not {expected}", document[key]));
    }
    let mut unknown = BTreeSet::new();
    let read = serde_ignored::deserialize(document, |path| {
        unknown.insert(path.to_string());
    });
    if !unknown.is_empty() {
        return Err(format!("unknown keys: {unknown:?}"));
    }
    read.map_err(|error| error.to_string())
}

fn find<T: Resource + DeserializeOwned>(text: &str) -> Result<T, String> {
    let document = documents(text).into_iter().find(|it| it["kind"] == T::KIND);
    read(&document.ok_or_else(|| format!("there is no {}", T::KIND))?)
}

fn all(text: &str) -> Result<(Namespace, ConfigMap, DaemonSet), String> {
    Ok((find(text)?, find(text)?, find(text)?))
}

fn manifests() -> (Namespace, ConfigMap, DaemonSet) {
    all(MANIFESTS).unwrap_or_else(|error| panic!("{error}"))
}

fn container(daemon_set: &DaemonSet) -> &Container {
    let pod = daemon_set.spec.template.spec.as_ref().expect("a pod");
    &pod.containers[0]
}

/// What refers to something refers to what is there.
fn schema() {
    assert_eq!(documents(MANIFESTS).len(), 3);
    let (namespace, config, daemon_set) = manifests();
    assert_eq!(config.metadata.namespace, namespace.metadata.name);
    assert_eq!(daemon_set.metadata.namespace, namespace.metadata.name);
    let spec = &daemon_set.spec;
    let labels = spec.template.metadata.as_ref().and_then(|it| it.labels.as_ref()).expect("labels");
    assert_eq!(spec.selector.match_labels.as_ref(), Some(labels));
    let pod = spec.template.spec.as_ref().expect("a pod");
    let names = |names: Vec<&str>| names.into_iter().map(ToOwned::to_owned).collect::<BTreeSet<_>>();
    let volumes = pod.volumes.as_ref().expect("volumes");
    let mounts = container(&daemon_set).volume_mounts.as_ref().expect("mounts");
    assert_eq!(
        names(volumes.iter().map(|it| it.name.as_str()).collect()),
        names(mounts.iter().map(|it| it.name.as_str()).collect())
    );
    let map = volumes.iter().find_map(|it| it.config_map.as_ref()).expect("the volume of the configuration");
    assert_eq!(Some(&map.name), config.metadata.name.as_ref());
}

/// Each of them is refused, so what is not refused is right.
fn mistakes() {
    for (right, wrong, complaint) in [
        ("hostNetwork: true", "hostNetworks: true", "hostNetworks"),
        ("hostNetwork: true", "hostNetwork: \"yes\"", "invalid type"),
        ("          livenessProbe:", "          livenesProbe:", "livenesProbe"),
        ("failureThreshold: 3", "failureThreshold: 3s", "invalid type"),
        ("allowPrivilegeEscalation", "allowPrivilegesEscalation", "allowPrivilegesEscalation"),
        ("drop: [\"ALL\"]", "drop: ALL", "invalid type"),
        ("apiVersion: apps/v1", "apiVersion: extensions/v1beta1", "apiVersion is"),
        ("kind: DaemonSet", "kind: Daemonset", "there is no DaemonSet"),
        ("data:", "datas:", "datas"),
        ("type: DirectoryOrCreate", "typ: DirectoryOrCreate", "typ"),
    ] {
        assert!(MANIFESTS.contains(right), "{right}");
        let error = all(&MANIFESTS.replace(right, wrong)).map(|_| ()).expect_err(wrong);
        assert!(error.contains(complaint), "{wrong}: {error}");
    }
}

fn configuration() {
    let (_, config, _) = manifests();
    let text = config.data.expect("data").remove("anyport.toml").expect("the file");
    let directory = scratch();
    let file = directory.path().join("anyport.toml");
    fs::write(&file, text).expect("the configuration");
    let mut check = Command::new(program("anyportd").expect("the program"));
    let outcome = Outcome::of(check.arg("--check").arg("--config").arg(&file));
    assert!(outcome.status == 0, "{outcome}");
}

/// As root with these capabilities and no others, as a container has it; with each of them taken away it does not work.
fn capabilities() {
    let (_, _, daemon_set) = manifests();
    let context = container(&daemon_set).security_context.as_ref().expect("a security context");
    let capabilities = context.capabilities.as_ref().expect("capabilities");
    assert_eq!(capabilities.drop.as_deref(), Some(&["ALL".to_owned()][..]));
    let added: Vec<String> = capabilities.add.iter().flatten().map(|name| name.to_lowercase()).collect();
    assert!(works(&added), "it does not work with {added:?}");
    for missing in &added {
        let rest: Vec<String> = added.iter().filter(|it| *it != missing).cloned().collect();
        assert!(!works(&rest), "it works without {missing}");
    }
}

/// Whether a daemon starts in root's directories, becomes the user that the manifests name, and serves.
fn works(capabilities: &[String]) -> bool {
    let topology = Topology::new();
    let directory = scratch();
    let name = directory.path().file_name().expect("a name").to_string_lossy().into_owned();
    // The directory for sockets is the usual one, which is given to the user.
    let (socket, state) = (format!("/run/anyport/{name}.sock"), directory.path().join("state").display().to_string());
    let list: Vec<String> = capabilities.iter().map(|name| format!("+{name}")).collect();
    let bounding = format!("--bounding-set=-all,{}", list.join(","));
    let setup = Setup::new(&topology.host, "sk-lookup").through(["setpriv", &bounding, "--no-new-privs", "--"]);
    let mut daemon = setup.args(["--user", "64998:64998", "--socket", &socket, "--state-dir", &state]).launch();
    let ctl = |arguments: &[&str]| {
        let mut command = Command::new(program("anyportctl").expect("the client"));
        topology.host.output(command.args(arguments).args(["--socket", &socket])).status
    };
    let begin = Instant::now();
    while ctl(&["status"]) != 0 {
        if daemon.has_ended() {
            return false;
        }
        assert!(begin.elapsed() < LIMIT, "it neither answers nor ends:\n{}", daemon.log());
        sleep(Duration::from_millis(20));
    }
    assert_eq!(ctl(&["add-prefix", "192.0.2.0/24", "--protocol", "both"]), 0, "{}", daemon.log());
    topology.client.enter(|| tcp_text(at("192.0.2.7", 80)).is_ok() && udp(at("192.0.2.7", 53), b"who?").is_ok())
}
