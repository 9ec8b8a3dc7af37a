//! One session, from an empty cluster to the verdict.

use std::{fs, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, ensure};
use tabularium_cli::local::git::Git;
use tabularium_common::faults::SafetyStep;
use tabularium_testkit::cluster::service::Kind;
use tokio::time::{Instant, sleep};

use crate::{
    checker::{self, Violation},
    clients::{Clients, Tested},
    clocks::Clocks,
    cluster::{Site, Size},
    harm::Harm,
    healed,
    history::{Event, Finding, History, Recorder, Session},
    nemesis::Nemesis,
    rebirth::{self, Rebirth},
    report::Report,
    scenes::actor::{self, Actor},
    witness::Witness,
};

const HOT_REPOSITORIES: usize = 2;
const COLD_REPOSITORIES: usize = 8;
/// Before the first fault: what a fault costs is seen beside what there is without one.
const QUIET_BEFORE: Duration = Duration::from_secs(5);
/// After the last. A node takes for abandoned what an earlier process of it left when it is ten seconds old.
const QUIET_AFTER: Duration = Duration::from_secs(11);
/// How long the last operations may take.
const DRAIN: Duration = Duration::from_secs(90);

/// The same when a step is switched off: what that breaks is looked for, not what is left over.
const BRIEF_QUIET_AFTER: Duration = Duration::from_secs(4);
/// Of the cold repositories the first refuses some branches.
const REFUSING_HOOK: &str = "#!/bin/sh\nwhile read -r old new name; do\n\
    case $name in refs/heads/refused-*) echo \"$name is refused\" >&2; exit 1 ;; esac\ndone\n";

/// What kind of session.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    pub(crate) seed: u64,
    pub(crate) seconds: u64,
    pub(crate) nodes: u16,
    pub(crate) writers: u64,
    pub(crate) readers: u64,
    pub(crate) only: Vec<String>,
    /// Whether those come all at once.
    pub(crate) together: bool,
    pub(crate) off: Option<SafetyStep>,
    /// So many of 256 pushes bring many references.
    pub(crate) many: u8,
    /// Keys of the coordinators' `[timing]` table.
    pub(crate) timing: Vec<(String, String)>,
    pub(crate) directory: PathBuf,
}

impl Options {
    /// Whether clocks are among what may be harmed. Else all processes have the machine's, without anything in between.
    fn may_move_clocks(&self) -> bool {
        let chosen = |harm: &Harm| self.only.is_empty() || self.only.contains(&harm.name());
        Harm::all().into_iter().any(|harm| harm.moves_clocks() && chosen(&harm))
    }
}

/// Runs it, prints the report, and answers what was broken.
pub(crate) async fn run(options: &Options) -> Result<Vec<Violation>> {
    fs::create_dir_all(&options.directory)?;
    println!(
        "seed {}, {} nodes, {} s: {}",
        options.seed,
        options.nodes,
        options.seconds,
        options.directory.display()
    );
    let recorder = Arc::new(Recorder::new(&options.directory)?);
    let (seed, seconds, nodes) = (options.seed, options.seconds, options.nodes);
    recorder.record(&Event::Session(Session { seed, seconds, nodes }))?;

    let clocks = if options.may_move_clocks() { Clocks::find()? } else { None };
    if options.may_move_clocks() && clocks.is_none() {
        println!("SKIPPED: clocks do not jump without libfaketime (apt-get install libfaketime)");
    }
    let size = Size { nodes, routers: 2, coordinators: 2 };
    let site = Site::start(size, &options.timing, clocks).await;
    if !site.own_disks {
        println!("SKIPPED: disks are not filled, because file systems cannot be mounted here (run as root)");
    }
    if let Some(step) = options.off {
        site.switch_off(step)?;
    }
    let work = tempfile::Builder::new().prefix("tabularium-faults-").tempdir_in("/tmp")?;
    let git = Git::new(&work.path().join("home"))?;
    let mut repositories = Vec::new();
    for number in 0..HOT_REPOSITORIES + COLD_REPOSITORIES {
        let hot = number < HOT_REPOSITORIES;
        let path = format!("{}-{number}.git", if hot { "hot" } else { "cold" });
        site.test.create(&path).await;
        let mut repository = Tested::new(&git, work.path(), &path, hot).await?;
        if number == HOT_REPOSITORIES {
            site.hook(&path, "pre-receive", REFUSING_HOOK).await?;
            repository.refuses = true;
        }
        repositories.push(repository);
    }
    site.test.create(rebirth::PATH).await;
    site.test.create(actor::PATH).await;
    let mut paths: Vec<_> = repositories.iter().map(|repository| repository.path.clone()).collect();
    let gateways = site.test.home().urls(Kind::Gateway);
    let rebirth = Rebirth::new(git.clone(), work.path(), gateways.clone(), Arc::clone(&recorder)).await?;
    let actor = Actor::new(git.clone(), work.path(), gateways.clone(), Arc::clone(&recorder)).await?;
    let clients = Clients::new(git.clone(), gateways, repositories, Arc::clone(&recorder), options.many);
    let clients = Arc::new(clients);
    let running = clients.start(options.writers, options.readers, seed);

    if options.writers > 0 {
        sleep(QUIET_BEFORE).await;
    }
    let (stores, recorded) = (work.path().to_owned(), Arc::clone(&recorder));
    let witness = Witness { git: git.clone(), stores, recorder: recorded };
    let hot = paths[..HOT_REPOSITORIES].to_vec();
    let mut nemesis = Nemesis::new(site, Arc::clone(&recorder), hot, (rebirth, witness, actor), options);
    let raged = nemesis.rage(Instant::now() + Duration::from_secs(seconds)).await;
    nemesis.rebirth.tell()?;
    let unmet = nemesis.unmet(&recorder.so_far()?);
    paths.extend([rebirth::PATH.to_owned(), actor::PATH.to_owned()]);
    let site = nemesis.site;
    if raged.is_err() {
        site.keep_logs(&options.directory.join("logs"))?;
    }
    raged.with_context(|| format!("logs: {}", options.directory.display()))?;
    let brief = options.off.is_some();
    sleep(if brief { BRIEF_QUIET_AFTER } else { QUIET_AFTER }).await;
    if let Err(hanging) = running.drain(DRAIN).await {
        recorder.record(&Event::Finding(Finding { what: "clients".into(), detail: hanging.to_string() }))?;
    }
    // Without a safety step a write may wait for what will never be.
    let unusable = if brief { Vec::new() } else { clients.close(seed).await? };
    for path in unusable {
        recorder.record(&Event::Finding(Finding { what: "unusable".into(), detail: path }))?;
    }

    let converged = healed::inspect(&site, &git, &paths, &recorder, brief).await?;
    println!("all replicas equal after {:.1} s", converged.as_secs_f64());
    site.keep_logs(&options.directory.join("logs"))?;
    let errors = died(&options.directory)?;
    for error in errors {
        recorder.record(&Event::Finding(Finding { what: "died".into(), detail: error }))?;
    }
    site.stop().await?;

    let history = History::read(&options.directory)?;
    ensure!(!history.writes.is_empty(), "no client wrote anything");
    let violations = checker::check(&history);
    print!("{}", Report::new(&history, &violations));
    if !unmet.is_empty() {
        println!("did not come: {}", unmet.join(", "));
    }
    Ok(violations)
}

/// Panics, by the services' own words.
fn died(directory: &std::path::Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory.join("logs"))? {
        let path = entry?.path();
        let text = fs::read(&path)?;
        let text = String::from_utf8_lossy(&text);
        let panics = text.lines().filter(|line| line.contains("panicked at"));
        found.extend(panics.map(|line| format!("{}: {line}", path.display())));
    }
    Ok(found)
}
