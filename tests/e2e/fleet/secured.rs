//! TLS with certificates on both sides, a user with a password, and signatures.

use std::{path::PathBuf, time::Duration};

use anyport::fleet::{layout::Pointer, settings::ConnectionSettings, signing::PublicKeys};
use anyport_tests::{driver::Driver, etcd::Etcd, host::wait_for, netns::Netns, prerequisites::scratch};
use libtest_mimic::Trial;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, PKCS_ED25519};

use super::nodes::Node;
use crate::{cases::trial, control::contains};

pub(super) fn trials() -> Vec<Trial> {
    vec![trial("fleet::TLS, certificates of clients, and users", secured), trial("fleet::pointers are signed", signed)]
}

struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        Self(CertifiedIssuer::self_signed(params, key).expect("an authority"))
    }

    /// A certificate for 127.0.0.1 and its key, in PEM.
    fn issue(&self) -> (String, String) {
        let key = KeyPair::generate().expect("a key");
        let params = CertificateParams::new(["127.0.0.1".to_owned()]).expect("an address");
        let certificate = params.signed_by(&key, &*self.0).expect("a certificate");
        (certificate.pem(), key.serialize_pem())
    }
}

fn secured() {
    let namespace = Netns::new();
    let files = Driver { namespace: namespace.clone(), options: Vec::new(), files: scratch() };
    let (ours, others) = (Authority::new(), Authority::new());
    let ca = files.file("ca", &ours.0.pem());
    let (certificate, key) = ours.issue();
    let (certificate, key) = (files.file("certificate", &certificate), files.file("key", &key));
    let server = ["--cert-file", &certificate, "--key-file", &key, "--trusted-ca-file", &ca, "--client-cert-auth"];
    let mut etcd = Etcd::secured(&namespace, &server, &["--cacert", &ca, "--cert", &certificate, "--key", &key]);
    let urls = etcd.urls();
    let with = |ca: &str, more: &[&str]| {
        let options = ["--etcd", &urls, "--ca", ca].into_iter().chain(more.iter().copied());
        Driver { namespace: namespace.clone(), options: options.map(str::to_owned).collect(), files: scratch() }
    };
    let shown = ["--certificate", &certificate, "--key", &key];
    let set = files.file("set", "192.0.2.0/24\n");
    with(&ca, &shown).ok(&format!("publish {set} --ring canary"));
    let strange = files.file("strange", &others.0.pem());
    contains(&with(&strange, &shown).refused("status --timeout 5s", 3), &["https://127.0.0.1:2379", "certificate"]);
    with(&ca, &[]).refused("status --timeout 5s", 3);
    contains(&with(&ca, &["--certificate", &certificate]).refused("status", 2), &["a certificate and its key"]);
    etcd.ctl("user add root:secret");
    etcd.ctl("user add reader:known");
    etcd.ctl("role add reader");
    etcd.ctl("role grant-permission --prefix=true reader read /anyport/");
    etcd.ctl("user grant-role reader reader");
    etcd.ctl("user add node1:own");
    // As docs/fleet.md has it.
    etcd.ctl("role add anyport-node1");
    etcd.ctl("role grant-permission --prefix=true anyport-node1 read /anyport/");
    etcd.ctl("role grant-permission anyport-node1 readwrite /anyport/nodes/canary/node1");
    etcd.ctl("role grant-permission anyport-node1 readwrite /anyport/members/canary/node1");
    etcd.ctl("user grant-role node1 anyport-node1");
    etcd.ctl("user grant-role root root");
    etcd.ctl("auth enable");
    let user = |name: &str, password: &str| {
        let file = files.file("password", &format!("{password}\n"));
        with(&ca, &[&shown[..], &["--user", name, "--password-file", &file]].concat())
    };
    user("root", "secret").ok("promote --from canary --to main --force");
    contains(&user("root", "wrong").refused("status", 4), &["authentication failed"]);
    contains(&user("reader", "known").ok("status"), &["ring canary: sequence 1", "ring main: sequence 1"]);
    // That suffices, and for nothing else.
    let as_node = |arguments: &[&str]| etcd.client().run([&["--user", "node1:own"], arguments].concat());
    for key in
        ["rings/canary", "history/canary/7", "sets/x", "nodes/canary/node2", "members/canary/node2", "nodes/main/node1"]
    {
        let outcome = as_node(&["put", &format!("/anyport/{key}"), "x"]);
        assert!(outcome.status != 0 && outcome.stderr.contains("permission denied"), "{key}: {outcome}");
    }
    let own = PathBuf::from(files.file("own", "own"));
    let _node = Node::start_as(
        &namespace,
        "canary",
        "node1",
        ConnectionSettings {
            etcd: vec![urls.clone()],
            ca: Some(ca.clone().into()),
            certificate: Some(certificate.clone().into()),
            key: Some(key.clone().into()),
            user: Some("node1".into()),
            password_file: Some(own),
            prefix: None,
        },
    );
    wait_for("node that is current", Duration::from_secs(10), || {
        let view = user("reader", "known").ring("canary");
        if view["summary"]["current"] == 1 { Ok(()) } else { Err(view.to_string()) }
    });
    let other = files.file("other", "198.51.100.0/24\n");
    contains(&user("reader", "known").refused(&format!("publish {other} --ring canary"), 4), &["permission denied"]);
    contains(&with(&ca, &shown).refused("status", 4), &["etcd at https://127.0.0.1:2379"]);
    // etcd forgets the tokens that it gave when it is restarted: the node asks for another one.
    etcd.kill(0);
    etcd.start_again(0);
    user("root", "secret").ok(&format!("publish {other} --ring canary"));
    wait_for("node that is current after etcd's restart", Duration::from_secs(20), || {
        let view = user("reader", "known").ring("canary");
        let current = view["summary"]["current"] == 1 && view["pointer"]["sequence"] == 2;
        if current { Ok(()) } else { Err(view.to_string()) }
    });
}

fn signed() {
    let namespace = Netns::new();
    let etcd = Etcd::alone(&namespace);
    let driver = Driver::of(&namespace, &etcd);
    let pair = KeyPair::generate_for(&PKCS_ED25519).expect("a key");
    let key = driver.file("key", &pair.serialize_pem());
    let keys = PublicKeys::from_pem(pair.public_key_pem().as_bytes()).expect("a public key");
    let set = driver.file("set", "192.0.2.0/24\n");
    let other = driver.file("other", "198.51.100.0/24\n");
    driver.ok(&format!("publish {set} --ring canary --signing-key {key}"));
    let pointer = |ring: &str| -> Pointer {
        serde_json::from_value(etcd.record(&format!("/anyport/rings/{ring}"))).expect("a pointer")
    };
    keys.verify(&pointer("canary")).expect("a signature");
    contains(&driver.refused(&format!("publish {other} --ring canary"), 5), &["is signed", "--signing-key"]);
    contains(&driver.refused(&format!("publish {other} --ring canary --signing-key {set}"), 2), &["ed25519"]);
    assert_eq!(driver.sequence("canary"), 1);
    driver.ok(&format!("publish {other} --ring canary --force"));
    keys.verify(&pointer("canary")).expect_err("without a signature");
    // The same set, signed now: that is a change.
    assert_eq!(driver.json(&format!("publish {other} --ring canary --signing-key {key}"))["sequence"], 3);
    driver.ok(&format!("rollback --ring canary --to 1 --signing-key {key}"));
    driver.ok(&format!("promote --from canary --to main --signing-key {key} --force"));
    keys.verify(&pointer("canary")).expect("a signature");
    let main = pointer("main");
    keys.verify(&main).expect("a signature");
    keys.verify(&Pointer { ring: "canary".parse().expect("a name"), ..main }).expect_err("another ring");
}
