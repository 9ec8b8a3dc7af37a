//! How the process starts, stops and hands over.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use rustix::process::Signal;
use tabularium_common::{
    grpc::Address,
    tls::{self, TlsConfig},
};
use tabularium_proto::gitaly::{RepositoryExistsRequest, repository_service_client::RepositoryServiceClient};
use tabularium_testkit::{certificates::Authority, wait::wait_until};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::stage::{PATIENCE, PROGRAM, Stage, connect, connect_to, node_secret, repository, signal};

#[tokio::test]
async fn it_serves_on_a_socket_file_and_stops_when_it_is_told_to() {
    let mut stage = Stage::new(1, 0).await;
    let with_migrations = stage.serve().await;
    stage.create("@hashed/aa/bb/one.git").await;
    assert!(stage.exists("@hashed/aa/bb/one.git").await.unwrap());
    assert!(!stage.exists("@hashed/aa/bb/two.git").await.unwrap());
    signal(stage.pid(), Signal::TERM);
    assert!(stage.ended().await.success());
    let again = stage.serve().await;
    // The limit is a second in a release build on a machine that is not busy.
    println!("serving after {with_migrations:?} on an empty database, {again:?} on its own");
    assert!(stage.exists("@hashed/aa/bb/one.git").await.unwrap());
    signal(stage.pid(), Signal::INT);
    assert!(stage.ended().await.success());
}

#[tokio::test]
async fn copies_are_made_without_a_message_bus() {
    let mut stage = Stage::new(2, 1).await;
    stage.serve().await;
    stage.create("a.git").await;
    let out = stage
        .ok(&[
            "set-replication-factor",
            "-virtual-storage",
            "default",
            "-relative-path",
            "a.git",
            "-replication-factor",
            "2",
        ])
        .await;
    assert_eq!(out, "current assignments: gitaly-1, gitaly-2\n");
    wait_until("both replicas are equal", PATIENCE, async || {
        let text = stage.ok(&["metadata", "-virtual-storage", "default", "-relative-path", "a.git"]).await;
        if text.matches("fully up to date").count() == 2 { Ok(()) } else { Err(text) }
    })
    .await;
    let log = std::fs::read_to_string(stage.path("praefect.log")).unwrap();
    for secret in [node_secret(1), node_secret(2), "clients' secret".to_owned()] {
        assert!(!log.contains(&secret), "nobody reads `{secret}` in a log");
    }
}

/// On an address of loopback that no other test of this machine uses, so that the port may be a known one.
fn own_host() -> String {
    let id = std::process::id();
    format!("127.{}.{}.3", 16 + (id >> 8) % 200, id % 256)
}

#[tokio::test]
async fn it_serves_over_tls_with_a_key_that_stands_in_the_file() {
    let (authority, host) = (Authority::new(), own_host());
    let pair = authority.issue("praefect", &[&host]);
    let key = std::fs::read_to_string(&pair.key_path).unwrap();
    std::fs::remove_file(&pair.key_path).unwrap();
    let mut stage = Stage::new(1, 0).await;
    let tls = format!(
        "tls_listen_addr = '{host}:3305'\n[tls]\ncertificate_path = '{}'\nkey = \"\"\"\n{key}\"\"\"",
        pair.certificate_path.display()
    );
    stage.write_config(1, 0, &tls);
    stage.serve().await;
    stage.create("a.git").await;

    tls::install(&TlsConfig { ca_path: Some(authority.path()), ..TlsConfig::NONE });
    let address: Address = format!("tls://{host}:3305").parse().unwrap();
    let mut health = HealthClient::new(connect_to(&address));
    let answer = health.check(HealthCheckRequest::default()).await.unwrap().into_inner();
    assert_eq!(answer.status(), ServingStatus::Serving);
    let request = RepositoryExistsRequest { repository: Some(repository("a.git")) };
    let mut client = RepositoryServiceClient::new(connect_to(&address));
    assert!(client.repository_exists(request).await.unwrap().into_inner().exists);

    // Commands of a file that has no other address come there too, and look at the certificate.
    let text = std::fs::read_to_string(stage.path("praefect.toml")).unwrap();
    let without_socket: Vec<_> = text.lines().filter(|line| !line.starts_with("socket_path")).collect();
    std::fs::write(stage.path("praefect.toml"), without_socket.join("\n")).unwrap();
    let (code, _, err) = stage.run(&["dataloss"]).await;
    assert!(code == 1 && err.contains(&format!("error dialing: tls://{host}:3305")), "{err}");
    stage.authorities = Some(authority.path());
    assert!(stage.ok(&["dataloss"]).await.contains("All repositories are available!"));
    assert!(stage.ok(&["check"]).await.ends_with("\nAll checks passed.\n"));

    let before = stage.pid();
    signal(before, Signal::HUP);
    wait_until("another process serves", PATIENCE, async || {
        if stage.pid() == before { Err("the same".to_owned()) } else { Ok(()) }
    })
    .await;
    assert!(
        stage.ok(&["dataloss"]).await.contains("All repositories are available!"),
        "it has the key as well"
    );
    let log = std::fs::read_to_string(stage.path("praefect.log")).unwrap();
    assert!(!log.contains("PRIVATE KEY"));
}

#[tokio::test]
async fn a_process_that_takes_over_refuses_nobody_and_loses_no_read() {
    let mut stage = Stage::new(1, 0).await;
    stage.serve().await;
    stage.create("a.git").await;
    let before = stage.pid();
    let (over, reads) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
    // Some keep their connection, and some make one for each read.
    let readers: Vec<_> = (0..4)
        .map(|index| {
            let (over, reads) = (Arc::clone(&over), Arc::clone(&reads));
            let socket = stage.path("praefect.sock");
            let kept = stage.signed();
            tokio::spawn(async move {
                while !over.load(Ordering::Relaxed) {
                    let connection = if index % 2 == 0 {
                        kept.clone()
                    } else {
                        // Refused would be an error here.
                        tokio::net::UnixStream::connect(&socket).await.unwrap();
                        connect(&socket)
                    };
                    let request = RepositoryExistsRequest { repository: Some(repository("a.git")) };
                    let answer = RepositoryServiceClient::new(connection).repository_exists(request).await;
                    assert!(answer.unwrap().into_inner().exists);
                    reads.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    let enough = async |count: u32| {
        let wanted = reads.load(Ordering::Relaxed) + count;
        wait_until("reads go on", PATIENCE, async || {
            let now = reads.load(Ordering::Relaxed);
            if now >= wanted { Ok(()) } else { Err(format!("{now} of {wanted}")) }
        })
        .await;
    };
    enough(50).await;
    signal(before, Signal::HUP);
    wait_until("another process serves", PATIENCE, async || {
        if stage.pid() == before { Err("the same".to_owned()) } else { Ok(()) }
    })
    .await;
    assert!(stage.ended().await.success(), "the old process ends in order");
    enough(50).await;
    over.store(true, Ordering::Relaxed);
    for reader in readers {
        reader.await.expect("no read was lost");
    }
    // A file that cannot be used any more does not end what serves.
    let now = stage.pid();
    std::fs::write(stage.path("praefect.toml"), "nonsense").unwrap();
    signal(now, Signal::HUP);
    wait_until("it is told in the log", PATIENCE, async || {
        let log = std::fs::read_to_string(stage.path("praefect.log")).unwrap();
        if log.contains("nobody has taken over") { Ok(()) } else { Err(log) }
    })
    .await;
    assert_eq!(stage.pid(), now);
    assert!(stage.exists("a.git").await.unwrap());
    signal(now, Signal::TERM);
    wait_until("it stops", Duration::from_secs(20), async || {
        stage.health().await.map_or(Ok(()), |()| Err("serves".to_owned()))
    })
    .await;
}

#[tokio::test]
async fn metrics_of_the_whole_process_are_at_praefects_address() {
    let mut stage = Stage::new(1, 0).await;
    stage.write_config(1, 0, "prometheus_listen_addr = '127.0.0.1:0'\n[tabularium]\npraefect_metrics = true");
    stage.serve().await;
    let log = std::fs::read_to_string(stage.path("praefect.log")).unwrap();
    let line = log.lines().find(|line| line.contains("metrics are served")).unwrap();
    let address = line.rsplit_once("tcp://").unwrap().1.trim().parse().unwrap();
    let text = crate::stage::get(address, "/metrics").await;
    for line in ["tabularium_router_connections ", "tabularium_coordinator_bus_connected 1\n"] {
        assert!(text.contains(line), "{line} in {text}");
    }
    assert!(
        text.contains("\ngitaly_praefect_node_last_healthcheck_up{gitaly_storage=\"gitaly-1\"} 1\n"),
        "{text}"
    );
    assert!(text.ends_with("# EOF\n") && text.matches("# EOF").count() == 1);
    assert!(crate::stage::get(address, "/ready").await.ends_with("ready\n"));
}

#[tokio::test]
async fn several_of_them_work_on_one_database() {
    let mut stage = Stage::new(1, 0).await;
    stage.serve().await;
    let beside = stage.path("beside.sock");
    let text = std::fs::read_to_string(stage.path("praefect.toml")).unwrap();
    let own = stage.path("praefect.sock").display().to_string();
    std::fs::write(stage.path("beside.toml"), text.replace(&own, &beside.display().to_string())).unwrap();
    let _beside = tokio::process::Command::new(PROGRAM)
        .arg("-config")
        .arg(stage.path("beside.toml"))
        .stderr(std::fs::File::create(stage.path("beside.log")).unwrap())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    stage.create("a.git").await;
    let exists = async || {
        let mut client = RepositoryServiceClient::new(connect(&beside));
        let request = RepositoryExistsRequest { repository: Some(repository("a.git")) };
        let answer = client.repository_exists(request).await.map_err(|status| status.to_string())?;
        Ok::<_, String>(answer.into_inner().exists)
    };
    wait_until("the other one serves it", PATIENCE, async || match exists().await {
        Ok(true) => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    // Its route is cached there, and has to be taken back: over the address that clients use.
    let request = tabularium_proto::gitaly::RemoveRepositoryRequest { repository: Some(repository("a.git")) };
    RepositoryServiceClient::new(stage.signed()).remove_repository(request).await.unwrap();
    assert_eq!(exists().await, Ok(false));
    let log = std::fs::read_to_string(stage.path("praefect.log")).unwrap();
    assert!(!log.contains("waited out"), "nobody's lease was waited for: {log}");
}
