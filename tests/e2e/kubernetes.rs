//! The manifests for Kubernetes: every key is one that the API knows, and the configuration is right.

use std::{collections::BTreeSet, fs, process::Command};

use anyport_tests::{
    host::Outcome,
    prerequisites::{program, scratch},
};
use k8s_openapi::{
    Resource,
    api::{
        apps::v1::DaemonSet,
        core::v1::{ConfigMap, Container, Namespace, PodSpec},
    },
};
use libtest_mimic::Trial;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::cases::trial;

const MANIFESTS: &str = include_str!("../../docs/kubernetes/anyport.yaml");

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("kubernetes::the manifests are what the API knows", schema),
        trial("kubernetes::mistakes are found", mistakes),
        trial("kubernetes::the configuration is right", configuration),
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

/// What the manifests ask for.
pub(crate) struct Manifests {
    namespace: Namespace,
    pub(crate) config: ConfigMap,
    daemon_set: DaemonSet,
}

impl Manifests {
    /// Those of the repository.
    pub(crate) fn read() -> Self {
        Self::of(MANIFESTS).unwrap_or_else(|error| panic!("{error}"))
    }

    fn of(text: &str) -> Result<Self, String> {
        Ok(Self { namespace: find(text)?, config: find(text)?, daemon_set: find(text)? })
    }

    pub(crate) fn pod(&self) -> &PodSpec {
        self.daemon_set.spec.template.spec.as_ref().expect("a pod")
    }

    pub(crate) fn container(&self) -> &Container {
        &self.pod().containers[0]
    }

    /// The names of all capabilities that the container has.
    pub(crate) fn capabilities(&self) -> Vec<String> {
        let context = self.container().security_context.as_ref().expect("a security context");
        let capabilities = context.capabilities.as_ref().expect("capabilities");
        assert_eq!(capabilities.drop.as_deref(), Some(&["ALL".to_owned()][..]));
        capabilities.add.clone().expect("capabilities")
    }
}

/// What refers to something refers to what is there.
fn schema() {
    assert_eq!(documents(MANIFESTS).len(), 3);
    let manifests = Manifests::read();
    let Manifests { namespace, config, daemon_set } = &manifests;
    assert_eq!(config.metadata.namespace, namespace.metadata.name);
    assert_eq!(daemon_set.metadata.namespace, namespace.metadata.name);
    let spec = &daemon_set.spec;
    let labels = spec.template.metadata.as_ref().and_then(|it| it.labels.as_ref()).expect("labels");
    assert_eq!(spec.selector.match_labels.as_ref(), Some(labels));
    let pod = manifests.pod();
    let names = |names: Vec<&str>| names.into_iter().map(ToOwned::to_owned).collect::<BTreeSet<_>>();
    let volumes = pod.volumes.as_ref().expect("volumes");
    let mounts = manifests.container().volume_mounts.as_ref().expect("mounts");
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
        let error = Manifests::of(&MANIFESTS.replace(right, wrong)).map(|_| ()).expect_err(wrong);
        assert!(error.contains(complaint), "{wrong}: {error}");
    }
}

fn configuration() {
    let text = Manifests::read().config.data.expect("data").remove("anyport.toml").expect("the file");
    let directory = scratch();
    let file = directory.path().join("anyport.toml");
    fs::write(&file, text).expect("the configuration");
    let mut check = Command::new(program("anyportd").expect("the program"));
    let outcome = Outcome::of(check.arg("--check").arg("--config").arg(&file));
    assert!(outcome.status == 0, "{outcome}");
}
