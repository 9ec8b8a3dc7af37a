//! Makes a mirror what its home site is now.
//!
//! An event says where to look; what is there is asked of the home site each time, so lost, repeated, late and swapped
//! events end in the same state. Acts on the one mirror the event names, under a claim of the coordinator, and leaves
//! alone what is no mirror of that site. A removal is carried out only when the home site itself has the repository no
//! more. Nothing is fetched when the refs are equal already, and after a fetch they are compared again.

use std::{collections::HashMap, sync::Arc, time::Duration};

use secrecy::SecretString;
use tabularium_common::{
    duties::{SyncEvent, SyncMessage},
    ids::SiteName,
    telemetry::CorrelationId,
};
use tabularium_proto::coordinator::{
    BeginSyncRequest, FinishSyncRequest, SyncClaim, SyncFailed, SyncGone, SyncSucceeded,
    begin_sync_response::Decision, finish_sync_request::Outcome as Report,
};
use tonic::Code;

use crate::{
    coordinators::Coordinators,
    failure::{Failure, presentable},
    home::{Advertisement, Answer, Home},
    http_client::HttpClient,
    mirror::{LocalRouter, Mirror},
    refs::RefsDigest,
    settlement::Verdict,
};

/// How long before the end of its claim a sync gives up, so that it can still report.
const CLAIM_MARGIN: Duration = Duration::from_secs(1);

/// Takes events of home sites.
pub(crate) struct Syncer {
    pub(crate) client: HttpClient,
    pub(crate) homes: HashMap<SiteName, Home>,
    pub(crate) router: LocalRouter,
    pub(crate) coordinators: Arc<Coordinators>,
    pub(crate) worker_id: String,
    pub(crate) job_deadline: Duration,
    pub(crate) secrets: Vec<SecretString>,
}

/// How a sync ended that did not fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Synced {
    /// The mirror has the refs of its home.
    Equal,
    /// The home has no such repository.
    Gone,
}

impl Syncer {
    /// Works one event off. A rename is the new name's arrival and the old name's removal.
    pub(crate) async fn take(
        &self,
        event: &SyncMessage,
        deliveries: u64,
        correlation_id: &CorrelationId,
    ) -> Verdict {
        let Some(home) = self.homes.get(&event.home_site) else {
            tracing::warn!(%correlation_id, site = %event.home_site, "event of a home site that is not configured");
            return Verdict::unknown_site(deliveries);
        };
        let SyncEvent::Renamed { from } = &event.event else {
            return self.one(event, home, deliveries, correlation_id).await;
        };
        let arrival = SyncMessage { event: SyncEvent::Updated, ..event.clone() };
        let departure =
            SyncMessage { event: SyncEvent::Removed, relative_path: from.clone(), ..event.clone() };
        let arrived = self.one(&arrival, home, deliveries, correlation_id).await;
        arrived.both(self.one(&departure, home, deliveries, correlation_id).await)
    }

    async fn one(
        &self,
        event: &SyncMessage,
        home: &Home,
        deliveries: u64,
        correlation_id: &CorrelationId,
    ) -> Verdict {
        let (site, relative_path) = (&event.home_site, &event.relative_path);
        let begin = BeginSyncRequest {
            home_site: site.to_string(),
            virtual_storage: event.virtual_storage.to_string(),
            relative_path: relative_path.to_string(),
            worker_id: self.worker_id.clone(),
        };
        let claim = match self.coordinators.begin_sync(correlation_id, begin).await {
            Ok(response) => match response.decision {
                Some(Decision::Claim(claim)) => claim,
                Some(Decision::UnderWay(_)) => {
                    return Verdict::under_way(deliveries, event.event == SyncEvent::Removed);
                }
                Some(Decision::Refused(refused)) => {
                    let reason = refused.reason;
                    tracing::warn!(%correlation_id, %site, %relative_path, reason, "event refused");
                    return Verdict::REFUSED;
                }
                None => return Verdict::UNKNOWN_ANSWER,
            },
            Err(status) => {
                tracing::warn!(%correlation_id, %site, %relative_path, %status, "sync not begun");
                return Verdict::coordinator_lost(deliveries);
            }
        };
        let result = self.within_claim(event, home, &claim, correlation_id).await;
        self.report(event, claim, result, deliveries, correlation_id).await
    }

    async fn within_claim(
        &self,
        event: &SyncMessage,
        home: &Home,
        claim: &SyncClaim,
        correlation_id: &CorrelationId,
    ) -> Result<Synced, Failure> {
        let (deadline, setting) = deadline(self.job_deadline, claim.lease_milliseconds);
        let work = self.sync(event, home, claim.repository_exists, deadline, correlation_id);
        // Two workers are never at one mirror: this one lets go, and with it the fetch, before its claim can be another's.
        tokio::time::timeout(deadline, work).await.unwrap_or_else(|_| {
            Err(Failure::unreachable(format!(
                "the sync was not done within {} s, the most that {setting} allows",
                deadline.as_secs()
            )))
        })
    }

    async fn sync(
        &self,
        event: &SyncMessage,
        home: &Home,
        exists: bool,
        deadline: Duration,
        correlation_id: &CorrelationId,
    ) -> Result<Synced, Failure> {
        let mirror = self.router.mirror(event, correlation_id);
        let removal = event.event == SyncEvent::Removed;
        let there = match home.ask(&self.client, &event.relative_path, correlation_id).await? {
            Answer::Here(advertisement) => advertisement,
            Answer::Elsewhere if !removal => {
                return Err(Failure::refused("home site redirects; redirects are not followed"));
            }
            Answer::Gone | Answer::Elsewhere => {
                if removal && exists {
                    mirror.remove().await?;
                }
                return Ok(Synced::Gone);
            }
        };
        if !exists {
            mirror.create(&there).await?;
        } else if mirror.refs_digest().await? == there.refs {
            return self.finish_head(&mirror, &there).await;
        }
        mirror.fetch(home, deadline).await?;
        let here = mirror.refs_digest().await?;
        if here != there.refs {
            let again = home.ask(&self.client, &event.relative_path, correlation_id).await?;
            judge(here, there.refs, &again)?;
        }
        self.finish_head(&mirror, &there).await
    }

    async fn finish_head(&self, mirror: &Mirror<'_>, there: &Advertisement) -> Result<Synced, Failure> {
        if let Some(head) = &there.head {
            mirror.point_head(head).await?;
        }
        Ok(Synced::Equal)
    }

    async fn report(
        &self,
        event: &SyncMessage,
        claim: SyncClaim,
        result: Result<Synced, Failure>,
        deliveries: u64,
        correlation_id: &CorrelationId,
    ) -> Verdict {
        let (site, relative_path) = (&event.home_site, &event.relative_path);
        let removed = event.event == SyncEvent::Removed && result == Ok(Synced::Gone);
        let outcome = match result {
            Ok(Synced::Equal) => Report::Succeeded(SyncSucceeded {}),
            Ok(Synced::Gone) => Report::Gone(SyncGone {}),
            Err(failure) => {
                let message = presentable(&failure.message, &self.secrets);
                tracing::warn!(%correlation_id, %site, %relative_path, error = message, "sync failed");
                Report::Failed(SyncFailed { message, unreachable: failure.unreachable })
            }
        };
        let finish = FinishSyncRequest { claim_id: claim.claim_id, outcome: Some(outcome) };
        match self.coordinators.finish_sync(correlation_id, finish).await {
            Ok(response) => Verdict::of_sync(&response),
            // The claim went with the repository.
            Err(status) if removed && status.code() == Code::NotFound => Verdict::NOTHING,
            Err(status) => {
                tracing::warn!(%correlation_id, %site, %relative_path, %status, "sync not reported");
                Verdict::coordinator_lost(deliveries)
            }
        }
    }
}

/// The shorter of what the operator allows and what the claim leaves, and the setting that it comes from.
fn deadline(job: Duration, lease_milliseconds: u32) -> (Duration, &'static str) {
    let lease = Duration::from_millis(lease_milliseconds.into());
    let claim = lease.checked_sub(CLAIM_MARGIN).unwrap_or(lease / 2);
    if lease.is_zero() || job <= claim {
        (job, "`job_deadline` of the replicators")
    } else {
        (claim, "`timing.sync_lease` of the coordinators")
    }
}

/// Whether refs that are not those the home had before the fetch can be right: they are those it has now, or it is being
/// written all the time, and then the event of that write is on its way.
fn judge(here: RefsDigest, before: RefsDigest, again: &Answer) -> Result<(), Failure> {
    match again {
        Answer::Here(now) if now.refs == here || now.refs != before => Ok(()),
        Answer::Here(now) => Err(Failure::refused(format!(
            "after the fetch the mirror's {} refs are not the {} of the home site",
            here.count, now.refs.count
        ))),
        Answer::Gone | Answer::Elsewhere => {
            Err(Failure::refused("the home site lost the repository meanwhile"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sync_ends_before_its_claim_does() {
        let job = Duration::from_secs(1800);
        assert_eq!(deadline(job, 0).0, job);
        assert_eq!(deadline(job, 60_000).0, Duration::from_secs(59));
        assert_eq!(deadline(job, 500).0, Duration::from_millis(250));
        assert_eq!(deadline(Duration::from_secs(5), 60_000).0, Duration::from_secs(5));
        assert!(deadline(job, 60_000).1.contains("sync_lease"), "what to turn when it is too short");
        assert!(deadline(job, u32::MAX).1.contains("job_deadline"));
    }

    #[test]
    fn a_mirror_that_differs_from_a_home_at_rest_is_wrong() {
        let digest = |names: &[&str]| {
            let mut digest = RefsDigest::default();
            for name in names {
                digest.add(name.as_bytes(), b"1");
            }
            digest
        };
        let (one, two, three) = (digest(&["a"]), digest(&["a", "b"]), digest(&["c"]));
        let now = |refs| Answer::Here(Advertisement { refs, ..Advertisement::default() });
        assert!(judge(two, one, &now(two)).is_ok(), "pushed before the fetch");
        assert!(judge(two, one, &now(three)).is_ok(), "pushed before and after the fetch");
        assert!(judge(two, one, &now(one)).is_err());
        assert!(judge(two, one, &Answer::Gone).is_err());
    }
}
