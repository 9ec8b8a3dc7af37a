//! Object pools, and repositories and branches that come from elsewhere.

use prost::Message;
use tabularium_proto::gitaly::{
    ApplyGitattributesRequest, CreateObjectPoolRequest, CreateRepositoryFromBundleRequest,
    CreateRepositoryFromUrlRequest, DisconnectGitAlternatesRequest, FetchIntoObjectPoolRequest,
    FetchSourceBranchRequest, LinkRepositoryToObjectPoolRequest, ObjectPool, RestoreRepositoryRequest,
    SetFullPathRequest,
};

use super::mutators::{Case, Scene, one};
use crate::harness::git;

/// Where scenes have a pool. It has a reference that its origin has not any more.
pub(super) const POOL: &str = "@cluster/pools/6b/86/17";
/// Linked to it.
pub(super) const MEMBER: &str = "member.git";

fn pool_at(scene: &Scene, path: &str) -> ObjectPool {
    ObjectPool { repository: Some(scene.named(path)) }
}

/// Of what scenes have a backup of.
fn restore(scene: &Scene, path: &str) -> RestoreRepositoryRequest {
    let vanity = scene.named("other.git");
    RestoreRepositoryRequest {
        repository: Some(scene.named(path)),
        vanity_repository: Some(vanity),
        ..Default::default()
    }
}

/// A pool and a member of it, made by git on the disk.
pub(super) fn make_pool(scene: &Scene) {
    let root = scene.node.root();
    let pool = scene.node.path(POOL);
    for (from, to) in [("a.git", POOL), ("a.git", MEMBER)] {
        git(&root, &["clone", "-q", "--bare", from, to]);
    }
    git(&pool, &["update-ref", "refs/remotes/origin/heads/gone", "main"]);
    let alternates = scene.node.path(MEMBER).join("objects/info/alternates");
    std::fs::write(alternates, format!("../../{POOL}/objects")).unwrap();
}

pub(super) const CASES: &[Case] = &[
    Case {
        path: "/gitaly.ObjectPoolService/CreateObjectPool",
        votes: "PC",
        messages: |scene| {
            one(&CreateObjectPoolRequest {
                object_pool: Some(pool_at(scene, "@cluster/pools/6b/86/18")),
                origin: Some(scene.target()),
            })
        },
    },
    Case {
        path: "/gitaly.ObjectPoolService/LinkRepositoryToObjectPool",
        votes: "PC",
        messages: |scene| {
            one(&LinkRepositoryToObjectPoolRequest {
                object_pool: Some(pool_at(scene, POOL)),
                repository: Some(scene.target()),
            })
        },
    },
    Case {
        path: "/gitaly.ObjectPoolService/DisconnectGitAlternates",
        votes: "PCPC",
        messages: |scene| one(&DisconnectGitAlternatesRequest { repository: Some(scene.named(MEMBER)) }),
    },
    Case {
        path: "/gitaly.ObjectPoolService/FetchIntoObjectPool",
        votes: "PCPC",
        messages: |scene| {
            one(&FetchIntoObjectPoolRequest {
                origin: Some(scene.target()),
                object_pool: Some(pool_at(scene, POOL)),
            })
        },
    },
    Case {
        path: "/gitaly.RepositoryService/FetchSourceBranch",
        votes: "PC",
        messages: |scene| {
            one(&FetchSourceBranchRequest {
                repository: Some(scene.target()),
                source_repository: Some(scene.named("other.git")),
                source_branch: b"main".to_vec(),
                target_ref: b"refs/merge-requests/1/head".to_vec(),
                ..Default::default()
            })
        },
    },
    Case {
        path: "/gitaly.RepositoryService/CreateRepositoryFromURL",
        votes: "PC",
        messages: |scene| {
            one(&CreateRepositoryFromUrlRequest {
                repository: Some(scene.named("x/y/new.git")),
                url: scene.remote.clone(),
                ..Default::default()
            })
        },
    },
    Case {
        path: "/gitaly.RepositoryService/CreateRepositoryFromBundle",
        votes: "PC",
        messages: |scene| {
            let request = CreateRepositoryFromBundleRequest {
                repository: Some(scene.named("x/y/new.git")),
                data: scene.bundle.clone(),
            };
            vec![request.encode_to_vec()]
        },
    },
    Case {
        path: "/gitaly.RepositoryService/RestoreRepository",
        votes: "PC",
        messages: |scene| one(&restore(scene, "x/y/new.git")),
    },
    Case {
        path: "/gitaly.RepositoryService/RestoreRepository",
        votes: "PC",
        messages: |scene| one(&restore(scene, "a.git")),
    },
    Case {
        path: "/gitaly.RepositoryService/SetFullPath",
        votes: "PC",
        messages: |scene| {
            one(&SetFullPathRequest { repository: Some(scene.target()), path: "group/project".into() })
        },
    },
    Case {
        path: "/gitaly.RepositoryService/ApplyGitattributes",
        // Zeros: there are none in the commit, so they go.
        votes: "P0",
        messages: |scene| {
            one(&ApplyGitattributesRequest { repository: Some(scene.target()), revision: b"main".to_vec() })
        },
    },
];
