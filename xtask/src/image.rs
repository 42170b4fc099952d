//! A container image: the programs and what they load, in an OCI image layout, which is a tar file that `podman load`,
//! `skopeo copy oci-archive:` and `ctr image import` read. No container engine is needed to make it. The same programs on the
//! same host make the same file.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::{
    packages::{self, Effort, PROGRAMS, SUMMARY, VERSION},
    process::{self, exec, stdout},
    programs::Programs,
};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// What manifests call it.
const NAME: &str = concat!("localhost/anyport:", env!("CARGO_PKG_VERSION"));
/// Root by user, which the daemon gives up by itself, and `anyport` by group, whose members may use the control socket: a
/// container's root may not do so by its privileges.
const USER: &str = "0:64998";
const FILES: [(&str, &str); 3] = [
    (
        "etc/passwd",
        "root:x:0:0:root:/:/usr/sbin/nologin\nanyport:x:64998:64998:anyport:/var/lib/anyport:/usr/sbin/nologin\n",
    ),
    ("etc/group", "root:x:0:\nanyport:x:64998:\n"),
    ("etc/nsswitch.conf", "hosts: files dns\n"),
];
/// Where things are mounted in containers whose root is read-only.
const DIRECTORIES: [&str; 8] = ["dev", "etc/anyport", "pins", "proc", "run/anyport", "sys", "tmp", "var/lib/anyport"];
/// Certificates that etcd of a fleet is known by: where distributions have them, and where programs look first.
const CERTIFICATES: [&str; 2] = ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt"];
/// What Debian says of the libraries that come along.
const LICENCES_OF_LIBRARIES: [&str; 2] = ["/usr/share/doc/libc6/copyright", "/usr/share/doc/libgcc-s1/copyright"];

/// Options of `cargo xtask image`.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Where anyportd and anyportctl are.
    #[arg(long, value_name = "DIRECTORY")]
    programs: PathBuf,
    /// The image.
    #[arg(value_name = "FILE")]
    to: PathBuf,
}

/// Makes an image to try out, without the licences of crates, out of programs that are there.
pub(crate) fn run(Options { programs, to }: Options) -> Result<()> {
    let root = process::workspace()?;
    build(&root, &Programs { directory: programs }, &[root.join("LICENSE")], &to, Effort::Least)
}

/// What the file is called that `cargo xtask dist` makes.
pub(crate) fn file_name() -> String {
    format!("anyport_{VERSION}_{}.oci.tar", packages::architecture())
}

/// Makes the image in a directory beside it, which goes.
pub(crate) fn build(root: &Path, programs: &Programs, licences: &[PathBuf], to: &Path, effort: Effort) -> Result<()> {
    let scratch = to.with_extension("parts");
    if scratch.exists() {
        fs::remove_dir_all(&scratch).with_context(|| format!("empty {}", scratch.display()))?;
    }
    let seconds = packages::date_of_last_change(root, "+%s")?;
    let (tree, layer) = (scratch.join("tree"), scratch.join("layer.tar"));
    lay_out(programs, licences, &tree)?;
    tar(&tree, &["."], &layer, &seconds)?;
    let layout = scratch.join("layout");
    fill(&layout, &layer, &packages::date_of_last_change(root, "+%Y-%m-%dT%H:%M:%SZ")?, effort)?;
    tar(&layout, &["blobs", "index.json", "oci-layout"], to, &seconds)?;
    fs::remove_dir_all(&scratch).context("remove the parts of the image")
}

/// Makes the image's layout of its layer, which is compressed.
fn fill(layout: &Path, layer: &Path, created: &str, effort: Effort) -> Result<()> {
    let uncompressed = digest(&fs::read(layer).context("read the layer")?);
    let level = if effort == Effort::Full { "-9" } else { "-1" };
    exec(Command::new("gzip").args([level, "--no-name"]).arg(layer))?;
    let blobs = Blobs::new(layout)?;
    let layer = fs::read(layer.with_extension("tar.gz")).context("read the compressed layer")?;
    let layer = blobs.add("application/vnd.oci.image.layer.v1.tar+gzip", &layer)?;
    let config = blobs.add_json("application/vnd.oci.image.config.v1+json", &config(created, &uncompressed))?;
    let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer]});
    let mut manifest = blobs.add_json(MANIFEST, &manifest)?;
    // podman and skopeo know an image by the first of these, containerd by the second.
    manifest["annotations"] = json!({"org.opencontainers.image.ref.name": NAME, "io.containerd.image.name": NAME});
    let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [manifest]});
    for (name, value) in [("index.json", index), ("oci-layout", json!({"imageLayoutVersion": "1.0.0"}))] {
        fs::write(layout.join(name), value.to_string()).with_context(|| format!("write {name} of the image"))?;
    }
    Ok(())
}

/// How containers of it start, by the names of the OCI's image specification.
fn config(created: &str, layer: &str) -> Value {
    json!({
        "created": created,
        "architecture": packages::architecture(),
        "os": "linux",
        "config": {
            "User": USER,
            "Env": ["PATH=/usr/bin", "ANYPORT_SOCKET=/run/anyport/anyportd.sock"],
            "Entrypoint": ["/usr/bin/anyportd"],
            "WorkingDir": "/",
            "Volumes": {"/run/anyport": {}, "/var/lib/anyport": {}},
            "StopSignal": "SIGTERM",
            "Labels": {
                "org.opencontainers.image.title": "anyport",
                "org.opencontainers.image.description": SUMMARY,
                "org.opencontainers.image.version": VERSION,
                "org.opencontainers.image.licenses": "MIT",
            },
        },
        "rootfs": {"type": "layers", "diff_ids": [layer]},
        "history": [{"created": created, "created_by": "cargo xtask dist"}],
    })
}

/// The content of the image's one layer.
fn lay_out(programs: &Programs, licences: &[PathBuf], tree: &Path) -> Result<()> {
    for directory in DIRECTORIES {
        fs::create_dir_all(tree.join(directory)).with_context(|| format!("make {directory} of the image"))?;
    }
    for (path, text) in FILES {
        fs::write(tree.join(path), text).with_context(|| format!("write {path} of the image"))?;
    }
    let put = |from: &Path, to: &str| packages::put(from, &tree.join(to), 0o644);
    let mut libraries = BTreeSet::new();
    for name in PROGRAMS {
        let program = programs.directory.join(name);
        libraries.extend(loaded_by(&program)?);
        packages::put_program(&program, &tree.join("usr/bin").join(name))?;
    }
    for library in libraries {
        packages::put(library.as_ref(), &tree.join(library.trim_start_matches('/')), 0o755)?;
    }
    let certificates = CERTIFICATES.into_iter().find(|path| Path::new(path).exists());
    let certificates = certificates.context("find the certificates of authorities: install `ca-certificates`")?;
    put(Path::new(certificates), CERTIFICATES[0].trim_start_matches('/'))?;
    for licence in licences {
        let name = licence.file_name().unwrap_or_default().to_string_lossy();
        put(licence, &format!("usr/share/doc/anyport/{name}"))?;
    }
    for licence in LICENCES_OF_LIBRARIES.into_iter().filter(|path| Path::new(path).exists()) {
        put(Path::new(licence), licence.trim_start_matches('/'))?;
    }
    Ok(())
}

/// The libraries of a program and what loads them, as ldd(1) finds them here: the image has them at the same places.
fn loaded_by(program: &Path) -> Result<Vec<String>> {
    let listed = stdout(Command::new("ldd").arg(program))?;
    let path = |line: &str| {
        let file = line.split_once("=> ").map_or(line, |(_, file)| file);
        file.split_whitespace().next().filter(|it| it.starts_with('/')).map(str::to_owned)
    };
    let libraries: Vec<String> = listed.lines().filter_map(path).collect();
    ensure!(!libraries.is_empty() && !listed.contains("not found"), "libraries of {}: {listed}", program.display());
    Ok(libraries)
}

/// A tar file that depends on nothing but the files' names and contents.
fn tar(directory: &Path, members: &[&str], to: &Path, seconds: &str) -> Result<()> {
    let mut tar = Command::new("tar");
    tar.args(["--create", "--format=gnu", "--sort=name", "--owner=0", "--group=0", "--numeric-owner"]);
    tar.args(["--mode=u=rwX,go=rX", &format!("--mtime=@{}", seconds.trim())]);
    exec(tar.arg("--file").arg(to).arg("--directory").arg(directory).args(members))
}

fn digest(bytes: &[u8]) -> String {
    let hex: Vec<String> = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{}", hex.concat())
}

/// Where a layout has its contents, by their digests.
struct Blobs {
    directory: PathBuf,
}

impl Blobs {
    fn new(layout: &Path) -> Result<Self> {
        let directory = layout.join("blobs/sha256");
        fs::create_dir_all(&directory).with_context(|| format!("make {}", directory.display()))?;
        Ok(Self { directory })
    }

    /// Adds a content; what refers to it has this descriptor.
    fn add(&self, media_type: &str, bytes: &[u8]) -> Result<Value> {
        let digest = digest(bytes);
        let path = self.directory.join(digest.trim_start_matches("sha256:"));
        fs::write(&path, bytes).with_context(|| format!("write {}", path.display()))?;
        Ok(json!({"mediaType": media_type, "digest": digest, "size": bytes.len()}))
    }

    fn add_json(&self, media_type: &str, value: &Value) -> Result<Value> {
        self.add(media_type, value.to_string().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn contents_are_known_by_their_digests() {
        assert_eq!(super::digest(b"abc"), "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}
