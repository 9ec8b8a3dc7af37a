//! `up`: a whole local cluster in one terminal.

#![expect(
    clippy::format_push_string,
    reason = "a page of text, built once: clarity counts, not an allocation"
)]

use std::{
    collections::HashMap,
    io::{IsTerminal as _, Write as _},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use tabularium_common::lifecycle::stop_signal;
use tokio::time::Instant;

use crate::{
    arguments::{Global, Over, Up},
    failure::Failure,
    local::{
        LocalError,
        cluster::{Cluster, ClusterOptions, SiteSize},
        ports::Ports,
        record::{ClusterRecord, SiteRecord},
        service::{Kind, State},
        transport::{TlsFiles, Transport},
    },
};

/// How often processes are looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// A process that ended is started again after this long; twice as long each time it ends again.
const FIRST_RESTART_DELAY: Duration = Duration::from_secs(2);
const LONGEST_RESTART_DELAY: Duration = Duration::from_secs(60);

/// Says what goes on: a line that changes on a terminal, plain lines elsewhere.
pub(crate) struct Live {
    bar: Option<ProgressBar>,
}

impl Live {
    pub(crate) fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        Self { bar }
    }

    /// Replaces the changing line; elsewhere a line of its own.
    pub(crate) fn now(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.set_message(text.to_owned()),
            None => stderr_line(text),
        }
    }

    /// As [`Live::now`], for what changes so often that plain lines would flood a log.
    pub(crate) fn tick(&self, text: String) {
        if let Some(bar) = &self.bar {
            bar.set_message(text);
        }
    }

    /// A line that stays.
    pub(crate) fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => stderr_line(text),
        }
    }

    pub(crate) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Whoever read our words may have gone; the cluster goes on.
fn stderr_line(text: &str) {
    let _gone = writeln!(std::io::stderr(), "{text}");
}

/// One JSON object a line.
fn print_event(event: &serde_json::Value) -> Result<(), Failure> {
    writeln!(std::io::stdout(), "{event}")
        .map_err(|error| Failure::Internal(format!("cannot write: {error}")))
}

fn transport(global: &Global, up: &Up) -> Result<Transport, Failure> {
    match up.over {
        Over::Tcp => Ok(Transport::Tcp),
        Over::Sockets => Ok(Transport::Sockets),
        Over::Tls => {
            let absolute =
                |file: &Option<PathBuf>| file.as_ref().and_then(|file| std::path::absolute(file).ok());
            match (absolute(&global.tls_certificate), absolute(&global.tls_key), absolute(&global.tls_ca)) {
                (Some(certificate_path), Some(key_path), Some(ca_path)) => {
                    Ok(Transport::Tls(TlsFiles { certificate_path, key_path, ca_path, mutual: false }))
                }
                _ => Err(Failure::Usage(
                    "--over tls wants --tls-certificate, --tls-key and --tls-ca".to_owned(),
                )),
            }
        }
    }
}

fn options(global: &Global, up: &Up) -> Result<ClusterOptions, Failure> {
    let mut options = ClusterOptions::new(&global.state_dir);
    options.home = SiteSize {
        nodes: up.nodes,
        coordinators: up.coordinators,
        routers: up.routers,
        replicators: up.replicators,
    };
    if up.no_mirror {
        options.mirror = None;
    }
    options.ports = match up.base_port {
        None => Ports::Documented,
        Some(0) => Ports::Kernel,
        Some(base) => Ports::From(base),
    };
    options.log_filter.clone_from(&up.log_filter);
    options.transport = transport(global, up)?;
    Ok(options)
}

pub(crate) async fn run(global: &Global, up: &Up) -> Result<ExitCode, Failure> {
    let options = options(global, up)?;
    let live = Live::new();
    let started = Instant::now();
    let start = |name: &str| live.now(&format!("starting {name}"));
    // Dropping the start, half done or not, ends every process it started.
    let cluster = tokio::select! {
        cluster = Cluster::start(options, &start) => cluster,
        signal = stop_signal() => {
            live.finish();
            signal.map_err(|error| signals(&error))?;
            return Ok(ExitCode::from(130));
        }
    };
    let mut cluster = match cluster {
        Ok(cluster) => cluster,
        Err(error) => {
            live.finish();
            return Err(not_started(&error));
        }
    };
    let record = cluster.record();
    if global.json {
        print_event(&json!({ "event": "up", "cluster": record }))?;
    } else {
        live.say(&welcome(&record, global, started.elapsed()));
    }
    let watched = tokio::select! {
        never = watch(&mut cluster, &live) => never,
        signal = stop_signal() => signal.map_err(|error| signals(&error)),
    };
    live.now("stopping; once more Ctrl-C kills");
    let stopped = tokio::select! {
        stopped = cluster.stop() => stopped.map_err(Failure::from),
        signal = stop_signal() => signal.map_err(|error| signals(&error)),
    };
    live.finish();
    if global.json {
        print_event(&json!({ "event": "stopped" }))?;
    } else if stopped.is_ok() {
        stderr_line("stopped; nothing is left running");
    }
    watched.and(stopped).map(|()| ExitCode::SUCCESS)
}

/// The commonest reason is a port that somebody else has.
fn not_started(error: &LocalError) -> Failure {
    match error {
        LocalError::Process { tail, .. } if tail.contains("Address already in use") => Failure::No(format!(
            "{error}\nanother program listens there (`ss -ltnp` tells which); --base-port 0 takes ports that are free"
        )),
        _ => Failure::of_local(error),
    }
}

fn signals(error: &std::io::Error) -> Failure {
    Failure::Internal(format!("cannot wait for signals: {error}"))
}

/// Starts again what ends by itself, until the caller has enough.
async fn watch(cluster: &mut Cluster, live: &Live) -> Result<(), Failure> {
    let mut restarts: HashMap<String, (Instant, Duration)> = HashMap::new();
    loop {
        let states = cluster.states();
        let running = states.iter().filter(|(_, state)| *state == State::Running).count();
        live.tick(format!("{running} of {} processes run; Ctrl-C stops all", states.len()));
        for (name, state) in states {
            let (State::Ended { .. } | State::Stopped) = state else { continue };
            match restarts.get(&name) {
                None => {
                    let how = if let State::Ended { how } = &state { how } else { "could not be started" };
                    live.say(&format!(
                        "{name} {how}; it is started again in {} s",
                        FIRST_RESTART_DELAY.as_secs()
                    ));
                    restarts.insert(name, (Instant::now() + FIRST_RESTART_DELAY, FIRST_RESTART_DELAY));
                }
                Some((at, delay)) if Instant::now() >= *at => {
                    let delay = (*delay * 2).min(LONGEST_RESTART_DELAY);
                    match cluster.restart(&name).await {
                        Ok(()) => {
                            live.say(&format!("{name} runs again"));
                            restarts.remove(&name);
                        }
                        Err(error) => {
                            live.say(&format!("{error}\n{name} is started again in {} s", delay.as_secs()));
                            restarts.insert(name, (Instant::now() + delay, delay));
                        }
                    }
                }
                Some(_) => {}
            }
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

fn welcome(record: &ClusterRecord, global: &Global, took: Duration) -> String {
    let processes: usize = record.sites.iter().map(|site| site.processes.len()).sum();
    let mut text = format!("\nup: {processes} services in {:.1} s\n", took.as_secs_f64());
    for site in &record.sites {
        text += &describe(site);
    }
    let state = if global.state_dir.as_os_str() == ".tabularium" {
        String::new()
    } else {
        format!(" --state-dir {}", global.state_dir.display())
    };
    let gateway = record.sites.first().and_then(|site| site.urls(Kind::Gateway).into_iter().next());
    let gateway = gateway.unwrap_or_default();
    text += &format!(
        "\nin another terminal:\n  \
         tabularium{state} repo create group/project\n  \
         git push {gateway}/group/project.git HEAD:refs/heads/main\n  \
         git clone {gateway}/group/project.git\n  \
         tabularium{state} repo show group/project\n  \
         tabularium{state} status\n"
    );
    let mirror = record.sites.get(1).and_then(|site| site.urls(Kind::Gateway).into_iter().next());
    if let Some(mirror) = mirror {
        text += &format!("  git clone {mirror}/group/project.git   # the mirror, read-only\n");
    }
    text + &format!(
        "\nlogs and data: {}\nCtrl-C stops all of it; the data stays.\n",
        global.state_dir.display()
    )
}

fn describe(site: &SiteRecord) -> String {
    let status = site.urls(Kind::Coordinator).iter().map(|url| format!("{url}/api/v1/status")).collect();
    let mut text = format!("\nsite {}\n", site.name);
    for (what, addresses) in [
        ("gateway", site.urls(Kind::Gateway)),
        ("routers (Gitaly API)", site.grpc(Kind::Router)),
        ("coordinators", site.grpc(Kind::Coordinator)),
        ("status (JSON)", status),
        ("nodes", site.grpc(Kind::Node)),
        ("geo-receiver", site.urls(Kind::GeoReceiver)),
    ] {
        if !addresses.is_empty() {
            text += &format!("  {what:<22}{}\n", addresses.join("  "));
        }
    }
    text
}
