//! A read that begins after a write was acknowledged sees it, through whichever router, whatever dies meanwhile; and
//! what two routers write at once is one history.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::future::join_all;
use tabularium_proto::{
    coordinator::{GetRepositoryRequest, RepositoryName, operator_service_client::OperatorServiceClient},
    gitaly::{ListRefsRequest, ref_service_client::RefServiceClient},
};
use tabularium_testkit::{
    cluster::{Signed, TestCluster, VIRTUAL_STORAGE, local_cluster::HOME, service::Kind, signed},
    git::GitClient,
    wait::wait_until,
};
use tokio::time::Instant;
use tonic::{Code, Status};

use crate::support::{
    Disks, FOLLOW, SOON, equal_replicas, home_only, must_git, named, no_open_writes, read_ref, request,
    router, start, try_git, within, write_ref,
};

const REFERENCE: &str = "refs/heads/counter";
/// Repositories written and read side by side.
const REPOSITORIES: usize = 2;
/// Commits that the counter moves over, one after the other.
const COMMITS: usize = 150;
/// How long a writer waits for copies, so that its next write makes them stale while routers know them as fresh.
const COPIES_WAIT: Duration = Duration::from_millis(1500);
/// Between two reads of one reader; more would only keep the machine from writing.
const READ_PAUSE: Duration = Duration::from_millis(10);
/// How long all writers and readers of one test may take.
const WORK: Duration = Duration::from_secs(120);

/// What one repository's writer and its readers share.
struct Counter {
    path: String,
    commits: Arc<Vec<String>>,
    /// How far acknowledged writes have moved the reference.
    acknowledged: AtomicUsize,
    done: AtomicBool,
    reads: AtomicUsize,
    failed_reads: Failures,
    failed_writes: Failures,
}

/// Statuses and how often each was seen.
#[derive(Default)]
struct Failures(Mutex<BTreeMap<String, usize>>);

impl Failures {
    fn count(&self, status: &Status) {
        let text = format!("{:?}: {}", status.code(), status.message());
        *self.0.lock().unwrap().entry(text).or_default() += 1;
    }
}

fn failures(counters: &[Counter], of: impl Fn(&Counter) -> &Failures) -> BTreeMap<String, usize> {
    let mut all = BTreeMap::new();
    for counter in counters {
        for (text, count) in of(counter).0.lock().unwrap().iter() {
            *all.entry(text.clone()).or_default() += count;
        }
    }
    all
}

impl Counter {
    /// Reads once; panics when what was acknowledged before is not there.
    async fn read(&self, through: &Signed, which: usize) -> bool {
        let acknowledged = self.acknowledged.load(Ordering::SeqCst);
        match read_ref(through, &self.path, REFERENCE).await {
            Ok(Some(commit)) => {
                let seen = self.commits.iter().position(|known| *known == commit).expect("one of ours");
                assert!(
                    seen >= acknowledged,
                    "stale read of {} through router {which}: {seen}, after {acknowledged} was acknowledged",
                    self.path
                );
                self.reads.fetch_add(1, Ordering::Relaxed);
                true
            }
            Ok(None) => panic!("{} has lost its reference, read through router {which}", self.path),
            Err(status) => {
                self.failed_reads.count(&status);
                false
            }
        }
    }

    async fn keep_reading(&self, through: &Signed, which: usize) {
        while !self.done.load(Ordering::SeqCst) {
            let pause = if self.read(through, which).await { READ_PAUSE } else { READ_PAUSE * 4 };
            tokio::time::sleep(pause).await;
        }
    }

    /// Moves the reference on and reads it at once through the other router, until `until` says that it is enough.
    async fn keep_writing(&self, coordinator: &Signed, routers: &[Signed; 2], until: impl Fn(usize) -> bool) {
        let first = self.acknowledged.load(Ordering::SeqCst) + 1;
        for next in first..self.commits.len() {
            let turn = next % 2;
            // Every third time while copies are still made, else when all replicas serve reads.
            if next % 3 != 0 {
                let copies = wait_for_copies(coordinator, &self.path);
                let _not_yet = tokio::time::timeout(COPIES_WAIT, copies).await;
                for (which, through) in routers.iter().enumerate() {
                    self.read(through, which).await;
                }
            }
            match write_ref(&routers[turn], &self.path, REFERENCE, &self.commits[next]).await {
                Ok(()) => self.acknowledged.store(next, Ordering::SeqCst),
                Err(status) => self.failed_writes.count(&status),
            }
            for _ in 0..3 {
                self.read(&routers[1 - turn], 1 - turn).await;
            }
            if until(next - first + 1) {
                break;
            }
        }
        self.done.store(true, Ordering::SeqCst);
    }
}

fn coordinator(test: &TestCluster) -> Signed {
    let home = test.home();
    signed(&home.grpc(Kind::Coordinator)[0], &home.coordinator_token_file)
}

async fn wait_for_copies(coordinator: &Signed, path: &str) {
    let name = RepositoryName { virtual_storage: VIRTUAL_STORAGE.to_owned(), relative_path: path.to_owned() };
    loop {
        let mut operator = OperatorServiceClient::new(coordinator.clone());
        let question = GetRepositoryRequest { name: Some(name.clone()) };
        let details = operator.get_repository(request(question, "wait-for-copies")).await;
        let route = details.unwrap().into_inner().repository.unwrap().route.unwrap();
        if route.replicas.iter().all(|replica| replica.generation == route.generation) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn counters(test: &TestCluster, git: &GitClient, count: usize) -> Vec<Counter> {
    // One stream of commits costs one process instead of hundreds.
    git.run(".", &["init", "--quiet", "source"]).await;
    let mut stream = String::new();
    for number in 0..COMMITS {
        let message = format!("{number}");
        let (time, length) = (1_700_000_000 + number, message.len());
        let committer = format!("committer A <a@example.invalid> {time} +0000");
        writeln!(stream, "commit refs/heads/main\n{committer}\ndata {length}\n{message}").unwrap();
    }
    std::fs::write(git.path("source").join("stream"), stream).unwrap();
    let mut import = git.git().command(&git.path("source"), ["fast-import", "--quiet"]);
    import.stdin(std::fs::File::open(git.path("source").join("stream")).unwrap());
    let imported = within("fast-import", SOON, import.output()).await.unwrap();
    assert!(imported.status.success(), "{imported:?}");
    let commits: Vec<String> =
        git.run("source", &["rev-list", "--reverse", "main"]).await.lines().map(str::to_owned).collect();
    assert_eq!(commits.len(), COMMITS);
    let commits = Arc::new(commits);
    let mut counters = Vec::new();
    for number in 0..count {
        let path = format!("fresh/{number}.git");
        test.create(&path).await;
        must_git(git, "source", &["push", "--quiet", &test.url(HOME, 0, &path), "main"]).await;
        write_ref(&router(test, 0), &path, REFERENCE, &commits[0]).await.unwrap();
        counters.push(Counter {
            path,
            commits: Arc::clone(&commits),
            acknowledged: AtomicUsize::new(0),
            done: AtomicBool::new(false),
            reads: AtomicUsize::new(0),
            failed_reads: Failures::default(),
            failed_writes: Failures::default(),
        });
    }
    for counter in &counters {
        equal_replicas(test, &counter.path).await;
    }
    counters
}

async fn settled(test: &TestCluster, counters: &[Counter]) {
    no_open_writes(test, SOON).await;
    for counter in counters {
        equal_replicas(test, &counter.path).await;
        for which in [0, 1] {
            assert!(counter.read(&router(test, which), which).await, "{} cannot be read", counter.path);
        }
    }
}

fn sum(counters: &[Counter], of: impl Fn(&Counter) -> &AtomicUsize) -> usize {
    counters.iter().map(|counter| of(counter).load(Ordering::Relaxed)).sum()
}

#[tokio::test]
async fn what_was_acknowledged_is_read_through_the_other_router() {
    const WRITES: usize = 16;
    let (test, _logs) = start(home_only).await;
    let git = GitClient::new();
    let counters = counters(&test, &git, REPOSITORIES).await;
    let routers = [router(&test, 0), router(&test, 1)];
    let (coordinator, started) = (coordinator(&test), Instant::now());
    within("writers and readers", WORK, async {
        join_all(counters.iter().map(|counter| async {
            tokio::join!(
                counter.keep_writing(&coordinator, &routers, |written| written >= WRITES),
                counter.keep_reading(&routers[0], 0),
                counter.keep_reading(&routers[1], 1),
            );
        }))
        .await
    })
    .await;
    let reads = sum(&counters, |counter| &counter.reads);
    println!("{reads} reads beside {} writes in {} ms", WRITES * REPOSITORIES, started.elapsed().as_millis());
    assert!(reads >= WRITES * REPOSITORIES * 3, "{reads} reads");
    assert_eq!(failures(&counters, |counter| &counter.failed_writes), BTreeMap::new());
    assert_eq!(failures(&counters, |counter| &counter.failed_reads), BTreeMap::new());

    // The same with git itself, start to end.
    git.run("source", &["switch", "--quiet", "main"]).await;
    let urls = [0, 1].map(|gateway| test.url(HOME, gateway, "fresh/0.git"));
    for number in 0..10 {
        let commit = git.commit("source", "file", &format!("{number}\n")).await;
        must_git(&git, "source", &["push", "--quiet", &urls[number % 2], "main"]).await;
        let other = &urls[1 - number % 2];
        let listed =
            within("ls-remote", SOON, git.run("source", &["ls-remote", other, "refs/heads/main"])).await;
        assert_eq!(listed, format!("{commit}\trefs/heads/main"));
    }
    settled(&test, &counters).await;
    within("a stop", FOLLOW, test.cluster.stop()).await.unwrap();
}

#[tokio::test]
async fn what_was_acknowledged_is_read_while_nodes_die_and_come_back() {
    let (mut test, _logs) = start(|options| {
        home_only(options);
        options.timing = vec![("max_retry_delay".into(), "1s".into())];
    })
    .await;
    let git = GitClient::new();
    let counters = counters(&test, &git, REPOSITORIES).await;
    let routers = [router(&test, 0), router(&test, 1)];
    let stop = AtomicBool::new(false);
    let progress = || sum(&counters, |counter| &counter.acknowledged);
    let coordinator = coordinator(&test);
    let killing = async {
        for storage in ["node-1", "node-2", "node-3"] {
            let name = format!("{HOME}/{storage}");
            test.cluster.kill(&name).unwrap();
            let (before, killed) = (progress(), Instant::now());
            // With two nodes of three, repositories go on being written. Some may wait for the third, which holds
            // alone what was written last.
            while killed.elapsed() < Duration::from_secs(2) {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            println!("{} writes while {storage} was away", progress() - before);
            within("a restart", FOLLOW, test.cluster.restart(&name)).await.unwrap();
            let before = progress();
            wait_until("writes after a restart", SOON, || async {
                if progress() > before + 3 { Ok(()) } else { Err(format!("{before}")) }
            })
            .await;
        }
        stop.store(true, Ordering::SeqCst);
    };
    let working = join_all(counters.iter().map(|counter| async {
        tokio::join!(
            counter.keep_writing(&coordinator, &routers, |_| stop.load(Ordering::SeqCst)),
            counter.keep_reading(&routers[0], 0),
            counter.keep_reading(&routers[1], 1),
        );
    }));
    let work = Box::pin(async { tokio::join!(killing, working) });
    within("writers, readers and a killer", WORK, work).await;
    println!(
        "{} reads beside {} writes; failed reads: {:#?}, failed writes: {:#?}",
        sum(&counters, |counter| &counter.reads),
        sum(&counters, |counter| &counter.acknowledged),
        failures(&counters, |counter| &counter.failed_reads),
        failures(&counters, |counter| &counter.failed_writes),
    );
    settled(&test, &counters).await;
    within("a stop", FOLLOW, test.cluster.stop()).await.unwrap();
}

#[tokio::test]
async fn pushes_through_two_routers_at_once() {
    const CLIENTS: usize = 6;
    let (test, _logs) = start(home_only).await;
    let git = GitClient::new();
    git.work_tree("source", 1).await;
    test.create("a/b.git").await;
    let urls = [0, 1].map(|gateway| test.url(HOME, gateway, "a/b.git"));
    must_git(&git, "source", &["push", "--quiet", &urls[0], "main"]).await;
    let disks = Disks::of(&test, "a/b.git").await;
    for client in 0..CLIENTS {
        git.run("source", &["switch", "--quiet", "-c", &format!("own-{client}"), "main"]).await;
        git.commit("source", &format!("file-{client}"), "own\n").await;
    }

    let pushes = (0..CLIENTS).map(|client| {
        let (git, url) = (&git, &urls[client % 2]);
        let branch = format!("own-{client}");
        async move { try_git(git, "source", &["push", "--quiet", url, &branch]).await }
    });
    for (client, (well, said)) in join_all(pushes).await.into_iter().enumerate() {
        assert!(well, "client {client}: {said}");
    }
    for round in 0..3 {
        let reference = format!("refs/heads/race-{round}");
        let pushes = (0..CLIENTS).map(|client| {
            let (git, url) = (&git, &urls[client % 2]);
            let refspec = format!("own-{client}:{reference}");
            async move { try_git(git, "source", &["push", "--quiet", url, &refspec]).await }
        });
        let results = join_all(pushes).await;
        let won: Vec<usize> = (0..CLIENTS).filter(|client| results[*client].0).collect();
        assert_eq!(won.len(), 1, "{results:?}");
        let winner = git.run("source", &["rev-parse", &format!("own-{}", won[0])]).await;
        for (which, _) in urls.iter().enumerate() {
            let seen = read_ref(&router(&test, which), "a/b.git", &reference).await.unwrap();
            assert_eq!(seen.as_ref(), Some(&winner), "through router {which}");
        }
    }
    no_open_writes(&test, SOON).await;
    equal_replicas(&test, "a/b.git").await;
    disks.clean(&test).await;
    disks.check_integrity(&git).await;
    within("a stop", FOLLOW, test.cluster.stop()).await.unwrap();
}

/// What a push made is told with its answer, and can be asked for wherever one reads next.
#[tokio::test]
async fn the_generation_of_a_push_can_be_asked_for_through_another_router() {
    const PATH: &str = "a/b.git";
    let (test, _logs) = start(home_only).await;
    let git = GitClient::new();
    git.work_tree("source", 2).await;
    test.create(PATH).await;
    let mut last = 0;
    for branch in ["one", "two", "three"] {
        let refspec = format!("main:refs/heads/{branch}");
        let url = test.url(HOME, 0, PATH);
        let arguments = ["push", "--quiet", &url, &refspec];
        let mut push = git.git().command(&git.path("source"), arguments);
        let pushed = within("a push", FOLLOW, push.env("GIT_CURL_VERBOSE", "1").output()).await.unwrap();
        let said = String::from_utf8_lossy(&pushed.stderr).to_lowercase();
        assert!(pushed.status.success(), "{said}");
        // The last one: the advertisement told the one before.
        let told = said.lines().rev().find_map(|line| line.split("x-tabularium-generation: ").nth(1));
        let generation: i64 = told.unwrap_or_else(|| panic!("{said}")).trim().parse().unwrap();
        assert!(generation > last, "{generation} after {last}");
        last = generation;
        for index in [1, 0] {
            let read = async |generation: i64| {
                let message = ListRefsRequest {
                    repository: named(VIRTUAL_STORAGE, PATH),
                    patterns: vec![format!("refs/heads/{branch}").into_bytes()],
                    ..ListRefsRequest::default()
                };
                let mut message = request(message, "at-least");
                let metadata = message.metadata_mut();
                metadata.insert("tabularium-at-least-generation", generation.to_string().parse().unwrap());
                let mut client = RefServiceClient::new(router(&test, index));
                let answer = client.list_refs(message).await?;
                let told =
                    answer.metadata().get("tabularium-generation").unwrap().to_str().unwrap().to_owned();
                let found =
                    answer.into_inner().message().await?.is_some_and(|refs| !refs.references.is_empty());
                Ok::<_, Status>((told, found))
            };
            assert_eq!(read(generation).await.unwrap(), (generation.to_string(), true));
            let newer = read(generation + 1).await.unwrap_err();
            assert_eq!(newer.code(), Code::FailedPrecondition, "{}", newer.message());
        }
    }
    test.stop().await.unwrap();
}
