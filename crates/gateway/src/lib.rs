//! Git over smart HTTP for ordinary clients: `git clone http://host/group/project.git` and `git push`, protocol
//! versions 0 to 2, and a small JSON API that creates repositories.
//!
//! The gateway speaks the Gitaly API to the routers and knows nothing else of the cluster: not where a repository is,
//! not how it is replicated, no git process. It keeps no state; any number of gateways may run.
//!
//! A request enters in `connection`, is admitted and routed in `gateway` (limits, `access`, `path`) and served
//! in `exchange` (git) or `api` (JSON). Bytes flow without queues or tasks of their own: the client's body
//! (`request_body`) becomes the body of the gRPC call (`upload`), the call's messages become the body of the answer
//! (`answer`), and each side is polled only when the other has room. Dropping the answer drops the call, so a client
//! that leaves stops its git process. What is fetched goes beside its call, over a sidechannel, where the router has that
//! (`beside`). `upstream` chooses among routers and coordinators, `mirror` refuses pushes to
//! mirrors, `failure` says which status a failure gets.
//!
//! A request that fails before its answer begins is made again with another router when that cannot do a thing twice: a
//! read always, a push only when the first router says, or cannot have, begun it. The front of its body is kept for that.
//!
//! How new the repository is that was read or written stands in `X-Tabularium-Generation` (`freshness`); a read that must not
//! miss a write asks for `X-Tabularium-At-Least-Generation`, and may wait for it.
//!
//! What hooks on the nodes see of a push: `gl_id` is `user-<name>` and `gl_username` `<name>`, the user name of the Basic
//! credential or `anonymous`; `gl_repository` is `project-<path>`, the repository's path without `.git`.
//!
//! What must hold: an answer that broke off never looks complete, and neither does a request whose body is at fault.
//!
//! Tests: `cargo nextest run -p tabularium-gateway`; those in `tests/it` drive real git clients against a stand-in router.

mod access;
mod answer;
mod api;
mod beside;
pub mod config;
mod connection;
mod exchange;
mod failure;
mod freshness;
mod gateway;
mod git_protocol;
mod limits;
mod metrics;
mod mirror;
mod path;
mod record;
mod request_body;
mod server;
mod traffic;
mod upload;
mod upstream;

pub use server::{Running, StartError, run, start};
