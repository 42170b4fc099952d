//! Other programs, the workspace they work on and root's privileges.

use std::{
    env, io,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

/// The directory of the workspace.
pub(crate) fn workspace() -> Result<PathBuf> {
    let manifest = env::var_os("CARGO_MANIFEST_DIR").context("start this as `cargo xtask`")?;
    let root = Path::new(&manifest).parent().context("xtask is not in a workspace")?;
    Ok(root.to_owned())
}

/// Where cargo puts what it builds.
pub(crate) fn target_dir(root: &Path) -> PathBuf {
    root.join(env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into()))
}

/// The cargo that started this, in the workspace, keeping to the versions of the lock file.
pub(crate) fn cargo(root: &Path, subcommand: &str) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root).args([subcommand, "--locked"]);
    for (name, _) in env::vars_os().filter(|(name, _)| name.to_str().is_some_and(is_about_xtask)) {
        command.env_remove(name);
    }
    command
}

/// Whether a variable tells xtask who it is. A build script that looks at it (that of `ring` does) would run again whenever
/// `cargo xtask` follows another cargo or the other way round, and most of the workspace would be built once more.
fn is_about_xtask(variable: &str) -> bool {
    ["CARGO_PKG_", "CARGO_MANIFEST_"].iter().any(|prefix| variable.starts_with(prefix))
}

/// Runs a command to its end; the error shows the whole of it.
pub(crate) fn exec(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("{command:?} could not be started"))?;
    if !status.success() {
        bail!("{command:?} failed: {status}");
    }
    Ok(())
}

/// The same command, which the kernel kills when this program ends, however it ends. Standard streams are not copied.
pub(crate) fn dying_with_us(command: &Command) -> Command {
    // PR_SET_PDEATHSIG has to be set by the process itself and outlives execve(2).
    let mut setpriv = Command::new("setpriv");
    setpriv.args(["--pdeathsig", "KILL", "--"]).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => setpriv.env(name, value),
            None => setpriv.env_remove(name),
        };
    }
    if let Some(directory) = command.get_current_dir() {
        setpriv.current_dir(directory);
    }
    setpriv
}

/// What a command prints on its standard output.
pub(crate) fn stdout(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("{command:?} could not be started"))?;
    if !output.status.success() {
        bail!("{command:?} failed: {}", output.status);
    }
    String::from_utf8(output.stdout).with_context(|| format!("{command:?} did not print text"))
}

/// Becomes the command, so that it gets the terminal's signals and its exit status is this program's.
pub(crate) fn become_command(command: &mut Command) -> anyhow::Error {
    let error: io::Error = command.exec();
    anyhow::Error::new(error).context(format!("{command:?} could not be started"))
}

/// Whether this process is root.
pub(crate) fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Makes cargo start what it builds as root, with the environment kept, while cargo itself stays who it is.
pub(crate) fn run_as_root(cargo: &mut Command) -> Result<()> {
    if !is_root() {
        eprintln!("What follows needs root: it is started through sudo.");
        let runner = format!("CARGO_TARGET_{}_RUNNER", host_target()?.replace('-', "_").to_uppercase());
        cargo.env(runner, "sudo -E --");
    }
    Ok(())
}

/// The target that rustc builds for by itself.
pub(crate) fn host_target() -> Result<String> {
    let version = stdout(Command::new("rustc").arg("-vV"))?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("`rustc -vV` names no host")?.to_owned())
}

#[cfg(test)]
mod tests {
    use std::{path::Path, process::Command};

    use super::{cargo, dying_with_us, is_about_xtask, stdout};

    #[test]
    fn cargo_hears_nothing_of_xtask() {
        assert!(
            is_about_xtask("CARGO_MANIFEST_DIR") && !is_about_xtask("CARGO_TARGET_DIR") && !is_about_xtask("CARGO")
        );
        // Set by the cargo that runs this test.
        let cargo = cargo(Path::new("/"), "build");
        assert!(cargo.get_envs().any(|(name, value)| name == "CARGO_MANIFEST_DIR" && value.is_none()), "{cargo:?}");
    }

    #[test]
    fn dying_with_us_keeps_arguments_environment_and_directory() {
        let mut shell = Command::new("sh");
        shell.args(["-c", "echo $1 $OF_TEST $PWD", "sh", "an argument"]).env("OF_TEST", "a value").current_dir("/");
        assert_eq!(stdout(&mut dying_with_us(&shell)).unwrap(), "an argument a value /\n");
    }
}
