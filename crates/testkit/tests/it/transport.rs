//! Whole clusters over TLS and over socket files: everything that is done over TCP elsewhere.

use std::{fs, path::Path, time::Duration};

use tabularium_common::grpc::Address;
use tabularium_proto::gitaly::{RepositoryExistsRequest, repository_service_client::RepositoryServiceClient};
use tabularium_testkit::{
    certificates::Authority,
    cluster::{
        TestCluster,
        local_cluster::{ClusterOptions, Gateways, HOME, MIRROR},
        service::Kind,
        signed,
        transport::Transport,
    },
    git::GitClient,
    wait::wait_until,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tonic::Code;

use crate::support::{FOLLOW, named, request, tabularium};

const PATH: &str = "group/project.git";

/// Create, push, clone; a node dies, is missed, comes back and catches up.
async fn main_job(test: &mut TestCluster, git: &GitClient) {
    git.work_tree("source", 3).await;
    test.create(PATH).await;
    let url = test.url(HOME, 0, PATH);
    git.run("source", &["push", "--quiet", &url, "main"]).await;
    wait_until("three equal replicas", FOLLOW, || test.equal_checksums(PATH, 3)).await;

    let primary = test.details(PATH).await.unwrap().route.unwrap().primary;
    test.cluster.kill(&format!("home/{primary}")).unwrap();
    git.commit("source", "file", "while it is away\n").await;
    wait_until("a push without the old primary", FOLLOW, || async {
        let (taken, said) = git.try_run("source", &["push", "--quiet", &url, "main"]).await;
        if taken { Ok(()) } else { Err(said) }
    })
    .await;
    git.run(".", &["clone", "--quiet", "--mirror", &test.url(HOME, 1, PATH), "clone"]).await;
    assert_eq!(git.refs("clone").await, git.refs("source").await);
    test.cluster.restart(&format!("home/{primary}")).await.unwrap();
    wait_until("three equal replicas again", FOLLOW, || test.equal_checksums(PATH, 3)).await;

    let checked = tabularium(test, &["check"]).await;
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
}

fn over(transport: Transport) -> impl FnOnce(&mut ClusterOptions) {
    |options| {
        options.transport = transport;
        options.gateways = Gateways::PerRouter;
    }
}

#[tokio::test]
async fn a_cluster_over_tls_takes_pushes_repairs_and_mirrors_and_shows_no_secret() {
    let authority = Authority::new();
    let files = authority.cluster_files(true);
    let mut test = TestCluster::start(|options| {
        over(Transport::Tls(files.clone()))(options);
        options.log_filter = "debug".to_owned();
    })
    .await;
    let git = GitClient::new().with("GIT_SSL_CAINFO", authority.path().to_str().unwrap());
    main_job(&mut test, &git).await;

    let url = test.url(HOME, 0, PATH);
    assert!(url.starts_with("https://"), "{url}");
    for site in [HOME, MIRROR] {
        let site = test.site(site);
        for address in [Kind::Router, Kind::Coordinator, Kind::Node].map(|kind| site.grpc(kind)).concat() {
            assert!(address.starts_with("tls://"), "{address}");
        }
        assert!(site.nats_url.starts_with("tls://"));
    }
    let expected = git.run("source", &["ls-remote", &url]).await;
    let mirror = test.url(MIRROR, 0, PATH);
    wait_until("the mirror's refs", FOLLOW, || async {
        let output = git.git().run(&git.path("source"), ["ls-remote", &mirror]).await;
        let refs = output.map_err(|error| error.to_string())?;
        if refs == expected { Ok(()) } else { Err(refs) }
    })
    .await;

    let (untrusting, said) =
        GitClient::new().try_run(".", &["-c", "http.sslVerify=true", "ls-remote", &url]).await;
    assert!(!untrusting, "{said}");
    intruders(&test).await;
    // Tokens of the other side.
    let home = test.home();
    for (address, token) in [
        (&home.grpc(Kind::Node)[0], &home.router_token_file),
        (&home.grpc(Kind::Router)[0], &home.node_token_file),
    ] {
        let mut client = RepositoryServiceClient::new(signed(address, token));
        let exists = RepositoryExistsRequest { repository: named("default", PATH) };
        let refused = client.repository_exists(request(exists, "other-side")).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
        assert_eq!(refused.message(), "permission denied: wrong hmac signature");
    }
    no_secret_is_shown(&test, &files.key_path);
    test.cluster.stop().await.unwrap();
}

/// Whoever does not speak TLS, stops in the middle of it, or has no certificate, is got rid of; everybody else is served.
async fn intruders(test: &TestCluster) {
    let router = test.home().grpc(Kind::Router)[0].clone();
    let host = router.strip_prefix("tls://").unwrap();
    let mut silent = Vec::new();
    for _ in 0..200 {
        let mut stream = TcpStream::connect(host).await.unwrap();
        stream.write_all(&[0x16, 3, 1, 2, 0]).await.unwrap();
        silent.push(stream);
    }
    for node in test.home().grpc(Kind::Node) {
        let mut plain = TcpStream::connect(node.strip_prefix("tls://").unwrap()).await.unwrap();
        plain.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(5), plain.read_to_end(&mut answer)).await;
        read.expect("it is closed").unwrap();
        assert_eq!(answer.first(), Some(&0x15), "an alert");
    }
    let mut client = test.router(0);
    let exists = RepositoryExistsRequest { repository: named("default", PATH) };
    let answer = client.repository_exists(request(exists, "beside-intruders")).await.unwrap();
    assert!(answer.into_inner().exists);

    // One that was told to speak TLS does not take less.
    let admin = test.home().of(Kind::Router).next().unwrap().admin.clone().unwrap();
    let error = Address::Tls(admin).connect().await.unwrap_err();
    assert!(error.to_string().contains("does not speak TLS here"), "{error}");
}

/// Neither in logs nor in metrics is there a secret or a line of the private key.
fn no_secret_is_shown(test: &TestCluster, key: &Path) {
    let mut secrets = vec![fs::read_to_string(key).unwrap().lines().nth(1).unwrap().to_owned()];
    for site in [HOME, MIRROR] {
        let site = test.site(site);
        for file in [&site.node_token_file, &site.router_token_file, &site.coordinator_token_file] {
            secrets.push(fs::read_to_string(file).unwrap().trim().to_owned());
        }
    }
    for site in [HOME, MIRROR] {
        for process in &test.site(site).processes {
            let log = fs::read_to_string(&process.log).unwrap();
            assert!(log.contains("DEBUG"), "{} logs little", process.name);
            for secret in &secrets {
                assert!(!log.contains(secret), "{} logs a secret", process.name);
            }
        }
    }
}

#[tokio::test]
async fn a_cluster_over_socket_files_takes_pushes_and_repairs() {
    let mut test = TestCluster::start(|options| {
        over(Transport::Sockets)(options);
        options.mirror = None;
    })
    .await;
    main_job(&mut test, &GitClient::new()).await;
    let home = test.home();
    for address in [Kind::Router, Kind::Coordinator, Kind::Node].map(|kind| home.grpc(kind)).concat() {
        assert!(address.starts_with("unix:/"), "{address}");
    }
    test.cluster.stop().await.unwrap();
}
