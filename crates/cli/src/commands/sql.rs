//! `sql-ping` and `sql-migrate`: the coordinator's own program does it, because only it talks SQL.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::{ExitCode, Stdio},
};

use crate::{arguments::Sql, failure::Failure, local::service::Kind, output, target::Target};

/// Runs the coordinator with `flag` and says `success`; when it fails its words and its exit code become ours.
pub(crate) async fn run(
    target: &Target,
    options: &Sql,
    (flag, success): (&str, &str),
    json: bool,
) -> Result<ExitCode, Failure> {
    let local = target.site.as_ref().and_then(|site| site.of(Kind::Coordinator).next());
    let config = options.config.clone().or_else(|| local.map(|coordinator| coordinator.config.clone()));
    let config = config.ok_or_else(|| {
        Failure::Usage("no cluster runs here; name the coordinator's configuration with --config".to_owned())
    })?;
    let program = beside_us().or_else(|| local.map(|coordinator| coordinator.program.clone()));
    let program = program.unwrap_or_else(|| PathBuf::from(Kind::Coordinator.binary()));
    let output = tokio::process::Command::new(&program)
        .arg("--config")
        .arg(&config)
        .arg(flag)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(|error| Failure::Unreachable(format!("cannot run {}: {error}", program.display())))?;
    if !output.status.success() {
        // Its log lines say why; of a success they say nothing that is of interest here.
        std::io::stderr()
            .write_all(&output.stderr)
            .map_err(|error| Failure::Internal(format!("cannot write: {error}")))?;
    }
    match output.status.code() {
        Some(0) => {
            output::print(json, &serde_json::json!({ "config": config, "ok": true }), |_| {
                success.to_owned()
            })?;
            Ok(ExitCode::SUCCESS)
        }
        Some(78) => Err(Failure::Usage(format!("{} cannot be used", config.display()))),
        Some(code) => Ok(ExitCode::from(u8::try_from(code).unwrap_or(70))),
        None => Err(Failure::Internal(format!("{} was killed", program.display()))),
    }
}

fn beside_us() -> Option<PathBuf> {
    let program = std::env::current_exe().ok()?;
    let coordinator = program.parent().unwrap_or(Path::new("/")).join(Kind::Coordinator.binary());
    coordinator.is_file().then_some(coordinator)
}
