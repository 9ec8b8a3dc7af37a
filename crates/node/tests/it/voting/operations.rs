//! Requests of users that change a repository, beside the simplest ones.

use prost::Message;
use tabularium_proto::gitaly::{
    ApplyBfgObjectMapStreamRequest, GitCommit, MigrateReferenceBackendRequest, ResolveConflictsRequest,
    ResolveConflictsRequestHeader, UserApplyPatchRequest, UserCherryPickRequest, UserFfBranchRequest,
    UserMergeToRefRequest, UserRebaseConfirmableRequest, UserRebaseToRefRequest, UserRevertRequest,
    UserSquashRequest, UserUpdateSubmoduleRequest,
    migrate_reference_backend_request::ReferenceBackend,
    resolve_conflicts_request::ResolveConflictsRequestPayload,
    user_apply_patch_request::{self, UserApplyPatchRequestPayload},
    user_rebase_confirmable_request::{self, UserRebaseConfirmableRequestPayload},
};

use super::{
    mutators::{BY_USER, Case, Scene, one},
    repositories::POOL,
};
use crate::{
    harness::git,
    operations::{moment, user},
};

fn of(id: &str) -> GitCommit {
    GitCommit { id: id.to_owned(), ..GitCommit::default() }
}

fn apply_patch(scene: &Scene) -> Vec<Vec<u8>> {
    let header = user_apply_patch_request::Header {
        repository: Some(scene.target()),
        user: Some(user()),
        target_branch: b"main".to_vec(),
        timestamp: Some(moment()),
        ..Default::default()
    };
    let mails = git(&scene.node.path("a.git"), &["format-patch", "--stdout", "feature~1..feature"]);
    let payloads = [
        UserApplyPatchRequestPayload::Header(header),
        UserApplyPatchRequestPayload::Patches((mails + "\n").into_bytes()),
    ];
    let request =
        |payload| UserApplyPatchRequest { user_apply_patch_request_payload: Some(payload) }.encode_to_vec();
    payloads.map(request).to_vec()
}

fn rebase(scene: &Scene) -> Vec<Vec<u8>> {
    let header = user_rebase_confirmable_request::Header {
        repository: Some(scene.target()),
        user: Some(user()),
        branch: b"feature".to_vec(),
        branch_sha: scene.side.clone(),
        remote_repository: Some(scene.target()),
        remote_branch: b"main".to_vec(),
        timestamp: Some(moment()),
        ..Default::default()
    };
    let payloads = [
        UserRebaseConfirmableRequestPayload::Header(header),
        UserRebaseConfirmableRequestPayload::Apply(true),
    ];
    let request = |payload| {
        UserRebaseConfirmableRequest { user_rebase_confirmable_request_payload: Some(payload) }
            .encode_to_vec()
    };
    payloads.map(request).to_vec()
}

fn resolve_conflicts(scene: &Scene) -> Vec<Vec<u8>> {
    let header = ResolveConflictsRequestHeader {
        repository: Some(scene.target()),
        our_commit_oid: scene.main.clone(),
        target_repository: Some(scene.target()),
        their_commit_oid: scene.side.clone(),
        source_branch: b"main".to_vec(),
        target_branch: b"feature".to_vec(),
        commit_message: b"resolved".to_vec(),
        user: Some(user()),
        timestamp: Some(moment()),
    };
    let payloads = [
        ResolveConflictsRequestPayload::Header(header),
        ResolveConflictsRequestPayload::FilesJson(b"[]".to_vec()),
    ];
    let request = |payload| {
        ResolveConflictsRequest { resolve_conflicts_request_payload: Some(payload) }.encode_to_vec()
    };
    payloads.map(request).to_vec()
}

pub(super) const CASES: &[Case] = &[
    Case {
        path: "/gitaly.CleanupService/ApplyBfgObjectMapStream",
        votes: "PC",
        messages: |scene| {
            one(&ApplyBfgObjectMapStreamRequest {
                repository: Some(scene.named(POOL)),
                object_map: format!("{} {}", scene.main, scene.side).into_bytes(),
            })
        },
    },
    Case {
        path: "/gitaly.RepositoryService/MigrateReferenceBackend",
        votes: "PC",
        messages: |scene| {
            let mut request = MigrateReferenceBackendRequest {
                repository: Some(scene.target()),
                ..MigrateReferenceBackendRequest::default()
            };
            request.set_target_reference_backend(ReferenceBackend::Files);
            one(&request)
        },
    },
    Case {
        path: "/gitaly.OperationService/UserFFBranch",
        votes: BY_USER,
        messages: |scene| {
            one(&UserFfBranchRequest {
                repository: Some(scene.target()),
                user: Some(user()),
                commit_id: scene.main.clone(),
                branch: b"side".to_vec(),
                ..Default::default()
            })
        },
    },
    Case {
        path: "/gitaly.OperationService/UserCherryPick",
        votes: BY_USER,
        messages: |scene| {
            one(&UserCherryPickRequest {
                repository: Some(scene.target()),
                user: Some(user()),
                commit: Some(of(&scene.side)),
                branch_name: b"main".to_vec(),
                message: b"picked".to_vec(),
                timestamp: Some(moment()),
                ..Default::default()
            })
        },
    },
    Case {
        path: "/gitaly.OperationService/UserRevert",
        votes: BY_USER,
        messages: |scene| {
            one(&UserRevertRequest {
                repository: Some(scene.target()),
                user: Some(user()),
                commit: Some(of(&scene.main)),
                branch_name: b"main".to_vec(),
                message: b"reverted".to_vec(),
                timestamp: Some(moment()),
                ..Default::default()
            })
        },
    },
    Case {
        path: "/gitaly.OperationService/UserSquash",
        votes: "PC",
        messages: |scene| {
            one(&UserSquashRequest {
                repository: Some(scene.target()),
                user: Some(user()),
                start_sha: scene.main.clone(),
                end_sha: scene.side.clone(),
                author: Some(user()),
                commit_message: b"squashed".to_vec(),
                timestamp: Some(moment()),
                ..Default::default()
            })
        },
    },
    Case {
        path: "/gitaly.OperationService/UserMergeToRef",
        votes: "PC",
        messages: |scene| {
            one(&UserMergeToRefRequest {
                repository: Some(scene.target()),
                user: Some(user()),
                source_sha: scene.side.clone(),
                target_ref: b"refs/merge-requests/1/merge".to_vec(),
                message: b"merged".to_vec(),
                first_parent_ref: b"refs/heads/main".to_vec(),
                timestamp: Some(moment()),
                ..Default::default()
            })
        },
    },
    Case {
        path: "/gitaly.OperationService/UserRebaseToRef",
        votes: "PC",
        messages: |scene| {
            one(&UserRebaseToRefRequest {
                repository: Some(scene.target()),
                user: Some(user()),
                source_sha: scene.side.clone(),
                target_ref: b"refs/merge-requests/1/rebase".to_vec(),
                first_parent_ref: b"refs/heads/main".to_vec(),
                timestamp: Some(moment()),
                ..Default::default()
            })
        },
    },
    Case {
        path: "/gitaly.OperationService/UserUpdateSubmodule",
        votes: BY_USER,
        messages: |scene| {
            one(&UserUpdateSubmoduleRequest {
                repository: Some(scene.target()),
                user: Some(user()),
                commit_sha: "22".repeat(20),
                branch: b"main".to_vec(),
                submodule: b"module".to_vec(),
                commit_message: b"newer".to_vec(),
                timestamp: Some(moment()),
                ..Default::default()
            })
        },
    },
    Case { path: "/gitaly.OperationService/UserRebaseConfirmable", votes: BY_USER, messages: rebase },
    Case { path: "/gitaly.OperationService/UserApplyPatch", votes: BY_USER, messages: apply_patch },
    Case { path: "/gitaly.ConflictsService/ResolveConflicts", votes: BY_USER, messages: resolve_conflicts },
];
