//! Readers do not notice what happens to one replica: its directory is gone, its objects are, its node hangs or dies.

use std::{
    fs,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::future::join_all;
use tabularium_proto::gitaly::{FindCommitRequest, commit_service_client::CommitServiceClient};
use tabularium_testkit::{
    cluster::{Signed, TestCluster, VIRTUAL_STORAGE, local_cluster::ClusterOptions, local_cluster::HOME},
    git::GitClient,
    wait::wait_until,
};
use tokio::{sync::RwLock, time::Instant};

use crate::support::{
    Disks, FOLLOW, SOON, equal_replicas, home_only, must_git, named, primary, read_ref, request, router,
    start, within,
};

const PATH: &str = "a/b.git";
const BRANCH: &str = "refs/heads/main";
/// Side by side through each router.
const READERS: usize = 2;
/// Reads that have to end well during each fault.
const READS: usize = 100;

/// What readers know and find.
struct Readers {
    commit: String,
    done: AtomicBool,
    reads: AtomicUsize,
    wrong: Mutex<Vec<String>>,
    longest: Mutex<Duration>,
    /// Held while files are taken away: what a git that runs at this moment sees is nobody's promise.
    still: RwLock<()>,
}

impl Readers {
    async fn read(&self, through: Signed) {
        let mut number = 0;
        while !self.done.load(Ordering::Relaxed) {
            let _still = self.still.read().await;
            let started = Instant::now();
            let found = if number % 2 == 0 {
                read_ref(&through, PATH, BRANCH).await
            } else {
                let message = FindCommitRequest {
                    repository: named(VIRTUAL_STORAGE, PATH),
                    revision: BRANCH.into(),
                    trailers: false,
                };
                let mut client = CommitServiceClient::new(through.clone());
                let found = client.find_commit(request(message, "find-commit")).await;
                found.map(|found| found.into_inner().commit.map(|commit| commit.id))
            };
            if !matches!(&found, Ok(Some(id)) if *id == self.commit) {
                self.wrong.lock().unwrap().push(format!("read {number}: {found:?}"));
            }
            let mut longest = self.longest.lock().unwrap();
            *longest = longest.max(started.elapsed());
            self.reads.fetch_add(1, Ordering::Relaxed);
            number += 1;
        }
    }

    /// Until as many reads more were done, all of them well.
    async fn go_on(&self, what: &str) {
        let goal = self.reads.load(Ordering::Relaxed) + READS;
        wait_until("reads", FOLLOW, || async {
            let done = self.reads.load(Ordering::Relaxed);
            if done >= goal { Ok(()) } else { Err(format!("{done} of {goal}")) }
        })
        .await;
        let longest = std::mem::take(&mut *self.longest.lock().unwrap());
        println!("{what}: {READS} reads, the longest {} ms", longest.as_millis());
        let wrong = self.wrong.lock().unwrap().clone();
        assert!(wrong.is_empty(), "{what}: {} of them: {:?}", wrong.len(), &wrong[..wrong.len().min(5)]);
    }
}

fn quick(options: &mut ClusterOptions) {
    home_only(options);
    options.timing = vec![("verification_interval".to_owned(), "500ms".to_owned())];
}

async fn mended(test: &TestCluster, disks: &Disks, storage: &str) {
    wait_until("it is made again", FOLLOW, || async {
        let objects = disks.replica(storage).join("objects");
        if objects.is_dir() { Ok(()) } else { Err(format!("{} is not there", objects.display())) }
    })
    .await;
    equal_replicas(test, PATH).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_notice_nothing_of_what_happens_to_one_replica() {
    let (mut test, _logs) = start(quick).await;
    let git = GitClient::new();
    git.work_tree("source", 3).await;
    test.create(PATH).await;
    must_git(&git, "source", &["push", "--quiet", &test.url(HOME, 0, PATH), "main"]).await;
    equal_replicas(&test, PATH).await;
    let disks = Disks::of(&test, PATH).await;
    let first = primary(&test, PATH).await;
    let others: Vec<&str> =
        ["node-1", "node-2", "node-3"].into_iter().filter(|name| *name != first).collect();
    let commit = git.run("source", &["rev-parse", "main"]).await.trim().to_owned();
    let readers = Arc::new(Readers {
        commit,
        done: AtomicBool::new(false),
        reads: AtomicUsize::new(0),
        wrong: Mutex::default(),
        longest: Mutex::default(),
        still: RwLock::default(),
    });
    let through: Vec<Signed> = (0..2 * READERS).map(|number| router(&test, number % 2)).collect();
    let reading = join_all(through.into_iter().map(|through| readers.read(through)));
    let aside = test.cluster.state_directory().to_owned();

    let striking = async {
        readers.go_on("nothing happens").await;
        for (number, storage) in [others[0], &first].into_iter().enumerate() {
            let still = readers.still.write().await;
            fs::rename(disks.replica(storage), aside.join(format!("aside-{number}"))).unwrap();
            drop(still);
            readers.go_on("a replica is gone").await;
            mended(&test, &disks, storage).await;
        }
        for (number, storage) in [others[1], &primary(&test, PATH).await].into_iter().enumerate() {
            let still = readers.still.write().await;
            let objects = disks.replica(storage).join("objects");
            fs::rename(objects, aside.join(format!("objects-{number}"))).unwrap();
            drop(still);
            readers.go_on("a replica's objects are gone").await;
            mended(&test, &disks, storage).await;
        }

        let node = format!("{HOME}/{}", others[0]);
        test.cluster.pause(&node).unwrap();
        readers.go_on("a node hangs").await;
        test.cluster.resume(&node).unwrap();
        test.cluster.kill(&node).unwrap();
        readers.go_on("a node is killed").await;
        let node = format!("{HOME}/{}", others[1]);
        test.cluster.kill(&node).unwrap();
        readers.go_on("another node is killed").await;
        for storage in &others {
            within("a restart", FOLLOW, test.cluster.restart(&format!("{HOME}/{storage}"))).await.unwrap();
        }
        readers.go_on("all are back").await;
        readers.done.store(true, Ordering::Relaxed);
    };
    tokio::join!(reading, striking);
    equal_replicas(&test, PATH).await;
    disks.check_integrity(&git).await;
    within("stopping", SOON, test.stop()).await.unwrap();
}
