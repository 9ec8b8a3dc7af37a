//! Does harm, one or two things at a time, in an order that the seed decides; takes each back, and goes on.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use rand::{
    Rng as _, SeedableRng as _,
    rngs::StdRng,
    seq::{IndexedRandom as _, SliceRandom as _},
};
use tabularium_common::faults::CrashPoint;
use tabularium_testkit::{
    cluster::service::Kind as Service,
    proxy::{Direction, Fault as Relay},
};
use tokio::time::{Instant, sleep};

use crate::{
    cluster::Site,
    harm::{Callee, Harm, Trouble},
    history::{Event, Fault, Finding, History, Micros, Recorder},
    rebirth::Rebirth,
    scenes::actor::Actor,
    session::Options,
    witness::Witness,
};

/// Between two faults, and what counts as the time of the one before: the cluster notices that it is over.
const REST: Duration = Duration::from_secs(4);
/// How long a crash point may wait for somebody to come by.
const CRASH_PATIENCE: Duration = Duration::from_secs(4);
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// How much earlier than it is noticed a process may have died on a busy machine, in microseconds.
const STRIKE: Micros = 50_000;
/// How much slower a slow link answers.
const DELAY: Duration = Duration::from_millis(200);
/// What a node does between the two disks that it is given.
const DISK_AGE: Duration = Duration::from_secs(6);

/// What has been done and is to be taken back.
struct Done {
    harm: Harm,
    target: String,
    begun: Micros,
    disks: Vec<String>,
}

/// Who does it.
pub(crate) struct Nemesis {
    pub(crate) site: Site,
    recorder: Arc<Recorder>,
    random: StdRng,
    /// Repositories whose primaries are worth killing.
    hot: Vec<String>,
    /// What is still to be done before anything is done again.
    deck: Vec<Harm>,
    harms: Vec<Harm>,
    /// Everything is done at once, in the order in which it was asked for.
    together: bool,
    pub(crate) rebirth: Rebirth,
    witness: Witness,
    actor: Actor,
}

impl Nemesis {
    pub(crate) fn new(
        site: Site,
        recorder: Arc<Recorder>,
        hot: Vec<String>,
        (rebirth, witness, actor): (Rebirth, Witness, Actor),
        Options { seed, only, together, .. }: &Options,
    ) -> Self {
        let chosen = |harm: &Harm| only.is_empty() || only.contains(&harm.name());
        let possible = |harm: &Harm| site.own_disks || !matches!(harm, Harm::DiskFull(_));
        let timely = |harm: &Harm| site.clocks.is_some() || !harm.moves_clocks();
        let mut harms: Vec<_> =
            Harm::all().into_iter().filter(chosen).filter(possible).filter(timely).collect();
        if *together {
            harms.sort_by_key(|harm| only.iter().position(|name| *name == harm.name()));
            harms.dedup();
        }
        Self {
            site,
            recorder,
            random: StdRng::seed_from_u64(*seed),
            hot,
            deck: Vec::new(),
            harms,
            together: *together,
            rebirth,
            witness,
            actor,
        }
    }

    /// Goes on until the time is over, then leaves everything as it found it.
    pub(crate) async fn rage(&mut self, end: Instant) -> Result<()> {
        while Instant::now() < end && !self.harms.is_empty() {
            let mut harms = vec![self.draw()];
            if self.together {
                harms.clone_from(&self.harms);
            } else if self.random.random_ratio(1, 4) && self.harms.len() > 1 {
                let another = self.draw();
                if another.leaves_some_of(harms[0]) {
                    harms.push(another);
                } else {
                    self.deck.push(another);
                }
            }
            let mut done = Vec::new();
            for path in &self.hot {
                tracing::info!("{}", self.site.standing(path).await);
            }
            for harm in harms {
                if let Some(one) = self.harm(harm).await.with_context(|| harm.name())? {
                    tracing::info!(harm = harm.name(), target = one.target, "harm");
                    done.push(one);
                }
            }
            if done.is_empty() {
                continue;
            }
            let held = Duration::from_millis(self.random.random_range(1_500..7_000));
            let held = done.iter().filter_map(|one| one.harm.held()).max().unwrap_or(held);
            sleep(held).await;
            self.heal(&done).await?;
            sleep(REST).await;
            for one in done {
                self.recorder.record(&Event::Fault(Fault {
                    kind: one.harm.name(),
                    target: one.target,
                    begun: one.begun,
                    healed: self.recorder.now(),
                }))?;
            }
        }
        Ok(())
    }

    /// What was to come and did not, or found nothing to do harm to.
    pub(crate) fn unmet(&self, history: &History) -> Vec<String> {
        let met = |name: &String| history.faults.iter().any(|fault| fault.kind == *name);
        let names: BTreeSet<_> = self.harms.iter().map(|harm| harm.name()).collect();
        names.into_iter().filter(|name| !met(name)).collect()
    }

    /// Every kind comes before any comes again.
    fn draw(&mut self) -> Harm {
        if self.deck.is_empty() {
            self.deck.clone_from(&self.harms);
        }
        let index = self.random.random_range(0..self.deck.len());
        self.deck.swap_remove(index)
    }

    fn any(&mut self, kind: Service) -> Result<String> {
        let names = self.site.names(kind);
        names.choose(&mut self.random).cloned().with_context(|| format!("no {}", kind.name()))
    }

    async fn primary(&mut self) -> Result<Option<String>> {
        let path = self.hot.choose(&mut self.random).cloned().context("no repository")?;
        // Nobody answers while the database is away; then there is nothing to aim at.
        Ok(self.site.primary(&path).await.ok())
    }

    /// Nothing when there was nothing to do it to.
    async fn harm(&mut self, harm: Harm) -> Result<Option<Done>> {
        let mut done = Done { harm, target: String::new(), begun: self.recorder.now(), disks: Vec::new() };
        done.target = match harm {
            Harm::KillPrimary | Harm::StopPrimary => match self.primary().await? {
                Some(primary) => primary,
                None => return Ok(None),
            },
            Harm::KillNode | Harm::OldDisk => self.any(Service::Node)?,
            Harm::IsolateRouter | Harm::Scene(_) => self.any(Service::Router)?,
            Harm::Kill(kind) | Harm::Stop(kind) | Harm::StopLong(kind) | Harm::Clock(kind, _) => {
                self.any(kind)?
            }
            Harm::Link(callee, _) => self.any(callee.service())?,
            Harm::NatsRestart | Harm::NatsEmpty | Harm::NatsDown | Harm::NatsGone => "nats".to_owned(),
            Harm::PostgresRestart
            | Harm::PostgresDown
            | Harm::PostgresGone
            | Harm::PostgresStop
            | Harm::PostgresClock(_) => "postgres".to_owned(),
            Harm::LonePrimary => self.hot.choose(&mut self.random).cloned().context("no repository")?,
            Harm::DiskFull(_) | Harm::Crash(_) | Harm::Rebirth => String::new(),
        };
        done.begun = self.recorder.now();
        match harm {
            Harm::KillPrimary => self.site.kill_alone(&done.target)?,
            Harm::KillNode
            | Harm::Kill(_)
            | Harm::NatsDown
            | Harm::NatsGone
            | Harm::PostgresDown
            | Harm::PostgresGone => {
                self.site.kill(&done.target)?;
            }
            Harm::StopPrimary | Harm::Stop(_) | Harm::StopLong(_) => self.site.pause(&done.target)?,
            Harm::PostgresStop => self.site.pause_postgres()?,
            Harm::OldDisk => {
                self.site.cut_power(&done.target).await?;
                let disk = self.site.copy_disk(&done.target)?;
                self.site.run_all().await?;
                sleep(DISK_AGE).await;
                self.site.cut_power(&done.target).await?;
                self.site.put_disk_back(&done.target, &disk)?;
            }
            Harm::LonePrimary => match self.witness.lone_primary(&mut self.site, &done.target).await? {
                Some(findings) => self.find(findings)?,
                None => return Ok(None),
            },
            Harm::Rebirth => match self.rebirth.again(&mut self.site, &mut self.random).await? {
                Some(behind) => done.target = behind,
                None => return Ok(None),
            },
            Harm::Scene(scene) => {
                let routers = self.site.names(Service::Router);
                let router = routers.iter().position(|name| *name == done.target).unwrap_or(0);
                let cast = (&self.actor, &self.witness);
                if let Some(findings) = scene.play(&mut self.site, cast, router).await? {
                    self.find(findings)?;
                } else {
                    // What has been set for it is to be taken back.
                    tracing::warn!(scene = scene.name(), "not played");
                }
            }
            Harm::Link(callee, trouble) => self.trouble(callee, trouble, &mut done.target),
            Harm::IsolateRouter => {
                self.site.links.each(&done.target, "coordinator", |proxy| proxy.set(Relay::BlackHole));
            }
            Harm::NatsRestart | Harm::PostgresRestart => {
                self.site.kill(&done.target)?;
                self.site.run_all().await?;
            }
            Harm::NatsEmpty => self.site.restart_nats_empty().await?,
            Harm::DiskFull(count) => {
                let nodes = self.site.names(Service::Node);
                done.disks = nodes.choose_multiple(&mut self.random, count).cloned().collect();
                for node in &done.disks {
                    self.site.fill(node)?;
                }
                done.target = done.disks.join("+");
            }
            Harm::Clock(_, jump) | Harm::PostgresClock(jump) => {
                let seconds = if self.random.random() { jump.seconds() } else { -jump.seconds() };
                self.site.move_clock(&done.target, seconds)?;
                done.target = format!("{} by {seconds} s", done.target);
            }
            Harm::Crash(point) => match self.crash(point).await? {
                Some(struck) => (done.target, done.begun) = struck,
                None => return Ok(None),
            },
        }
        Ok(Some(done))
    }

    fn find(&self, findings: Vec<Finding>) -> Result<()> {
        findings.into_iter().try_for_each(|finding| self.recorder.record(&Event::Finding(finding)))
    }

    /// Half of the time all callers suffer, else one of them, so that they see different worlds.
    fn trouble(&mut self, callee: Callee, trouble: Trouble, target: &mut String) {
        let callers = match callee {
            Callee::Node => ["coordinator-1", "coordinator-2", "", ""],
            Callee::Coordinator => ["router-1", "router-2", "router", ""],
            Callee::Router => ["gateway-1", "gateway-2", "", ""],
        };
        let caller = callers[self.random.random_range(0..callers.len())];
        self.site.links.each(caller, target, |proxy| match trouble {
            Trouble::Cut => proxy.cut(),
            Trouble::Swallow => proxy.set(Relay::BlackHole),
            Trouble::SwallowRequests => proxy.set_one_way(Direction::Up, Relay::BlackHole),
            Trouble::SwallowAnswers => proxy.set_one_way(Direction::Down, Relay::BlackHole),
            Trouble::Delay => proxy.set(Relay::Delay(DELAY)),
        });
        if !caller.is_empty() {
            *target = format!("{caller} to {target}");
        }
    }

    /// Arms the point in one process after the other until one is struck; answers which, and when.
    async fn crash(&mut self, point: CrashPoint) -> Result<Option<(String, Micros)>> {
        let kind = Service::ALL.into_iter().find(|kind| kind.name() == point.service());
        let mut names = self.site.names(kind.context("no such service")?);
        names.shuffle(&mut self.random);
        for target in names {
            self.site.arm(&target, point)?;
            let end = Instant::now() + CRASH_PATIENCE;
            loop {
                // Clients hear of its end before it is noticed here.
                let alive = self.recorder.now();
                sleep(LOOK_INTERVAL).await;
                if self.site.ended(&target) {
                    return Ok(Some((target, alive.saturating_sub(STRIKE))));
                }
                if Instant::now() > end && self.site.disarm(&target, point)? {
                    break;
                }
            }
        }
        tracing::warn!(point = point.name(), "nobody came by");
        Ok(None)
    }

    async fn heal(&mut self, done: &[Done]) -> Result<()> {
        self.site.links.heal();
        self.site.right_clocks()?;
        for node in done.iter().flat_map(|one| &one.disks) {
            self.site.empty(node)?;
        }
        if done.iter().any(|one| one.harm == Harm::PostgresStop) {
            self.site.resume_postgres()?;
        }
        self.site.run_all().await
    }
}
