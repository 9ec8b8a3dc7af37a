//! The life of a write: it waits for the repository's [`mod@ticket`], [`mod@begin`]s or [`mod@create`]s, and is
//! [`mod@commit`]ted or given up; or it is [`mod@settle`]d when nobody knows what became of it.

mod begin;
mod commit;
mod create;
mod settle;
mod ticket;

pub(crate) use begin::{Begin, Kind, Started, begin};
pub(crate) use commit::{commit, discard};
pub(crate) use create::RepositoryIds;
pub(crate) use settle::{Doubt, PAUSE, look_again, settle};
pub(crate) use ticket::take_for_duty;

use crate::{
    app::Shared,
    db::{DbError, revocations},
    repository::RevokedRoute,
};

/// Carries out what revocations are owed for a name, and waits until no router can read by the old route.
async fn revoke_owed(shared: &Shared, route: RevokedRoute) -> Result<(), DbError> {
    let db = &shared.db;
    let owed = db.retrying(|| revocations::revocation_list_owed(db.pool(), &route.key)).await?;
    if owed.is_empty() { Ok(()) } else { shared.revoker.revoke(&[route], owed).await }
}
