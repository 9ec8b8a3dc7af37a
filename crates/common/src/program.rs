//! The frame of every service's program: its arguments, its exit codes, and its last words.

use std::{
    error::Error,
    fmt::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use serde::de::DeserializeOwned;

use crate::{
    config::{self, ConfigError, Validate},
    faults,
    telemetry::{self, TelemetryConfig},
    tls::{self, TlsConfig},
};

/// The configuration cannot be used (`EX_CONFIG` of sysexits.h).
pub const BAD_CONFIG: u8 = 78;
/// What the program needs cannot be reached (`EX_UNAVAILABLE`).
pub const UNAVAILABLE: u8 = 69;
/// The service failed while starting or running (`EX_SOFTWARE`).
pub const FAILED: u8 = 70;

/// What every service is started with.
#[derive(Debug, Clone, clap::Args)]
pub struct ServiceArguments {
    /// Configuration file (TOML).
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Writes the addresses listened on to this file, as JSON, once every listener is bound.
    #[arg(long, value_name = "FILE")]
    pub announce: Option<PathBuf>,
    /// Checks the configuration and ends.
    #[arg(long)]
    pub check_config: bool,
}

impl ServiceArguments {
    /// Reads and checks the configuration. A bad one has been told when the exit code comes back.
    pub fn load<C: DeserializeOwned + Validate>(&self, program: &str) -> Result<C, ExitCode> {
        faults::prepare(&self.config).map_err(|error| exit(program, BAD_CONFIG, &error))?;
        config::load(&self.config).map_err(|error| exit(program, BAD_CONFIG, &error))
    }
}

/// What every service's configuration has.
pub trait ServiceConfig: DeserializeOwned + Validate {
    /// Logs and traces.
    fn telemetry(&self) -> &TelemetryConfig;
    /// Whom to believe.
    fn tls(&self) -> &TlsConfig;
    /// Fails when a file of secrets cannot be used. Looked at before anything is started.
    fn check_secrets(&self) -> Result<(), ConfigError>;
}

/// The life of a service's program: its configuration is read and checked, logging starts, and `serve` runs to its end, with
/// the file that addresses are announced in.
pub async fn run<C, E>(
    program: &'static str,
    service: &ServiceArguments,
    serve: impl AsyncFnOnce(C, Option<&Path>) -> Result<(), E>,
) -> ExitCode
where
    C: ServiceConfig,
    E: Error + 'static,
{
    let config = match service.load::<C>(program) {
        Ok(config) => config,
        Err(code) => return code,
    };
    if let Err(error) = config.check_secrets() {
        return exit(program, BAD_CONFIG, &error);
    }
    if service.check_config {
        return ExitCode::SUCCESS;
    }
    let _telemetry = match telemetry::start(program, config.telemetry()) {
        Ok(guard) => guard,
        Err(error) => return exit(program, FAILED, &error),
    };
    tls::install(config.tls());
    match serve(config, service.announce.as_deref()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => exit(program, FAILED, &error),
    }
}

/// Tells whoever started the program why it ends, and answers the exit code. Standard error, because logging may not
/// have started or may be what failed.
#[expect(clippy::print_stderr, reason = "nothing else can say why a process does not start")]
pub fn exit(program: &str, code: u8, error: &(dyn Error + 'static)) -> ExitCode {
    eprintln!("{program}: {}", with_causes(error));
    ExitCode::from(code)
}

/// An error and what caused it. Many texts name their cause already; it is not said twice.
fn with_causes(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.contains(&said) {
            // Writing to a string cannot fail.
            let _ = write!(text, ": {said}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("no bus: {0}")]
    struct Told(#[source] std::io::Error);

    #[derive(Debug, thiserror::Error)]
    #[error("cannot start")]
    struct Untold(#[source] Told);

    #[test]
    fn a_cause_is_told_once() {
        let error = Untold(Told(std::io::Error::other("refused")));
        assert_eq!(with_causes(&error), "cannot start: no bus: refused");
    }
}
