//! Starts the cluster in the order in which its parts need each other, and steers it.

use std::{
    ffi::OsString,
    fmt,
    fs::{self, File, OpenOptions, TryLockError},
    path::{Path, PathBuf},
    sync::Arc,
};

use futures::future::{join_all, try_join_all};
use tabularium_common::{ids::SiteName, tls};

use super::{
    LocalError, io_error, is_program,
    nats::NatsServer,
    ports::{PortPlan, Ports, Purpose},
    postgres::{Durability, PostgresServer},
    process::private_directory,
    recipe::{self, HomeSite, SiteFacts, Subscriber},
    record::{self, ClusterRecord, ProcessRecord, SiteRecord},
    service::{Kind, Service, State},
    tokens::SiteTokens,
    transport::{Transport, base_url},
};

/// Name of the site that takes pushes.
pub const HOME: &str = "home";
/// Name of the site that mirrors it.
pub const MIRROR: &str = "mirror";
/// Most processes of one kind at one site; the port plan has room for these.
const MAX_OF_A_KIND: u16 = 9;

/// How many of each service a site has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SiteSize {
    /// Storage nodes, one storage each.
    pub nodes: u16,
    /// Coordinators.
    pub coordinators: u16,
    /// Routers.
    pub routers: u16,
    /// Replicators.
    pub replicators: u16,
}

impl SiteSize {
    /// What `tabularium up` starts as the home site.
    pub const HOME: Self = Self { nodes: 3, coordinators: 2, routers: 2, replicators: 2 };
    /// The smaller mirror site.
    pub const MIRROR: Self = Self { nodes: 2, coordinators: 1, routers: 1, replicators: 1 };

    fn check(self) -> Result<(), LocalError> {
        let all = [
            ("nodes", self.nodes),
            ("coordinators", self.coordinators),
            ("routers", self.routers),
            ("replicators", self.replicators),
        ];
        match all.into_iter().find(|(_, count)| !(1..=MAX_OF_A_KIND).contains(count)) {
            Some((what, count)) => {
                Err(LocalError::Refused(format!("{count} {what}; allowed: 1 to {MAX_OF_A_KIND}")))
            }
            None => Ok(()),
        }
    }
}

/// How gateways find routers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gateways {
    /// One per site, over all of its routers.
    One,
    /// One per router: what enters at gateway 1 goes through router 1.
    PerRouter,
    /// That many, each over all routers of its site.
    Several(u16),
}

/// Puts something between two services: who is told an address (`home/router-1`), whose it is (`home/node-2`), and the
/// address itself (`host:port`), to the address that is told instead.
#[derive(Clone)]
pub struct Detour(Arc<Between>);

type Between = dyn Fn(&str, &str, &str) -> String + Send + Sync;

impl Detour {
    /// Asked once for each pair of services, when the first of them is configured.
    pub fn new(between: impl Fn(&str, &str, &str) -> String + Send + Sync + 'static) -> Self {
        Self(Arc::new(between))
    }
}

impl fmt::Debug for Detour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Detour")
    }
}

/// What processes find in their environment beside what they inherit, by their names: `home/node-1`, `postgres`.
#[derive(Clone)]
pub struct Environment(Arc<Variables>);

type Variables = dyn Fn(&str) -> Vec<(OsString, OsString)> + Send + Sync;

impl Environment {
    /// Asked once for each process.
    pub fn new(variables: impl Fn(&str) -> Vec<(OsString, OsString)> + Send + Sync + 'static) -> Self {
        Self(Arc::new(variables))
    }
}

impl fmt::Debug for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Environment")
    }
}

/// What to start.
#[derive(Debug, Clone)]
pub struct ClusterOptions {
    /// Everything is kept here. A second start finds what the first one stored.
    pub state: PathBuf,
    /// The site that takes pushes.
    pub home: SiteSize,
    /// The site that mirrors it, if any.
    pub mirror: Option<SiteSize>,
    /// Where to listen.
    pub ports: Ports,
    /// How many gateways.
    pub gateways: Gateways,
    /// Of Postgres. The state is removed too when it is [`Durability::ThrowAway`] and this process is killed.
    pub durability: Durability,
    /// Filter for the services' logs.
    pub log_filter: String,
    /// Keys of the coordinators' `[timing]` table, such as `("router_lease", "500ms")`.
    pub timing: Vec<(String, String)>,
    /// What stands between services, if anything. Only calls go through it; Postgres and NATS are reached directly.
    pub detour: Option<Detour>,
    /// Gives every service a directory `faults` where crash points are armed, see `tabularium_common::faults`.
    pub faults: bool,
    /// Of services and of Postgres.
    pub environment: Option<Environment>,
    /// What services speak over.
    pub transport: Transport,
    /// More of the nodes' configuration, such as a `[gitlab]` table.
    pub node_tables: toml::Table,
}

impl ClusterOptions {
    /// Both sites, ports of the kernel's choice.
    pub fn new(state: impl Into<PathBuf>) -> Self {
        Self {
            state: state.into(),
            home: SiteSize::HOME,
            mirror: Some(SiteSize::MIRROR),
            ports: Ports::Kernel,
            gateways: Gateways::One,
            durability: Durability::Full,
            log_filter: "info".to_owned(),
            timing: Vec::new(),
            detour: None,
            faults: false,
            environment: None,
            transport: Transport::Tcp,
            node_tables: toml::Table::new(),
        }
    }
}

/// What a start tells while it goes on.
pub type Progress<'a> = &'a (dyn Fn(&str) + Sync);

#[derive(Debug)]
struct Site {
    name: SiteName,
    size: SiteSize,
    number: u16,
    nats: NatsServer,
    database_url: String,
    tokens: SiteTokens,
}

fn variables(options: &ClusterOptions, process: &str) -> Vec<(OsString, OsString)> {
    options.environment.as_ref().map(|Environment(variables)| variables(process)).unwrap_or_default()
}

/// A running cluster. Dropping it kills every process; [`Cluster::stop`] is the orderly way.
#[derive(Debug)]
pub struct Cluster {
    options: ClusterOptions,
    binaries: PathBuf,
    services: Vec<Service>,
    sites: Vec<Site>,
    postgres: PostgresServer,
    ports: PortPlan,
    /// Held while the state directory is in use.
    _lock: File,
}

impl Cluster {
    /// Starts everything and waits until all of it is ready.
    pub async fn start(mut options: ClusterOptions, progress: Progress<'_>) -> Result<Self, LocalError> {
        options.home.check()?;
        options.mirror.map_or(Ok(()), SiteSize::check)?;
        let binaries = find_binaries()?;
        options.state = std::path::absolute(&options.state)
            .map_err(io_error(format!("cannot use {}", options.state.display())))?;
        let state = options.state.clone();
        make_state_directory(&state)?;
        let lock = lock(&state)?;
        if let Some(files) = options.transport.tls() {
            tls::install(&files.config());
        }
        progress("postgres");
        let environment = variables(&options, "postgres");
        let postgres =
            PostgresServer::start_with(&state.join("postgres"), options.durability, environment).await?;
        let ports = PortPlan::new(options.ports);
        let mut cluster =
            Self { options, binaries, services: Vec::new(), sites: Vec::new(), postgres, ports, _lock: lock };
        cluster.start_all(progress).await?;
        cluster.record().write(&state).map_err(io_error("cannot write cluster.json"))?;
        Ok(cluster)
    }

    async fn start_all(&mut self, progress: Progress<'_>) -> Result<(), LocalError> {
        progress("nats");
        self.add_site(HOME, self.options.home, 0).await?;
        if let Some(size) = self.options.mirror {
            self.add_site(MIRROR, size, 1).await?;
            // First of all services, because the home site's replicators want its address.
            let receiver = self.geo_receiver(1);
            self.start_group(vec![receiver], progress).await?;
        }
        for site in 0..self.sites.len() {
            let nodes = self.nodes(site)?;
            self.start_group(nodes, progress).await?;
            let coordinators = self.coordinators(site);
            self.start_group(coordinators, progress).await?;
            let routers = self.routers(site);
            self.start_group(routers, progress).await?;
            let gateways = self.gateways(site);
            self.start_group(gateways, progress).await?;
            let replicators = self.replicators(site);
            self.start_group(replicators, progress).await?;
        }
        Ok(())
    }

    async fn add_site(&mut self, name: &str, size: SiteSize, number: u16) -> Result<(), LocalError> {
        let throw_away = self.options.durability == Durability::ThrowAway;
        let nats = NatsServer::start_with(
            &self.options.state.join(name).join("nats"),
            None,
            throw_away,
            self.options.transport.tls(),
        )
        .await?;
        let database = format!("tabularium_{name}");
        self.postgres.create_database(&database).await?;
        let database_url = self.postgres.url(&database);
        let tokens = SiteTokens::prepare(&self.options.state.join("tokens"), name)?;
        let name = name.parse().map_err(|error| LocalError::Refused(format!("site `{name}` {error}")))?;
        self.sites.push(Site { name, size, number, nats, database_url, tokens });
        Ok(())
    }

    /// Starts services side by side.
    async fn start_group(
        &mut self,
        mut group: Vec<Service>,
        progress: Progress<'_>,
    ) -> Result<(), LocalError> {
        let started = try_join_all(group.iter_mut().map(|service| async move {
            progress(&service.name);
            service.start().await
        }))
        .await;
        self.services.append(&mut group);
        started.map(drop)
    }

    fn service(&self, site: usize, kind: Kind, index: u16, config: toml::Table) -> Service {
        let name = self.service_name(site, kind, index);
        let directory = self.options.state.join(&name);
        let environment = variables(&self.options, &name);
        let program = self.binaries.join(kind.binary());
        let service = Service::new(kind, name, directory, program, config).with_environment(environment);
        if self.options.faults { service.with_faults() } else { service }
    }

    /// `home/node-1`.
    fn service_name(&self, site: usize, kind: Kind, index: u16) -> String {
        let site = self.sites[site].name.as_str();
        match kind {
            Kind::GeoReceiver => format!("{site}/{}", kind.name()),
            _ => format!("{site}/{}-{}", kind.name(), index + 1),
        }
    }

    fn facts(&self, site: usize) -> SiteFacts<'_> {
        let log_filter = &self.options.log_filter;
        let Site { name, nats, database_url, tokens, .. } = &self.sites[site];
        let tls = self.options.transport.tls();
        SiteFacts { name: name.as_str(), database_url, nats_url: nats.url(), tokens, log_filter, tls }
    }

    /// Where a service is to listen for gRPC or, when that is all it has, for HTTP.
    fn listen(&mut self, site: usize, kind: Kind, index: u16) -> String {
        let port = self.ports.port(self.sites[site].number, Purpose::Main(kind), index);
        let directory = self.options.state.join(self.service_name(site, kind, index));
        match kind {
            Kind::Gateway | Kind::GeoReceiver => self.options.transport.http(port),
            _ => self.options.transport.grpc(port, &directory),
        }
    }

    fn nodes(&mut self, site: usize) -> Result<Vec<Service>, LocalError> {
        let mut services = Vec::new();
        for index in 0..self.sites[site].size.nodes {
            let listen = self.listen(site, Kind::Node, index);
            let storage = storage_name(index);
            let path = self.storage_path(site, index);
            private_directory(&path).map_err(io_error(format!("cannot create {}", path.display())))?;
            let mut config = recipe::node(&self.facts(site), &storage, &path, &listen);
            config.extend(self.options.node_tables.clone());
            services.push(self.service(site, Kind::Node, index, config));
        }
        Ok(services)
    }

    fn storage_path(&self, site: usize, index: u16) -> PathBuf {
        self.options.state.join(self.sites[site].name.as_str()).join(storage_name(index)).join("storage")
    }

    fn coordinators(&mut self, site: usize) -> Vec<Service> {
        let subscriber = (site == 0 && self.sites.len() > 1).then_some(MIRROR);
        let home = self.home_url(site);
        let home = home.as_deref().map(|url| HomeSite { name: HOME, url });
        (0..self.sites[site].size.coordinators)
            .map(|index| {
                let grpc = self.listen(site, Kind::Coordinator, index);
                let http = self.ports.port(self.sites[site].number, Purpose::CoordinatorHttp, index);
                let http = self.options.transport.http(http);
                let name = self.service_name(site, Kind::Coordinator, index);
                let nodes = self.addresses(site, &name, Kind::Node, Service::grpc);
                let storages: Vec<_> = (0..).map(storage_name).zip(nodes).collect();
                let facts = self.facts(site);
                let timing = &self.options.timing;
                let config =
                    recipe::coordinator(&facts, (&grpc, &http), &storages, subscriber, home.as_ref(), timing);
                self.service(site, Kind::Coordinator, index, config)
            })
            .collect()
    }

    fn routers(&mut self, site: usize) -> Vec<Service> {
        (0..self.sites[site].size.routers)
            .map(|index| {
                let name = self.service_name(site, Kind::Router, index);
                let coordinators = self.addresses(site, &name, Kind::Coordinator, Service::grpc);
                let listen = self.listen(site, Kind::Router, index);
                // Each prefers another coordinator, so that both are in use.
                let coordinators = rotated(&coordinators, index);
                let config = recipe::router(&self.facts(site), &listen, &coordinators);
                self.service(site, Kind::Router, index, config)
            })
            .collect()
    }

    fn gateways(&mut self, site: usize) -> Vec<Service> {
        let count = match self.options.gateways {
            Gateways::One => 1,
            Gateways::PerRouter => self.sites[site].size.routers,
            Gateways::Several(count) => count,
        };
        (0..count)
            .map(|index| {
                let name = self.service_name(site, Kind::Gateway, index);
                let coordinators = self.addresses(site, &name, Kind::Coordinator, Service::grpc);
                let mut routers = self.addresses(site, &name, Kind::Router, Service::grpc);
                if self.options.gateways == Gateways::PerRouter {
                    routers = vec![routers.swap_remove(usize::from(index))];
                }
                let listen = self.listen(site, Kind::Gateway, index);
                let config = recipe::gateway(&self.facts(site), &listen, &routers, &coordinators);
                self.service(site, Kind::Gateway, index, config)
            })
            .collect()
    }

    fn replicators(&mut self, site: usize) -> Vec<Service> {
        let gateway = self.listening(site, Kind::Gateway, Service::http).into_iter().next();
        let external_url = gateway.map(|address| base_url(&address));
        let receiver = self.listening(1, Kind::GeoReceiver, Service::http).into_iter().next();
        let subscriber = receiver.as_deref().filter(|_| site == 0).map(|receiver| Subscriber {
            name: MIRROR,
            receiver,
            hook_token: &self.sites[1].tokens.hook,
        });
        let home = self.home_url(site);
        let home = home.as_deref().map(|url| HomeSite { name: HOME, url });
        (0..self.sites[site].size.replicators)
            .map(|index| {
                let name = self.service_name(site, Kind::Replicator, index);
                let coordinators = self.addresses(site, &name, Kind::Coordinator, Service::grpc);
                let coordinators = rotated(&coordinators, index);
                let routers = self.addresses(site, &name, Kind::Router, Service::grpc);
                let router = rotated(&routers, index).swap_remove(0);
                let facts = self.facts(site);
                let peers = recipe::Peers {
                    coordinators: &coordinators,
                    router: &router,
                    external_url: external_url.as_deref(),
                    subscriber: subscriber.as_ref(),
                    home_site: home.as_ref(),
                };
                let config = recipe::replicator(&facts, &peers);
                self.service(site, Kind::Replicator, index, config)
            })
            .collect()
    }

    fn geo_receiver(&mut self, site: usize) -> Service {
        let listen = self.listen(site, Kind::GeoReceiver, 0);
        let config = recipe::geo_receiver(&self.facts(site), &listen, HOME);
        self.service(site, Kind::GeoReceiver, 0, config)
    }

    /// Where a mirror site fetches from; `None` for the home site itself.
    fn home_url(&self, site: usize) -> Option<String> {
        let gateway = self.listening(0, Kind::Gateway, Service::http).into_iter().next();
        gateway.filter(|_| site > 0).map(|address| base_url(&address))
    }

    /// Where the services of one kind listen.
    fn listening(&self, site: usize, kind: Kind, of: fn(&Service) -> Option<&str>) -> Vec<String> {
        self.addresses(site, "", kind, of)
    }

    /// Where `user` reaches the services of one kind: as [`Cluster::listening`], by the detour if there is one.
    fn addresses(
        &self,
        site: usize,
        user: &str,
        kind: Kind,
        of: fn(&Service) -> Option<&str>,
    ) -> Vec<String> {
        let Some(site) = self.sites.get(site) else { return Vec::new() };
        let services = self.of_site(site).filter(|service| service.kind == kind);
        let told = |service: &Service| {
            let address = of(service)?;
            let Some(Detour(between)) = self.options.detour.as_ref().filter(|_| !user.is_empty()) else {
                return Some(address.to_owned());
            };
            let (scheme, host) = address.split_at(address.find("://").map_or(0, |at| at + "://".len()));
            Some(format!("{scheme}{}", between(user, &service.name, host)))
        };
        services.filter_map(told).collect()
    }

    fn of_site<'a>(&'a self, site: &'a Site) -> impl Iterator<Item = &'a Service> {
        let prefix = format!("{}/", site.name);
        self.services.iter().filter(move |service| service.name.starts_with(&prefix))
    }

    /// Where everything is. Addresses stay what they are over restarts of processes.
    pub fn record(&self) -> ClusterRecord {
        let sites = self.sites.iter().map(|site| self.site_record(site)).collect();
        ClusterRecord {
            supervisor_pid: std::process::id(),
            sites,
            tls: self.options.transport.tls().cloned(),
        }
    }

    fn site_record(&self, site: &Site) -> SiteRecord {
        let process = |service: &Service| ProcessRecord {
            name: service.name.clone(),
            kind: service.kind,
            pid: service.pid().unwrap_or_default(),
            grpc: service.grpc().map(str::to_owned),
            http: service.http().map(str::to_owned),
            admin: service.admin().map(str::to_owned),
            program: service.program().to_owned(),
            config: service.config_path(),
            log: service.log(),
            storage: (service.kind == Kind::Node).then(|| service.log().with_file_name("storage")),
        };
        SiteRecord {
            name: site.name.to_string(),
            database_url: site.database_url.clone(),
            nats_url: site.nats.url(),
            node_token_file: site.tokens.node.clone(),
            router_token_file: site.tokens.router.clone(),
            coordinator_token_file: site.tokens.coordinator.clone(),
            processes: self.of_site(site).map(process).collect(),
        }
    }

    /// The state directory.
    pub fn state_directory(&self) -> &Path {
        &self.options.state
    }

    /// Every process with its state, servers included.
    pub fn states(&mut self) -> Vec<(String, State)> {
        let server = |pid: Option<u32>, ended: Option<String>| match (pid, ended) {
            (_, Some(how)) => State::Ended { how },
            (Some(_), None) => State::Running,
            (None, None) => State::Stopped,
        };
        let mut states = vec![("postgres".to_owned(), server(self.postgres.pid(), self.postgres.ended()))];
        for site in &mut self.sites {
            states.push((format!("{}/nats", site.name), server(site.nats.pid(), site.nats.ended())));
        }
        states.extend(self.services.iter_mut().map(|service| (service.name.clone(), service.state())));
        states
    }

    /// Process ids of everything that runs.
    pub fn pids(&self) -> Vec<u32> {
        let servers = self.sites.iter().map(|site| site.nats.pid()).chain([self.postgres.pid()]);
        servers.chain(self.services.iter().map(Service::pid)).flatten().collect()
    }

    /// Process id of the Postgres server, when it runs.
    pub fn postgres_pid(&self) -> Option<u32> {
        self.postgres.pid()
    }

    /// SIGKILL to a process such as `home/node-1`, `home/nats` or `postgres`.
    pub fn kill(&mut self, name: &str) -> Result<(), LocalError> {
        match self.find(name)? {
            Part::Postgres(postgres) => postgres.kill(),
            Part::Nats(nats) => nats.kill(),
            Part::Service(service) => service.kill(),
        }
    }

    /// SIGSTOP to a process of a service: it keeps its connections and answers nothing.
    pub fn pause(&mut self, name: &str) -> Result<(), LocalError> {
        match self.find(name)? {
            Part::Service(service) => service.pause(),
            _ => Err(LocalError::Refused(format!("{name} cannot be paused"))),
        }
    }

    /// SIGCONT after [`Cluster::pause`].
    pub fn resume(&mut self, name: &str) -> Result<(), LocalError> {
        match self.find(name)? {
            Part::Service(service) => service.resume(),
            _ => Err(LocalError::Refused(format!("{name} cannot be resumed"))),
        }
    }

    /// SIGTERM to a process; waits until it has ended.
    pub async fn terminate(&mut self, name: &str) -> Result<(), LocalError> {
        match self.find(name)? {
            Part::Postgres(postgres) => postgres.stop().await,
            Part::Nats(nats) => nats.stop().await,
            Part::Service(service) => service.stop().await,
        }
    }

    /// Starts a process again, on the same addresses and data, and waits until it is ready. Stops it first if it runs.
    pub async fn restart(&mut self, name: &str) -> Result<(), LocalError> {
        match self.find(name)? {
            Part::Postgres(postgres) => postgres.restart().await?,
            Part::Nats(nats) => nats.restart().await?,
            Part::Service(service) => {
                service.stop().await?;
                service.start().await?;
            }
        }
        self.record().write(&self.options.state).map_err(io_error("cannot write cluster.json"))
    }

    /// Restarts the NATS server of a site with everything it stored lost.
    pub async fn restart_nats_empty(&mut self, site: &str) -> Result<(), LocalError> {
        match self.find(&format!("{site}/nats"))? {
            Part::Nats(nats) => nats.restart_empty().await,
            _ => Err(LocalError::Refused(format!("{site} has no NATS server"))),
        }
    }

    fn find(&mut self, name: &str) -> Result<Part<'_>, LocalError> {
        if name == "postgres" {
            return Ok(Part::Postgres(&mut self.postgres));
        }
        if let Some(site) = name.strip_suffix("/nats")
            && let Some(site) = self.sites.iter_mut().find(|found| found.name.as_str() == site)
        {
            return Ok(Part::Nats(&mut site.nats));
        }
        self.services
            .iter_mut()
            .find(|service| service.name == name)
            .map(Part::Service)
            .ok_or_else(|| LocalError::Refused(format!("the cluster has no process `{name}`")))
    }

    /// Stops everything in an orderly way: first what takes work, last what keeps state.
    pub async fn stop(mut self) -> Result<(), LocalError> {
        let mut first_error = Ok(());
        for kinds in [
            &[Kind::Gateway, Kind::GeoReceiver, Kind::Replicator][..],
            &[Kind::Router],
            &[Kind::Coordinator],
            &[Kind::Node],
        ] {
            let group = self.services.iter_mut().filter(|service| kinds.contains(&service.kind));
            for result in join_all(group.map(Service::stop)).await {
                first_error = first_error.and(result);
            }
        }
        for site in &mut self.sites {
            first_error = first_error.and(site.nats.stop().await);
        }
        first_error = first_error.and(self.postgres.stop().await);
        match fs::remove_file(self.options.state.join(record::FILE_NAME)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                first_error.and(Err(io_error("cannot remove cluster.json")(error)))
            }
            _ => first_error,
        }
    }
}

enum Part<'a> {
    Postgres(&'a mut PostgresServer),
    Nats(&'a mut NatsServer),
    Service(&'a mut Service),
}

fn storage_name(index: u16) -> String {
    format!("node-{}", index + 1)
}

fn rotated(items: &[String], by: u16) -> Vec<String> {
    let mut items = items.to_vec();
    let by = usize::from(by) % items.len().max(1);
    items.rotate_left(by);
    items
}

/// Postgres may have to pass through the directory as another user when it is in a place that others can reach.
fn make_state_directory(state: &Path) -> Result<(), LocalError> {
    use std::os::unix::fs::PermissionsExt as _;
    let make = || {
        fs::create_dir_all(state)?;
        fs::set_permissions(state, fs::Permissions::from_mode(0o711))
    };
    make().map_err(io_error(format!("cannot create {}", state.display())))
}

fn lock(state: &Path) -> Result<File, LocalError> {
    let path = state.join("lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(io_error(format!("cannot open {}", path.display())))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(LocalError::Refused(format!(
            "a cluster is already running in {}; stop it (Ctrl-C where it runs), or choose another --state-dir",
            state.display()
        ))),
        Err(TryLockError::Error(error)) => Err(io_error(format!("cannot lock {}", path.display()))(error)),
    }
}

/// The directory with the programs of every service: that of this program, or one above it (tests run from
/// `target/debug/deps`).
pub fn find_binaries() -> Result<PathBuf, LocalError> {
    let here = std::env::current_exe().map_err(io_error("cannot find this program's own file"))?;
    let missing = |directory: &Path| {
        Kind::ALL.into_iter().map(Kind::binary).find(|name| !is_program(&directory.join(name)))
    };
    let beside = here.parent().unwrap_or(Path::new("/"));
    here.ancestors().skip(1).find(|directory| missing(directory).is_none()).map(Path::to_owned).ok_or_else(
        || LocalError::MissingProgram {
            program: missing(beside).unwrap_or_default(),
            hint: format!("expected beside {}; build it: cargo build --bins", here.display()),
        },
    )
}
