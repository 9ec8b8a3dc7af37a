//! What the router adds to a call, against the same call made directly.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use tabularium_cli::local::process::{Guarded, Launch, describe, tail};
use tabularium_common::{
    announce::Announcement,
    grpc::{self, Address, ListenAddress, Listener},
    lifecycle::Tasks,
};
use tabularium_proto::{
    coordinator::routing_service_server::RoutingServiceServer,
    gitaly::{
        GetBlobRequest, RefExistsRequest, Repository, blob_service_client::BlobServiceClient,
        ref_service_client::RefServiceClient,
    },
};
use tonic::transport::Channel;

use crate::{
    figures::{Bar, Figures, median},
    process,
    relay_backend::{CHUNK_BYTES, OneRoute, START_TIMEOUT, VIRTUAL_STORAGE},
};

const REQUESTS_ALONE: usize = 1500;
const REQUESTS_TOGETHER: usize = 20_000;
const CONCURRENCY: usize = 64;
const STREAM_BYTES: i64 = 1024 * 1024 * 1024;
const STALLED_STREAMS: usize = 64;

/// One side of the comparison.
struct Side {
    refs: RefServiceClient<Channel>,
    blobs: BlobServiceClient<Channel>,
}

impl Side {
    fn new(address: &Address) -> Self {
        let channel = grpc::channel(address);
        Self { refs: RefServiceClient::new(channel.clone()), blobs: BlobServiceClient::new(channel) }
    }
}

fn repository() -> Repository {
    Repository {
        storage_name: VIRTUAL_STORAGE.to_owned(),
        relative_path: "bench/relay.git".to_owned(),
        gl_repository: "project-1".to_owned(),
        ..Repository::default()
    }
}

fn ref_exists() -> RefExistsRequest {
    RefExistsRequest { repository: Some(repository()), r#ref: b"refs/heads/main".to_vec() }
}

/// Median latency of calls made one after another, in microseconds.
async fn alone(side: &Side) -> Result<f64> {
    let mut refs = side.refs.clone();
    let mut latencies = Vec::with_capacity(REQUESTS_ALONE);
    for _ in 0..REQUESTS_ALONE {
        let begun = Instant::now();
        let answer = refs.ref_exists(ref_exists()).await?.into_inner();
        latencies.push(begun.elapsed().as_secs_f64() * 1e6);
        ensure!(answer.value, "the backend's answer did not arrive");
    }
    Ok(median(latencies))
}

/// Median latency at [`CONCURRENCY`], in microseconds, and how long all took.
async fn together(side: &Side) -> Result<(f64, Duration)> {
    let begun = Instant::now();
    let mut workers = tokio::task::JoinSet::new();
    for _ in 0..CONCURRENCY {
        let mut refs = side.refs.clone();
        workers.spawn(async move {
            let mut latencies = Vec::with_capacity(REQUESTS_TOGETHER / CONCURRENCY);
            for _ in 0..REQUESTS_TOGETHER / CONCURRENCY {
                let begun = Instant::now();
                refs.ref_exists(ref_exists()).await?;
                latencies.push(begun.elapsed().as_secs_f64() * 1e6);
            }
            Ok::<_, tonic::Status>(latencies)
        });
    }
    let mut latencies = Vec::new();
    while let Some(worker) = workers.join_next().await {
        latencies.extend(worker??);
    }
    Ok((median(latencies), begun.elapsed()))
}

/// Seconds that one long stream took.
async fn stream(side: &Side) -> Result<f64> {
    let request = GetBlobRequest { repository: Some(repository()), oid: "0".repeat(40), limit: STREAM_BYTES };
    let begun = Instant::now();
    let mut messages = side.blobs.clone().get_blob(request).await?.into_inner();
    let mut received = 0;
    while let Some(message) = messages.message().await? {
        received += i64::try_from(message.data.len())?;
    }
    ensure!(received == STREAM_BYTES, "{received} of {STREAM_BYTES} bytes arrived");
    Ok(begun.elapsed().as_secs_f64())
}

/// Memory that the router holds for each stream whose reader has stopped, in MiB.
async fn stalled_streams(address: &Address, router: u32) -> Result<f64> {
    let before = process::resident_mebibytes(router)?;
    // A connection for each: on a shared one the window of the connection would hide what a stream costs.
    let mut held = Vec::new();
    for _ in 0..STALLED_STREAMS {
        let mut side = Side::new(address);
        let request =
            GetBlobRequest { repository: Some(repository()), oid: "0".repeat(40), limit: STREAM_BYTES };
        let mut messages = side.blobs.get_blob(request).await?.into_inner();
        messages.message().await?.context("the stream ended at once")?;
        held.push((side, messages));
    }
    // The windows fill within milliseconds; wait until the router's memory stands still.
    let mut last = process::resident_mebibytes(router)?;
    loop {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let now = process::resident_mebibytes(router)?;
        if (now - last).abs() < 0.5 {
            break;
        }
        last = now;
    }
    let grown = process::peak_mebibytes(router)? - before;
    drop(held);
    Ok(grown.max(0.0) / STALLED_STREAMS as f64)
}

/// A process that serves, and is stopped when this is dropped.
pub(crate) struct Started {
    _process: Guarded,
    pub(crate) pid: u32,
    pub(crate) address: Address,
}

/// Starts a process and waits until it says where it listens.
pub(crate) async fn start(launch: Launch, announce: PathBuf) -> Result<Started> {
    let name = launch.program.display();
    let mut process = launch.start().with_context(|| format!("{name}"))?;
    let begun = Instant::now();
    loop {
        if let Some(announcement) = Announcement::read(&announce)? {
            let address = announcement.grpc.context("no gRPC address announced")?.parse()?;
            return Ok(Started { pid: announcement.pid, _process: process, address });
        }
        if let Some(status) = process.try_wait()? {
            anyhow::bail!("{name} {}: {}", describe(status), tail(&launch.log));
        }
        ensure!(begun.elapsed() < START_TIMEOUT, "{name} did not start: {}", tail(&launch.log));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A coordinator that knows the one node at `address`.
pub(crate) async fn start_coordinator(address: &Address, directory: &Path, tasks: &Tasks) -> Result<Address> {
    let listener = Listener::bind(&ListenAddress::Unix(directory.join("coordinator.sock"))).await?;
    let coordinator = listener.address()?;
    let stopping = tasks.stopping();
    let service = RoutingServiceServer::new(OneRoute::new(address.to_string()));
    tasks.spawn("coordinator", async move {
        let server = grpc::server().add_service(service);
        if let Err(error) =
            server.serve_with_incoming_shutdown(listener.connections(), stopping.cancelled_owned()).await
        {
            tracing::error!(%error, "the coordinator of the measurement failed");
        }
    });
    Ok(coordinator)
}

/// Measures and prints.
pub(crate) async fn run(rounds: usize) -> Result<Figures> {
    let directory = tempfile::tempdir()?;
    let tasks = Tasks::new();
    let this = std::env::current_exe()?;
    let announce = directory.path().join("backend.json");
    let launch = Launch::new(&this, directory.path().join("backend.log"));
    let backend = start(launch.arg("relay-backend").arg("--announce").arg(&announce), announce).await?;
    let coordinator = start_coordinator(&backend.address, directory.path(), &tasks).await?;

    let config = directory.path().join("router.toml");
    std::fs::write(
        &config,
        format!(
            "listen = \"127.0.0.1:0\"\nadmin_listen = \"127.0.0.1:0\"\ncoordinators = [\"{coordinator}\"]\n\
             [telemetry]\nlog_filter = \"warn\"\n"
        ),
    )?;
    let announce = directory.path().join("router.json");
    let program = this.with_file_name("tabularium-router");
    let launch = Launch::new(program, directory.path().join("router.log"));
    let launch = launch.arg("--config").arg(&config).arg("--announce").arg(&announce);
    let router = start(launch, announce).await?;

    let direct = Side::new(&backend.address);
    let relayed = Side::new(&router.address);
    until_served(&relayed).await?;
    let mut figures = Figures::new();
    measure(rounds, &direct, &relayed, router.pid, &mut figures).await?;
    let memory = stalled_streams(&router.address, router.pid).await?;
    figures.print("relay.stream.memory_per_stream_mib", memory, Bar::AtMost(1.0));
    // The router's session keeps the coordinator's server open.
    drop((direct, relayed, router, backend));
    tasks.drain(Duration::from_secs(5)).await?;
    Ok(figures)
}

async fn until_served(side: &Side) -> Result<()> {
    let begun = Instant::now();
    loop {
        match side.refs.clone().ref_exists(ref_exists()).await {
            Ok(_) => break,
            Err(status) if begun.elapsed() > START_TIMEOUT => {
                return Err(status).context("router does not serve");
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
    // Warm both the route cache and the connections.
    alone(side).await.map(drop)
}

async fn measure(
    rounds: usize,
    direct: &Side,
    relayed: &Side,
    router: u32,
    figures: &mut Figures,
) -> Result<()> {
    let mut samples: [Vec<f64>; 9] = Default::default();
    for _ in 0..rounds {
        let direct_alone = alone(direct).await?;
        let cpu = process::cpu_time(router)?;
        let relayed_alone = alone(relayed).await?;
        let cpu_alone =
            process::cpu_time(router)?.saturating_sub(cpu).as_secs_f64() * 1e6 / REQUESTS_ALONE as f64;

        let (direct_together, direct_wall) = together(direct).await?;
        let cpu = process::cpu_time(router)?;
        let (relayed_together, relayed_wall) = together(relayed).await?;
        let cpu_together =
            process::cpu_time(router)?.saturating_sub(cpu).as_secs_f64() * 1e6 / REQUESTS_TOGETHER as f64;

        let direct_stream = stream(direct).await?;
        let cpu = process::cpu_time(router)?;
        let relayed_stream = stream(relayed).await?;
        let cpu_stream = process::cpu_time(router)?.saturating_sub(cpu).as_secs_f64();
        let mebibytes = STREAM_BYTES as f64 / (1024.0 * 1024.0);

        for (list, value) in samples.iter_mut().zip([
            direct_alone,
            (relayed_alone - direct_alone) / 1e3,
            cpu_alone,
            direct_together,
            relayed_together,
            cpu_together,
            direct_wall.as_secs_f64() / relayed_wall.as_secs_f64(),
            mebibytes / relayed_stream,
            cpu_stream / (mebibytes / 1024.0),
        ]) {
            list.push(value);
        }
        figures_progress(direct_stream / relayed_stream);
    }
    let names = [
        ("relay.unary.c1.direct_p50_us", Bar::Told),
        ("relay.unary.c1.added_p50_ms", Bar::AtMost(0.3)),
        ("relay.unary.c1.router_cpu_us", Bar::Told),
        ("relay.unary.c64.direct_p50_us", Bar::Told),
        ("relay.unary.c64.router_p50_us", Bar::Told),
        ("relay.unary.c64.router_cpu_us", Bar::AtMost(60.0)),
        ("relay.unary.c64.rate_to_direct", Bar::Told),
        ("relay.stream.router_mib_s", Bar::Told),
        ("relay.stream.router_cpu_s_per_gib", Bar::AtMost(1.0)),
    ];
    for ((name, bar), values) in names.into_iter().zip(samples) {
        figures.print(name, median(values), bar);
    }
    Ok(())
}

fn figures_progress(stream_ratio: f64) {
    eprintln!("round done; stream at {stream_ratio:.2} of direct, {} KiB a message", CHUNK_BYTES / 1024);
}
