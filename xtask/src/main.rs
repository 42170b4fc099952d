//! Commands for people who work on anyport: `cargo xtask COMMAND`.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "this is a program for terminals")]

mod aarch64;
mod alerts;
mod btf;
mod build_ebpf;
mod dist;
mod documents;
mod fuzz;
mod host;
mod image;
mod kernel;
mod layers;
mod licences;
mod module_docs;
mod object;
mod packages;
mod process;
mod programs;
mod run;
mod source_hash;
mod tally;
mod test;
mod toolchain;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Commands for people who work on anyport.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Xtask {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build anyportd and anyportctl and start the daemon, as root.
    Run(run::Options),
    /// Show what anyport does, in network namespaces of its own.
    Demo(programs::DemoOptions),
    /// Check and test everything.
    Test(test::Options),
    /// Measure, and print the numbers as ratios.
    Bench(programs::BenchOptions),
    /// Simulate a fleet of many nodes.
    Sim(programs::BenchOptions),
    /// Restart, upgrade and kill the daemon under load for a quarter of an hour.
    Soak(programs::DemoOptions),
    /// Feed random input to everything that reads foreign bytes.
    Fuzz(fuzz::Options),
    /// Make packages and a container image, and what they are made of: programs, manual pages, shell completions, documents.
    Dist(dist::Options),
    /// Make a container image of programs that are built.
    Image(image::Options),
    /// Build the BPF object that is kept in the repository.
    BuildEbpf(build_ebpf::Options),
}

fn main() -> ExitCode {
    let result = match Xtask::parse().command {
        Command::Run(options) => run::run(&options),
        Command::Demo(options) => programs::demo(&options),
        Command::Test(options) => return report(test::run(&options)),
        Command::Bench(options) => programs::bench(&options),
        Command::Sim(options) => programs::sim(&options),
        Command::Soak(options) => programs::soak(&options),
        Command::Fuzz(options) => fuzz::run(&options),
        Command::Dist(options) => dist::run(&options),
        Command::Image(options) => image::run(options),
        Command::BuildEbpf(options) => build_ebpf::run(&options),
    };
    report(result.map(|()| ExitCode::SUCCESS))
}

fn report(result: anyhow::Result<ExitCode>) -> ExitCode {
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        super::Xtask::command().debug_assert();
    }
}
