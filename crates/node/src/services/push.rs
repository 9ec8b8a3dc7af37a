//! How a push begins, over HTTP as over SSH: who pushes, and whether git is needed for it at all.

use std::sync::Arc;

use bytes::Bytes;
use futures::{FutureExt as _, Stream, future::BoxFuture};
use tabularium_proto::gitaly::Repository;
use tonic::{Status, metadata::MetadataMap};

use crate::{
    access::{Protocol, Requester},
    following::{self, Part},
    git::{GitCommand, transport, transport::Choices},
    hooks::{self, Session},
    node::Node,
    votes::Voter,
};

/// What the first message of a push says, whichever way it came.
pub(super) struct First<'a> {
    pub(super) repository: Option<&'a Repository>,
    pub(super) gl_id: &'a str,
    pub(super) gl_username: &'a str,
    /// Of the days before it was part of the repository.
    pub(super) gl_repository: &'a str,
    pub(super) git_config_options: &'a [String],
    pub(super) git_protocol: &'a str,
    pub(super) protocol: Protocol,
}

/// Who carries the push out.
pub(super) enum Begun<D> {
    /// This node by itself: it follows the primary, and answers like git.
    Followed(BoxFuture<'static, Result<Bytes, Status>>),
    /// Git, which is to read these bytes and then the rest.
    Git { command: GitCommand, session: Option<Arc<Session>>, front: Bytes, data: D },
}

impl First<'_> {
    fn requester(&self) -> Requester {
        let repository = self.repository.cloned().unwrap_or_default();
        let named = [repository.gl_repository, self.gl_repository.to_owned()];
        Requester {
            gl_id: self.gl_id.to_owned(),
            gl_username: self.gl_username.to_owned(),
            gl_repository: named.into_iter().find(|name| !name.is_empty()).unwrap_or_default(),
            gl_project_path: repository.gl_project_path,
            protocol: self.protocol,
            ..Requester::default()
        }
    }

    /// Finds out who carries it out. `metadata` came with it, `data` is what comes behind the first message.
    pub(super) async fn begin<D>(
        self,
        node: &Arc<Node>,
        voter: Voter,
        metadata: &MetadataMap,
        mut data: D,
    ) -> Result<Begun<D>, Status>
    where
        D: Stream<Item = Result<Bytes, Status>> + Send + Unpin + 'static,
    {
        let repository = node.storages.open(self.repository)?;
        // A secondary's client is a router, which gives it what the primary's client says; nobody reads what is here.
        let front = if voter.takes_part() && !voter.runs_hooks() {
            match following::part(node, &repository, &mut data).await? {
                Part::Run(front) => front,
                Part::Follow(push) => {
                    let followed = push.follow(Arc::clone(node), repository, voter, data);
                    return Ok(Begun::Followed(followed.boxed()));
                }
            }
        } else {
            Bytes::new()
        };
        let choices = Choices {
            git_config_options: self.git_config_options,
            git_protocol: self.git_protocol,
            stateless: self.protocol == Protocol::Http,
            advertise: false,
        };
        let command = transport::receive_pack(&node.git, &repository, &choices)?;
        let requester = self.requester().sent_with(metadata);
        let (command, session) = hooks::attend_push(node, &repository, &voter, requester, command).await?;
        Ok(Begun::Git { command, session, front, data })
    }
}
